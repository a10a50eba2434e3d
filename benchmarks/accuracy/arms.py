"""The arms of the experiments: names of optimizers, and what they make.

"fp32" is torch's AdamW, the 32-bit baseline; "fp32 beta1=0.8" the same with another beta1, to tell what
compensation does from what less momentum does. "8bit", "rank1", "block", "factored" and the second moments
of shard4bit.spec ("B2048/DE-0") are the paper's step with a B128/DE first moment; "rank1 stochastic" and
"block stochastic" are what AdamW4bit does by default. "+emb32" after a name keeps the moments of embeddings
in fp32 (the paper's "stable embedding"). The names of candidates.py are arms too; those of Table 1's second
moments are trained by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import shard4bit
from benchmarks.accuracy.candidates import ABLATED, CANDIDATES, CandidateAdamW
from shard4bit.spec import ADAMW_8BIT, ADAMW_PAPER

BASELINE = "fp32"
STABLE = "+emb32"
BETA1 = "fp32 beta1="

#: Arms whose options are more than a second moment. New options of AdamW4bit get their line here.
OPTIONS: dict[str, dict[str, Any]] = {
    "8bit": ADAMW_8BIT,
    "fp32 by shard4bit": {"quantize": False},
    **{f"{v} compensated": {"second_moment": v, "compensate": True} for v in ("rank1", "block", "factored")},
    **{
        f"{v} stochastic": {"second_moment": v, "compensate": True, "rounding": "stochastic"}
        for v in ("rank1", "block")
    },
}

ABLATION = (
    BASELINE,
    "B2048/DE",
    "B2048/DE+emb32",
    "B128/DE",
    "B128/DE+emb32",
    "B2048/DE-0",
    "B2048/DE-0+emb32",
    "B128/DE-0",
    "Rank-1/DE-0",
    "rank1",
    "rank1+emb32",
    "factored",
)
MAIN = (BASELINE, "rank1", "rank1 stochastic")


def groups(model: nn.Module, weight_decay: float, *, stable: bool) -> list[dict[str, Any]]:
    """Parameter groups, with names: matrices decay, vectors do not; with ``stable``, embeddings apart."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} if stable else set()
    kinds: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault((parameter.ndim > 1, id(parameter) in embeddings), []).append((name, parameter))
    out = []
    for (decays, apart), members in kinds.items():
        group = {"params": members, "weight_decay": weight_decay if decays else 0.0}
        out.append(group | ({"quantize": False} if apart else {}))
    return out


def make_optimizer(arm: str, model: nn.Module, **common: Any) -> torch.optim.Optimizer:
    """The optimizer of an arm. common: lr, betas, eps, weight_decay.

    Raises ValueError for an unknown name.
    """
    base = arm.removesuffix(STABLE)
    made = groups(model, common.pop("weight_decay"), stable=base != arm)
    if base == BASELINE or base.startswith(BETA1):
        if base != arm:
            raise ValueError(f"arm {arm!r}: {BASELINE} keeps every moment in fp32 already")
        if base != BASELINE:
            common["betas"] = (float(base.removeprefix(BETA1)), common["betas"][1])
        on_gpu = next(model.parameters()).is_cuda
        return torch.optim.AdamW(made, fused=on_gpu or None, **common)
    candidate = (CANDIDATES | ABLATED).get(base)
    if candidate is not None:
        return CandidateAdamW(made, candidate, seed=torch.initial_seed(), **common)
    options = OPTIONS.get(base, {"second_moment": base})
    return shard4bit.AdamW4bit(made, **common, **{**ADAMW_PAPER, **options})

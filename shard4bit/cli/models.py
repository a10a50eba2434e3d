"""Shapes of models: from a Hugging Face config.json, from a canonical checkpoint, or of a given size."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from shard4bit.checkpoint import store
from shard4bit.cli.tables import UsageError, count


@dataclass(frozen=True)
class Param:
    """A parameter's name and whole shape; frozen ones have neither gradient nor state."""

    name: str
    shape: tuple[int, ...]
    trainable: bool = True

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, eq=False)
class Model:
    """A model's parameters in order. ``about`` says where they come from."""

    about: str
    params: tuple[Param, ...]

    @cached_property
    def numel(self) -> int:
        return sum(p.numel for p in self.params)

    @cached_property
    def units(self) -> tuple[tuple[Param, ...], ...]:
        """The parameters by layer (``model.layers.3``), the rest together: what FSDP is usually given."""
        found: dict[str, list[Param]] = {}
        for param in self.params:
            layer = re.match(r"(?:[^.0-9][^.]*\.)*\d+(?=\.)", param.name)
            found.setdefault(layer[0] if layer else "", []).append(param)
        return tuple(map(tuple, found.values()))


Named = Iterator[tuple[str, tuple[int, ...]]]


def _gpt2(c: Mapping[str, Any]) -> Named:
    width, inner = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    yield "transformer.wte.weight", (c["vocab_size"], width)
    yield "transformer.wpe.weight", (c.get("n_positions", c.get("n_ctx", 1024)), width)
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}"
        for name, shape in (
            ("attn.c_attn", (width, 3 * width)),
            ("attn.c_proj", (width, width)),
            ("mlp.c_fc", (width, inner)),
            ("mlp.c_proj", (inner, width)),
        ):
            yield f"{at}.{name}.weight", shape
            yield f"{at}.{name}.bias", shape[1:]
        for norm in ("ln_1", "ln_2"):
            yield f"{at}.{norm}.weight", (width,)
            yield f"{at}.{norm}.bias", (width,)
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)
    if not c.get("tie_word_embeddings", True):
        yield "lm_head.weight", (c["vocab_size"], width)


def _llama_like(
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qkv_bias: bool | None = None,
    qk_norm: bool = False,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    tied: bool = False,
) -> Callable[[Mapping[str, Any]], Named]:
    """Decoders that differ from Llama in defaults, biases and norms. ``qkv_bias`` None: as the config's
    ``attention_bias`` says, which then goes for the output projection too."""

    def shapes(c: Mapping[str, Any]) -> Named:
        width, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        size = c.get("head_dim") or head_dim or width // heads
        q, kv = heads * size, (c.get("num_key_value_heads") or kv_heads or heads) * size
        bias = bool(c.get("attention_bias")) if qkv_bias is None else qkv_bias
        yield "model.embed_tokens.weight", (c["vocab_size"], width)
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}"
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"{at}.self_attn.{name}_proj.weight", (rows, width)
                if bias:
                    yield f"{at}.self_attn.{name}_proj.bias", (rows,)
            yield f"{at}.self_attn.o_proj.weight", (width, q)
            if bias and qkv_bias is None:
                yield f"{at}.self_attn.o_proj.bias", (width,)
            for name in ("q_norm", "k_norm") if qk_norm else ():
                yield f"{at}.self_attn.{name}.weight", (size,)
            for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                yield f"{at}.mlp.{name}_proj.weight", shape
                if c.get("mlp_bias"):
                    yield f"{at}.mlp.{name}_proj.bias", shape[:1]
            for name in norms:
                yield f"{at}.{name}.weight", (width,)
        yield "model.norm.weight", (width,)
        if not c.get("tie_word_embeddings", tied):
            yield "lm_head.weight", (c["vocab_size"], width)

    return shapes


_FOUR_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
FAMILIES: dict[str, Callable[[Mapping[str, Any]], Named]] = {
    "gpt2": _gpt2,
    "llama": _llama_like(),
    "mistral": _llama_like(kv_heads=8, qkv_bias=False),
    "qwen2": _llama_like(qkv_bias=True),
    "qwen3": _llama_like(head_dim=128, qk_norm=True),
    "gemma": _llama_like(head_dim=256, tied=True),
    "gemma2": _llama_like(head_dim=256, tied=True, norms=_FOUR_NORMS),
    "gemma3_text": _llama_like(head_dim=256, tied=True, qk_norm=True, norms=_FOUR_NORMS),
}


def from_config(path: Path) -> Model:
    """The model of a config.json. Raises UsageError for what is not known or not complete."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise UsageError(
            f"{path} has model_type {kind!r}; known are {', '.join(FAMILIES)}. For others give --params, "
            "or the directory of a checkpoint"
        )
    if config.get("num_local_experts") or config.get("num_experts"):
        raise UsageError(f"{path} describes a mixture of experts, whose shapes are not known: give --params")
    try:
        params = tuple(Param(name, shape) for name, shape in FAMILIES[kind](config))
        _check(params)
    except KeyError as error:
        raise UsageError(f"{path} lacks {error}, which a {kind} config needs") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{path} is not a usable {kind} config: {error}") from None
    return _named(f"{kind} ({path.name})", params)


def _check(params: tuple[Param, ...]) -> None:
    for param in params:
        if not all(isinstance(d, int) and 0 < d < 2**40 for d in param.shape):
            raise ValueError(f"{param.name} would have shape {param.shape}")


def _named(about: str, params: tuple[Param, ...]) -> Model:
    model = Model("", params)
    return Model(f"{about}: {count(model.numel)} parameters in {len(params)} tensors", params)


def from_checkpoint(path: Path) -> Model:
    """The model of a canonical checkpoint. Parameters without a state are frozen, buffers too."""
    directory, manifest = store.find(path)
    params = tuple(
        Param(name, tuple(fact["shape"]), "moments" in fact or not manifest.content["optimizer"])
        for name, fact in manifest.parameters.items()
    )
    return _named(f"checkpoint {directory.name}", params)


def of_size(target: float) -> Model:
    """A Llama-like model of about ``target`` parameters: as many layers as heads of 128, up to 32,000 tokens
    (the embeddings take a quarter at most), and a feed-forward width that makes up the rest."""
    if not 1e6 <= target <= 1e14:
        raise UsageError(f"--params {target:g}: expected a number from 1e6 to 1e14")
    depth = max(1, round((target / (12 * 128**2)) ** (1 / 3)))
    width = 128 * depth
    vocabulary = min(32000, int(target / (8 * width)))
    rest = target - 2 * vocabulary * width - width
    inner = round((rest / depth - 4 * width**2 - 2 * width) / (3 * width))
    config = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": depth,
        "vocab_size": vocabulary,
    }
    params = tuple(Param(name, shape) for name, shape in FAMILIES["llama"](config))
    return _named(f"Llama-like, {depth} layers of width {width}", params)


def find_model(source: str | None, params: float | None) -> Model:
    """The model that the command line names: a file or directory, or a number of parameters."""
    if (source is None) == (params is None):
        raise UsageError("give either a config.json or checkpoint directory, or --params, such as 7e9")
    if source is None:
        assert params is not None
        return of_size(params)
    path = Path(source)
    if path.is_file():
        return from_config(path)
    if (path / "config.json").is_file():
        return from_config(path / "config.json")
    if path.is_dir():
        return from_checkpoint(path)
    raise UsageError(f"{path}: no such file or directory")

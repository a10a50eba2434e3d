"""DeepSpeed's checkpoints without an engine: into the canonical format, and to and from universal ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.errors import CheckpointError
from tests.deepspeed import engines
from tests.deepspeed.engines import Known, config, engine_of, entry, needs_deepspeed
from tests.deepspeed.test_checkpoints_zero import blank
from tests.fsdp import models
from tests.fsdp.models import ADAMW, SHAPES
from tests.pool import pool

pytestmark = needs_deepspeed
STEPS = 2


class Mixed(Known):
    """With a frozen parameter, a buffer, and a parameter whose name has dots."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(70, 80)
        self.few.requires_grad_(False)
        self.register_buffer("seen", torch.arange(3.0))
        with torch.no_grad():
            self.inner.weight.copy_(models.start("inner.weight", (80, 70)))
            self.inner.bias.copy_(models.start("inner.bias", (80,)))


def native(root: str, options: dict[str, Any], own: dict[str, Any]) -> str:
    settings = config(**options)
    settings["optimizer"] = entry(options.get("kind", "rank1"), **own)
    engine = engine_of(Mixed(), settings)
    engines.train(engine, STEPS)
    with engines.quiet():
        engine.save_checkpoint(root, tag="here")
    return shard4bit.digest(engine)


def loaded(root: str, options: dict[str, Any], own: dict[str, Any]) -> Any:
    settings = config(**options)
    settings["optimizer"] = entry(options.get("kind", "rank1"), **own)
    engine = engine_of(Mixed(), settings)
    found = shard4bit.load(root, engine)
    decays = {b.placed.name: b.placed.options.get("weight_decay") for b in engine.basic_optimizer.bind()}
    return shard4bit.digest(engine), found.step, decays


@pytest.mark.parametrize(
    "world, options, own",
    [
        (2, {"stage": 2}, {"no_decay": ["bias", "inner.bias"], "quantize_exclude": ["odd"]}),
        (3, {"stage": 1, "kind": "block", "zero": {"round_robin_gradients": True}}, {}),
        (2, {"stage": 1, "precision": "bf16+fp32", "kind": "sgd"}, {}),
        (2, {"stage": 2, "precision": "fp16", "kind": "factored"}, {}),
    ],
    ids=str,
)
def test_native_to_canonical(
    world: int, options: dict[str, Any], own: dict[str, Any], tmp_path: Path
) -> None:
    from shard4bit.deepspeed.convert import read_native

    digests = pool(world).run(native, str(tmp_path / "native"), options, own)
    training = read_native(tmp_path / "native" / "here")
    assert training.step == STEPS
    assert shard4bit.digest(training.model, training.optimizer) == digests[0]
    shard4bit.save(tmp_path / "canonical", training.model, training.optimizer, step=training.step)
    for digest, step, decays in pool(5 - world).run(loaded, str(tmp_path / "canonical"), options, own):
        assert (digest, step) == (digests[0], STEPS)
        assert {n for n, d in decays.items() if d == 0.0} == set(own.get("no_decay", ()))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    from shard4bit.deepspeed.convert import read_native

    with pytest.raises(CheckpointError, match="there is no .*mp_rank_00_model_states.pt"):
        read_native(tmp_path)
    pool(2).run(native, str(tmp_path), {"stage": 2}, {})
    folder = tmp_path / "here"
    first, second = sorted(folder.glob("*optim_states.pt"))
    second.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"written by 2 ranks and has the files of \[0\]"):
        read_native(folder)
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="is not whole"):
        read_native(folder)
    second.unlink()
    (tmp_path / "kept").rename(second)
    saved = torch.load(first, weights_only=False)
    states = saved["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    key = next(k for k in states if k.startswith("odd") and k.endswith("codes"))
    kept, states[key] = states[key], states[key][1:]
    torch.save(saved, first)
    with pytest.raises(CheckpointError, match="odd: exp_avg_codes of .* expected torch.uint8"):
        read_native(folder)
    states[key] = kept
    saved["mine"] = Harmful()
    torch.save(saved, first)
    with pytest.raises(CheckpointError, match="trusted=True"):
        read_native(folder)
    assert not Harmful.ran
    for file in folder.glob("*optim_states.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no optimizer states of ZeRO stage 0, 1 or 2"):
        read_native(folder)


class Harmful:
    """An object whose unpickling runs code."""

    ran = False

    def __reduce__(self) -> Any:
        return (harm, ())


def harm() -> None:
    Harmful.ran = True


def test_another_optimizers_states(tmp_path: Path) -> None:
    from shard4bit.deepspeed.convert import read_native

    pool(2).run(adamw_native, str(tmp_path))
    with pytest.raises(CheckpointError, match="has 'step': expected one of AdamW4bit"):
        read_native(tmp_path / "here")


# ---- universal checkpoints ----------------------------------------------------------------------------

PLAIN = {"type": "AdamW", "params": {**ADAMW, "betas": list(ADAMW["betas"]), "torch_adam": True}}


def vectors_apart(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices, and vectors without decay at another rate."""
    params = list(model.parameters())
    vectors = {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0, "lr": 1e-3}
    return [{"params": [p for p in params if p.ndim > 1]}, vectors]


def adamw_native(root: str, precision: str = "fp32", groups: bool = False) -> None:
    """AdamW's own run."""
    model = Known()
    more = {"model_parameters": vectors_apart(model)} if groups else {}
    engine = engine_of(model, {**config(2, precision=precision), "optimizer": PLAIN}, **more)
    for step in range(1, STEPS + 1):
        engine.backward(engine(step))
        engine.step()
    with engines.quiet():
        engine.save_checkpoint(root, tag="here")


def adamw_universal(root: str) -> Any:
    """What AdamW reads of a universal checkpoint: weights and moments by name."""
    settings = {**config(2), "optimizer": PLAIN, "checkpoint": {"load_universal": True}}
    engine = engine_of(Known(), settings)
    with engines.quiet():
        engine.load_checkpoint(root)
    from deepspeed.utils import safe_get_full_fp32_param as weight
    from deepspeed.utils import safe_get_full_optimizer_state as moment

    engine.optimizer._lazy_init_hp_params_optimizer_state()
    out = {}
    for name, param in engine.module.named_parameters():
        if not engines.OLD:  # whose function gives moments then; test_convert_command reads the partitions
            out[f"{name}/fp32"] = weight(param).numpy().copy()
        for key in ("exp_avg", "exp_avg_sq"):
            out[f"{name}/{key}"] = moment(param, key).numpy().copy()
    return out, engine.global_steps


@pytest.mark.slow
def test_native_to_universal(tmp_path: Path) -> None:
    """DeepSpeed's AdamW, on another number of ranks, gets the dequantized moments."""
    from shard4bit.deepspeed.convert import read_native, write_universal

    pool(2).run(saved_by_us, str(tmp_path / "native"))
    write_universal(tmp_path / "native" / "here", tmp_path / "universal" / "there")
    training = read_native(tmp_path / "native" / "here")
    expected = {}
    for name, param in training.model.named_parameters():
        if not engines.OLD:
            expected[f"{name}/fp32"] = param.detach().numpy()
        for key in ("exp_avg", "exp_avg_sq"):
            expected[f"{name}/{key}"] = training.optimizer.moment(param, key).numpy()
    for found, steps in pool(3).run(adamw_universal, str(tmp_path / "universal")):
        assert steps == STEPS
        assert set(found) == set(expected)
        for key, values in found.items():  # DeepSpeed adds 0.0 on the way, so -0.0 becomes 0.0
            assert np.array_equal(values, expected[key]), key


def saved_by_us(root: str) -> None:
    engine = engine_of(Known(), config(1))
    engines.train(engine, STEPS)
    with engines.quiet():
        engine.save_checkpoint(root, tag="here")


def universal(root: Path, precision: str = "fp32", groups: bool = False) -> None:
    """AdamW's run of two ranks, and DeepSpeed's own program on its files."""
    pool(2).run(adamw_native, str(root / "native"), precision, groups)
    folders = ["--input_folder", str(root / "native" / "here"), "--output_folder", str(root / "there")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_universal_to_canonical(tmp_path: Path) -> None:
    """A universal checkpoint of AdamW, made by DeepSpeed's own program, quantized once."""
    from shard4bit.deepspeed.convert import read_universal

    universal(tmp_path)
    training = read_universal(tmp_path / "there", second_moment="block")
    assert training.step == STEPS
    model: Any = Known()
    plain = torch.optim.AdamW(model.parameters(), **ADAMW)
    for step in range(1, STEPS + 1):
        models.force(model, step)
        plain.step()
    group = training.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (ADAMW["lr"], ADAMW["weight_decay"])
    named = dict(training.model.named_parameters())
    for name, param in model.named_parameters():
        alike = torch.allclose if engines.OLD else torch.equal  # 0.16.9 takes an Adam of its own
        assert alike(named[name], param), name
        state = training.optimizer.state[named[name]]
        assert float(state["step"]) == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            exact, ours = plain.state[param][key], training.optimizer.moment(named[name], key)
            assert float((exact - ours).abs().max()) <= 0.15 * float(exact.abs().max()), (name, key)
    shard4bit.save(tmp_path / "canonical", training.model, training.optimizer, step=training.step)
    digest = shard4bit.digest(training.model, training.optimizer)
    assert pool(3).run(reads, str(tmp_path / "canonical")) == [digest] * 3
    assert set(named) == set(SHAPES) and np.isfinite(named["odd"].detach().numpy()).all()


@pytest.mark.slow
def test_universal_of_bf16_with_groups(tmp_path: Path) -> None:
    """Weights are the fp32 masters; every parameter has its own group's options and moments."""
    from shard4bit.deepspeed.convert import read_universal

    universal(tmp_path, "bf16", groups=True)
    training = read_universal(tmp_path / "there", quantize=False)
    model: Any = Known()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.bfloat16())
    plain = torch.optim.AdamW(vectors_apart(model), **ADAMW)
    for step in range(1, STEPS + 1):
        for name, param in model.named_parameters():
            param.grad = models.gradient(name, tuple(param.shape), step).bfloat16().float()
        plain.step()
    named = {param: name for name, param in model.named_parameters()}
    theirs = {param: name for name, param in training.model.named_parameters()}
    for group, ours in zip(plain.param_groups, training.optimizer.param_groups, strict=True):
        assert [named[p] for p in group["params"]] == [theirs[p] for p in ours["params"]]
        for key in ("lr", "betas", "eps", "weight_decay"):
            assert group[key] == ours[key]
        for exact, param in zip(group["params"], ours["params"], strict=True):
            alike = torch.allclose if engines.OLD else torch.equal  # 0.16.9 takes an Adam of its own
            assert alike(param, exact), named[exact]
            for key in ("exp_avg", "exp_avg_sq"):
                assert alike(training.optimizer.moment(param, key), plain.state[exact][key]), (
                    named[exact],
                    key,
                )


def reads(root: str) -> str:
    engine = blank(stage=2, kind="block")
    shard4bit.load(root, engine)
    return shard4bit.digest(engine)

"""Planned bytes beside those of real tensors, and models from configs."""

from __future__ import annotations

import json
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from shard4bit.cli.main import main
from shard4bit.cli.memory import capacity, largest
from shard4bit.cli.models import Model, Param, from_config, of_size
from shard4bit.cli.plan import OPTIMIZERS, usage
from shard4bit.cli.shards import ENGINES, Setup, held
from shard4bit.cli.tables import UsageError
from tests.cli.helpers import CONFIG, measured, module_of, on_fsdp1, on_fsdp2, optimizer_of, saved
from tests.pool import pool

QUANTIZED = {name: moments for name, moments in OPTIMIZERS.items() if moments is not None}


def config(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, **keys}))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return from_config(config(tmp_path_factory.mktemp("config")))


# ---- measured ---------------------------------------------------------------------------------------


def close(planned: Any, found: dict[str, int]) -> None:
    for what, value in found.items():
        assert abs(getattr(planned, what) / value - 1) < 0.03, (what, getattr(planned, what), value)


def fullest(ranks: list[list[dict[str, int]]], index: int) -> dict[str, int]:
    return {what: max(rank[index][what] for rank in ranks) for what in ranks[0][index]}


ONE = [("fp32", name) for name in OPTIMIZERS] + [("bf16", "AdamW4bit, rank1")]


@pytest.mark.parametrize(("dtype", "name"), ONE)
def test_one_process(model: Model, dtype: str, name: str) -> None:
    """To the byte."""
    module = module_of(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    found = measured(module, optimizer_of(module.parameters(), OPTIMIZERS[name]))
    planned = usage(model, Setup("single", param=dtype), OPTIMIZERS[name])
    assert found == {what: getattr(planned, what) for what in found}


def transient(optimizer: torch.optim.Optimizer) -> int:
    """The most that a step allocates, of CPU memory, on top of what is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        optimizer.step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(accumulate(sizes))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("AdamW, fp32 states", "fp32"), ("AdamW, 8-bit states", "fp32"), ("AdamW, 8-bit states", "bf16")],
)
def test_peak_of_a_step(model: Model, name: str, dtype: str) -> None:
    """Where the CPU goes the way of GPUs: torch's foreach steps, and the torch reference."""
    module = module_of(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    moments = OPTIMIZERS[name]
    optimizer = optimizer_of(module.parameters(), moments)
    optimizer.param_groups[0].update({"foreach": True} if moments is None else {})
    found = sum(measured(module, optimizer).values()) + transient(optimizer)
    planned = usage(model, Setup("single", param=dtype), moments)
    assert abs((planned.step - planned.rounding) / found - 1) < 0.03, (planned.step, found)


def test_two_ranks_of_fsdp2(model: Model) -> None:
    """To the byte, on the rank that holds most."""
    ranks = pool(2).run(on_fsdp2, model, list(OPTIMIZERS.values()))
    for number, moments in enumerate(OPTIMIZERS.values()):
        planned = usage(model, Setup("fsdp2", 2, param="bf16", master="fp32"), moments)
        found = fullest(ranks, number)
        assert found == {what: getattr(planned, what) for what in found}


def test_two_ranks_of_fsdp1(model: Model) -> None:
    """To the byte, but for the padding of flat parameters."""
    ranks = pool(2).run(on_fsdp1, model, list(QUANTIZED.values()))
    for number, moments in enumerate(QUANTIZED.values()):
        planned = usage(model, Setup("fsdp1", 2, param="fp32", master="fp32"), moments)
        found = fullest(ranks, number)
        close(planned, found)
        assert found["moments"] == planned.moments


def test_frozen_parameters_have_neither_gradient_nor_state() -> None:
    params = (Param("a.weight", (128, 256)), Param("b.weight", (300, 256), trainable=False))
    base = Model("", params)
    module = module_of(base)
    optimizer = optimizer_of([p for p in module.parameters() if p.requires_grad], ("B128/DE", "rank1"))
    planned = usage(base, Setup("single"), ("B128/DE", "rank1"))
    found = measured(module, optimizer)
    assert (planned.weights, planned.moments) == (found["weights"], found["moments"])
    assert planned.gradients == 4 * 128 * 256


# ---- layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fsdp1", "zero1", "zero2"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_runs_cover_every_element_once(model: Model, engine: str, world: int) -> None:
    ranks = held(model, Setup(engine, world, param="bf16", master="fp32"))
    total = sum(times * piece.slab.numel for rank in ranks for piece, times in rank.pieces)
    assert len(ranks) == world and total == model.numel
    for rank in ranks:
        assert rank.elements * world >= model.numel > (rank.elements - 64) * world - 64


def test_the_formulas_in_numbers() -> None:
    """7 B parameters of ZeRO-2 on 8 ranks: 2 bytes a parameter, and 4 + 2 + states over 8."""
    big = of_size(7e9)
    n = big.numel
    plan = usage(big, Setup("zero2", 8, param="bf16", master="fp32"), None)
    assert plan.weights == 2 * n
    for found, each in ((plan.master, 4), (plan.gradients, 2), (plan.moments, 8)):
        assert abs(found / (each * n / 8) - 1) < 1e-6
    tensors = plan.weights + plan.master + plan.moments + plan.gradients
    assert plan.backward - plan.rounding == tensors + 2 * 500_000_000
    ddp = usage(big, Setup("ddp", 8), None)
    assert (ddp.weights, ddp.gradients, ddp.moments, ddp.master) == (4 * n, 4 * n, 8 * n, 0)
    assert ddp.backward - ddp.rounding == 20 * n  # with the buckets


def test_column_maxima_are_replicated(model: Model) -> None:
    """On many ranks a rank's states are not a share of the whole."""
    alone = usage(model, Setup("fsdp2", 1), OPTIMIZERS["AdamW4bit, rank1"]).moments
    sixteen = usage(model, Setup("fsdp2", 16), OPTIMIZERS["AdamW4bit, rank1"]).moments
    assert sixteen > 1.1 * alone / 16


def test_the_largest_model_fits_and_a_larger_one_does_not() -> None:
    for engine, world in (("single", 1), ("fsdp2", 8), ("zero1", 4)):
        setup = Setup(engine, world, master=None if engine == "single" else "fp32")
        for moments in OPTIMIZERS.values():
            found = largest(setup, 10**10, moments)
            assert found is not None and usage(found, setup, moments).peak <= 10**10
            assert usage(of_size(1.02 * found.numel), setup, moments).peak > 10**10
    assert largest(Setup("single"), 10**6, None) is None


@pytest.mark.parametrize("target", [1e6, 3e6, 4.2e7, 1.1e9, 7e9, 3.3e11])
def test_models_of_a_size(target: float) -> None:
    assert abs(of_size(target).numel / target - 1) < 0.005


# ---- configs ----------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
#: what the models' own pages and libraries count
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "GPT-2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "Llama 2 7B": ({**LLAMA, "num_attention_heads": 32, "vocab_size": 32000}, 6_738_415_616),
    "Mistral 7B": (
        {
            **{**LLAMA, "model_type": "mistral", "intermediate_size": 14336, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "vocab_size": 32000},
        },
        7_241_732_096,
    ),
    "Qwen2 0.5B": (
        {
            **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "vocab_size": 151936},
            **{"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Gemma 2B": (
        {
            **{"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "head_dim": 256},
            **{"num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1},
            "vocab_size": 256000,
        },
        2_506_172_416,
    ),
    "Gemma 2 2B": (
        {
            **{"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256},
            **{"num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4},
            "vocab_size": 256000,
        },
        2_614_341_888,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str, tmp_path: Path) -> None:
    keys, numel = PUBLISHED[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(keys))
    found = from_config(path)
    assert found.numel == numel
    layers = keys.get("num_hidden_layers", keys.get("n_layer"))
    assert len(found.units) == layers + 1
    assert sum(prod(p.shape) for unit in found.units for p in unit) == numel


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "model_type None; known are gpt2, llama"),
        ('{"model_type": "bert"}', "model_type 'bert'; known are"),
        (
            '{"model_type": "llama", "hidden_size": 64}',
            "lacks 'intermediate_size', which a llama config needs",
        ),
        (json.dumps({**CONFIG, "hidden_size": -3}), "would have shape"),
        (json.dumps({**CONFIG, "num_attention_heads": 0}), "not a usable qwen2 config"),
        (json.dumps({**CONFIG, "hidden_size": "big"}), "not a usable qwen2 config"),
        (json.dumps({**CONFIG, "num_experts": 8}), "mixture of experts"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_bad_configs(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        from_config(path)


# ---- the command ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_command(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, world = config(tmp_path), 1 if engine == "single" else 4
    common = ["memory", str(path), "--engine", engine, "--world-size", str(world)]
    assert main(common) == 0
    text = capsys.readouterr().out
    assert "qwen2 (config.json): 459.01 k parameters" in text and "Not counted: activations" in text
    for name in OPTIMIZERS:
        assert name in text
    assert main([*common, "--json", "--card", "100MB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["parameters"] == from_config(path).numel
    figures = found["bytes"]["AdamW4bit, rank1"]
    assert figures["peak"] == max(figures[k] for k in ("backward", "step", "save"))
    assert found["largest"]["AdamW4bit, rank1"] > found["largest"]["AdamW, fp32 states"] or "zero" in engine


def test_a_checkpoint_as_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path)
    assert main(["memory", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    elements = 67 * 301 + 20 * 12 * 25 + 150 + 70 * 70 + 80 * 64 + 1
    assert found["model"]["parameters"] == elements
    assert found["bytes"]["AdamW, fp32 states"]["moments"] == 8 * (elements - 70 * 70 - 1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a config.json, a checkpoint, --params"),
        (["--params", "7e9", "--world-size", "0"], "--world-size 0: expected at least 1"),
        (["--params", "7e9", "--world-size", "2"], "single is one process"),
        (["--params", "12"], "expected a number from 1e6"),
        (["--params", "seven"], "invalid number value"),
        (["--params", "nan"], "invalid number value"),
        (["--params", "7e9", "config.json"], "give either"),
        (["nowhere"], "no such file or directory"),
        (["--params", "7e9", "--grad-dtype", "bf16"], "torch keeps gradients in the dtype of the parameter"),
        (["--params", "7e9", "--engine", "zero1", "--master-dtype", "none"], "ZeRO keeps master weights"),
        (["--card", "big"], "expected bytes, such as 80GB"),
        (["--params", "7e9", "--engine", "zero3"], "invalid choice"),
    ],
)
def test_bad_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_capacities() -> None:
    assert capacity("80GB") == 80 * 10**9
    assert capacity("80 GiB") == 80 * 2**30
    assert capacity("1e9") == 10**9 == capacity("1000mb")

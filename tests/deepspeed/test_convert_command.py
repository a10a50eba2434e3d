"""``python -m shard4bit convert`` on DeepSpeed's checkpoints, from a training to the engine that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.cli.formats import canonical
from shard4bit.cli.main import main
from tests.deepspeed import engines
from tests.deepspeed.engines import Known, config, engine_of, entry, needs_deepspeed
from tests.deepspeed.test_convert_zero import PLAIN, STEPS, Mixed, universal
from tests.deepspeed.test_training_zero import by_dimensions
from tests.fsdp import models
from tests.pool import pool

pytestmark = needs_deepspeed
ROOT = Path(__file__).resolve().parents[2]


class Tied(Mixed):
    """With a parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = torch.nn.Linear(70, 80, bias=False)
        self.outer.weight = self.inner.weight


def engine(options: dict[str, Any], own: dict[str, Any]) -> Any:
    settings = config(**{key: value for key, value in options.items() if key != "groups"})
    settings["optimizer"] = entry(options.get("kind", "rank1"), **own)
    model = Tied()
    return engine_of(
        model, settings, **({"model_parameters": by_dimensions(model)} if "groups" in options else {})
    )


def trained(root: str, options: dict[str, Any], own: dict[str, Any], client: Any = None) -> Any:
    """DeepSpeed's and shard4bit's checkpoints of one run; its digest and dequantized states."""
    made = engine(options, own)
    engines.train(made, STEPS)
    with engines.quiet():
        made.save_checkpoint(f"{root}/native", tag="here", client_state=client or {})
    shard4bit.save(f"{root}/ours", made, step=STEPS)
    names = ("momentum_buffer",) if options.get("kind") == "sgd" else ("exp_avg", "exp_avg_sq")
    moments = {
        f"{name}/{key}": shard4bit.deepspeed.full_moment(made, name, key).numpy()
        for name in sorted(b.placed.name for b in made.basic_optimizer.bind())
        for key in names
    }
    return shard4bit.digest(made), moments


def resumed(root: str, options: dict[str, Any], own: dict[str, Any]) -> Any:
    made = engine(options, own)
    found = shard4bit.load(root, made)
    return shard4bit.digest(made), found.step


def convert(*argv: object) -> None:
    assert main(["convert", *map(str, argv)]) == 0


def same_packages(a: Path, b: Path) -> None:
    """Equal tensors, specs, counts of steps and options by group."""
    one, two = canonical.read(str(a)), canonical.read(str(b))
    assert [e.name for e in one.entries] == [e.name for e in two.entries] and one.step == two.step
    for x, y in zip(one.entries, two.entries, strict=True):
        assert (x.shape, x.dtype, x.step, set(x.moments)) == (y.shape, y.dtype, y.step, set(y.moments)), (
            x.name
        )
        assert x.value is not None and y.value is not None and torch.equal(x.value(), y.value()), x.name
        for key, stored in x.moments.items():
            assert stored.spec == y.moments[key].spec
            ours, theirs = stored.load().tensors, y.moments[key].load().tensors
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), x.name
    groups = [{frozenset(g["parameters"]): g["options"] for g in p.groups} for p in (one, two)]
    assert groups[0] == groups[1]


CASES: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"stage": 2}, {"no_decay": ["bias", "inner.bias"], "quantize_exclude": ["odd"]}),
    (3, {"stage": 1, "kind": "block", "zero": {"round_robin_gradients": True}}, {}),
    (3, {"stage": 1, "precision": "bf16+fp32", "kind": "factored"}, {}),  # BF16_Optimizer
    (2, {"stage": 0}, {"no_decay": ["bias"], "quantize_exclude": ["odd"]}),
    (2, {"stage": 0, "precision": "fp16", "kind": "sgd"}, {}),
    (2, {"stage": 2, "groups": True}, {}),
    (2, {"stage": 0, "groups": True}, {"no_decay": ["odd"]}),
]
SLOW: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (world, {"stage": stage, "kind": kind, "precision": how, "zero": {"round_robin_gradients": robin}}, {})
    for stage, kind, how, robin in [
        (1, "rank1", "fp32", True), (1, "sgd", "bf16+fp32", False), (2, "rank1", "bf16", True),
        (2, "factored", "fp16", False), (0, "rank1", "fp32", False),
    ]
    for world in (1, 2, 3)
]  # fmt: skip


@pytest.mark.parametrize(
    "world, options, own", [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)], ids=str
)
def test_native_to_canonical(
    world: int, options: dict[str, Any], own: dict[str, Any], tmp_path: Path
) -> None:
    """It is what ``shard4bit.save`` of the same engine writes, and engines on other ranks load it."""
    engines.needs(options)
    digest = pool(world).run(trained, str(tmp_path), options, own)[0][0]
    convert(tmp_path / "native", tmp_path / "out", "--to", "canonical")
    same_packages(tmp_path / "out", tmp_path / "ours")
    other = {**options, "stage": {0: 2, 1: 0, 2: 1}[options["stage"]]}
    if options.get("precision") == "bf16+fp32":
        other = {**options, "stage": 1}  # DeepSpeed has it there alone
    if engines.OLD and options.get("precision") == "fp16":
        other = options  # its frozen parameters are in fp32 at stage 0, in fp16 at others
    for found in pool({1: 4, 2: 3, 3: 2}[world]).run(resumed, str(tmp_path / "out"), other, own):
        assert found == (digest, STEPS)


@pytest.mark.slow
def test_in_a_pipe(tmp_path: Path) -> None:
    """One line on stdout, and on stderr what is left behind; nothing of DeepSpeed's own talk."""
    pool(2).run(trained, str(tmp_path), {"stage": 2}, {}, {"epoch": 5})
    command = [sys.executable, "-m", "shard4bit", "convert"]
    argv = [str(tmp_path / "native" / "here"), str(tmp_path / "out"), "--to", "canonical", "--step", "7"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, *argv], capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert line.startswith("wrote ") and line.endswith(
        "12 tensors, 10 with states (B128/DE, Rank-1/Linear, fp32), step 7"
    )
    assert done.stderr == "left out, since only DeepSpeed's files hold it: epoch\n"
    code = (
        "import sys; sys.modules['deepspeed'] = None; from shard4bit.cli.main import main; sys.exit(main())"
    )
    for source, target, status, words in [
        (tmp_path / "native", "no", 2, 'pip install "shard4bit[deepspeed]"'),
        (tmp_path / "out", "yes", 0, ""),
    ]:
        argv = ["convert", str(source), str(tmp_path / target), "--to", "canonical"]
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=env, timeout=200
        )
        assert done.returncode == status and words in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == (status == 2)


# ---- universal checkpoints ----------------------------------------------------------------------------


def goes_on(root: str, options: dict[str, Any]) -> Any:
    """DeepSpeed's AdamW from a universal checkpoint: its moments, and its weights after another step."""
    settings = {**config(**options), "optimizer": PLAIN, "checkpoint": {"load_universal": True}}
    made = engine_of(Mixed(), settings)
    with engines.quiet():
        made.load_checkpoint(root)
    moments = whole(made, "exp_avg"), whole(made, "exp_avg_sq")
    made.backward(made(STEPS + 1))
    made.step()
    wrapper = made.optimizer
    masters = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
    return made.global_steps, moments, masters[0].detach().float().numpy().copy()


def whole(made: Any, key: str) -> np.ndarray:
    """This rank's flat partition of a moment."""
    [state] = made.optimizer.optimizer.state.values()
    return state[key].detach().numpy().copy()


UNIVERSAL: list[tuple[int, int, dict[str, Any], dict[str, Any]]] = [
    (3, 2, {"stage": 1, "kind": "block", "zero": {"round_robin_gradients": True}}, {"stage": 2}),
    (3, 2, {"stage": 1, "precision": "bf16+fp32"}, {"stage": 1, "precision": "bf16+fp32"}),
    (3, 2, {"stage": 0}, {"stage": 1}),
]


@pytest.mark.parametrize("first, second, options, other", UNIVERSAL, ids=str)
def test_native_to_universal(
    first: int,
    second: int,
    options: dict[str, Any],
    other: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its moments are the dequantized ones, bit for bit; DeepSpeed's AdamW goes on with them."""
    own = {"no_decay": ["bias"], "quantize_exclude": ["odd"]} if options["stage"] == 0 else {}
    moments = pool(first).run(trained, str(tmp_path), options, own)[0][1]
    (tmp_path / "universal").mkdir()
    convert(tmp_path / "native", tmp_path / "universal" / "there", "--to", "universal")
    left = capsys.readouterr().err
    assert left.startswith("left out: weight_decay of single parameters") if own else left == ""
    assert (tmp_path / "universal" / "latest_universal").read_text() == "there"
    zero = tmp_path / "universal" / "there" / "zero"

    def read(name: str, key: str) -> torch.Tensor:
        return torch.load(zero / name / f"{key}.pt", weights_only=True)["param"]

    for key, expected in moments.items():
        found = read(*key.split("/")).numpy()
        assert (found.shape, found.dtype, found.tobytes()) == (
            expected.shape, expected.dtype, expected.tobytes()
        ), key  # fmt: skip
    results = pool(second).run(goes_on, str(tmp_path / "universal"), other)
    assert {steps for steps, _, _ in results} == {STEPS + 1}
    names = [n for n, p in Mixed().named_parameters() if p.requires_grad]
    for number, key in enumerate(("exp_avg", "exp_avg_sq")):
        flat = np.concatenate([found[number] for _, found, _ in results])
        expected = np.concatenate([moments[f"{n}/{key}"].ravel() for n in names])
        assert np.array_equal(flat[: expected.size], expected), key
    params = [torch.nn.Parameter(read(n, "fp32")) for n in names]
    theirs = torch.optim.AdamW(params, **models.ADAMW)
    dtype = engines.rounded(other.get("precision", "fp32"))
    for name, param in zip(names, params, strict=True):
        param.grad = models.gradient(name, tuple(param.shape), STEPS + 1).to(dtype).float()
        theirs.state[param] = {
            "step": torch.tensor(float(STEPS)),
            **{key: read(name, key) for key in ("exp_avg", "exp_avg_sq")},
        }
    theirs.step()
    flat = np.concatenate([masters for _, _, masters in results])
    expected = np.concatenate([p.detach().numpy().ravel() for p in params])
    assert np.allclose(flat[: expected.size], expected, rtol=1e-5, atol=1e-7)


def test_momentum_to_universal(tmp_path: Path) -> None:
    """Of SGD: weights and dequantized momentum, bit for bit."""
    moments = pool(2).run(trained, str(tmp_path), {"stage": 1, "kind": "sgd"}, {})[0][1]
    convert(tmp_path / "native", tmp_path / "universal", "--to", "universal")
    weights = {e.name: e.value for e in canonical.read(str(tmp_path / "ours")).entries}
    for key, expected in moments.items():
        name = key.split("/")[0]
        place = tmp_path / "universal" / "zero" / name
        found = torch.load(place / "momentum_buffer.pt", weights_only=True)["param"]
        assert found.numpy().tobytes() == expected.tobytes() and found.shape == expected.shape, key
        assert torch.equal(torch.load(place / "fp32.pt", weights_only=True)["param"], weights[name]()), name
        assert not (place / "exp_avg.pt").exists()


def takes(root: str, kind: str) -> Any:
    """An engine of ours that takes AdamW's training over, and goes on."""
    made = engine_of(Known(), config(2, kind))
    found = shard4bit.load(root, made)
    digest = shard4bit.digest(made)
    engines.train(made, 1, STEPS + 1)
    return digest, found.step, engines.parts(made)


@pytest.mark.parametrize("kind", ["rank1", pytest.param("block", marks=pytest.mark.slow)])
def test_universal_to_canonical(kind: str, tmp_path: Path) -> None:
    """AdamW's moments, quantized once, are those of ``import_state``."""
    universal(tmp_path)
    convert(tmp_path / "there", tmp_path / "out", "--to", "canonical", "--second-moment", kind)
    model: Any = Known()
    ours = models.optimizer_of(kind, model.parameters())
    states = {}
    for number, (name, param) in enumerate(model.named_parameters()):
        saved = {
            key: torch.load(tmp_path / "there" / "zero" / name / f"{key}.pt", weights_only=True)["param"]
            for key in ("fp32", "exp_avg", "exp_avg_sq")
        }
        with torch.no_grad():
            param.copy_(saved.pop("fp32").view(param.shape))
        shaped = {key: value.view(param.shape) for key, value in saved.items()}
        states[number] = {**shaped, "step": torch.tensor(float(STEPS))}
    groups = [{"params": list(states), "betas": (0.9, 0.95)}]
    shard4bit.import_state(ours, {"state": states, "param_groups": groups}, hyperparameters=False)
    digest = shard4bit.digest(model, ours)
    models.train(model, ours, 1, STEPS + 1)
    results = pool(2).run(takes, str(tmp_path / "out"), kind)
    assert [found[:2] for found in results] == [(digest, STEPS)] * 2
    engines.same(engines.whole([parts for *_, parts in results]), models.canonical(model, ours), kind)

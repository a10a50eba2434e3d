"""import_state and export_state in one process: bits against the oracle, real torchao and bitsandbytes
states, options, and what is refused."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors import safe_open
from torch import Tensor, nn

import shard4bit
from shard4bit.layout import Slab
from shard4bit.optim.encode import encode
from shard4bit.optim.foreign import read
from shard4bit.spec import parse_spec
from shard4bit.state import parts
from tests import oracle
from tests.optim.helpers import assert_same, model_of, normal, run, snapshot
from tests.optim.torchao_like import LikeTorchao
from tests.simulate import Rank, assemble, in_threads, take
from tests.test_invariance import QUICK, bits, cut, gradient, problems
from tests.test_oracle_agreement import same_bits

FIXTURE = Path(__file__).parents[1] / "golden" / "foreign.safetensors"
SHAPES = ((90, 70), (5, 1300), (16, 12, 5, 5), (301,), (6, 16, 100))
SPECS: dict[str, Any] = {
    "rank1": oracle.Spec(norm="rank1", mapping="linear"),
    "block": oracle.Spec(norm="block", mapping="linear"),
    "Rank-1/DE-0": oracle.Spec(norm="rank1", mapping="de0"),
    "B2048/DE/8": oracle.Spec(norm="block", mapping="de", bits=8, block=2048),
    "Tensor/Linear": oracle.Spec(norm="tensor", mapping="linear"),
    "fp32": None,
    "factored": "factored",
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(normal(s, 9, i).to(dtype)) for i, s in enumerate(SHAPES)]


def trained(make: Any = torch.optim.AdamW, steps: int = 3, **options: Any) -> tuple[list[Any], Any]:
    params = parameters()
    source = make(params, **options)
    run(params, source, range(steps))
    return params, source


# ---- bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", SPECS)
def test_adamw_gives_the_codes_of_the_oracle(second: str) -> None:
    params, source = trained(lr=1e-2)
    ours = shard4bit.AdamW4bit(params, second_moment=second)
    before = [p.detach().clone() for p in params]
    shard4bit.import_state(ours, source)
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)
        big = oracle.is_quantized(tuple(param.shape))
        matrix = oracle.matrix_shape(tuple(param.shape))
        m, v = (source.state[param][k].numpy().reshape(matrix) for k in ("exp_avg", "exp_avg_sq"))
        expected: dict[str, Any] = {}
        first = oracle.Spec(norm="block", mapping="de", signed=True)
        oracle.store_moment(expected, "exp_avg", m, first if big else None)
        if second == "factored" and big:
            expected["exp_avg_sq_row_mean"] = np.array([oracle.mean32(row) for row in v])
            expected["exp_avg_sq_col_mean"] = np.array([oracle.mean32(col) for col in v.T])
            expected["exp_avg_sq_mean"] = oracle.mean32(v)
        else:
            oracle.store_moment(expected, "exp_avg_sq", v, SPECS[second] if big else None)
        state = {k: t.numpy() for k, t in ours.state[param].items()}
        assert state.pop("step") == 3
        assert set(state) == set(expected)
        for key, want in expected.items():
            assert same_bits(state[key], np.asarray(want)), (second, tuple(param.shape), key)


@pytest.mark.parametrize("buffer", ["B128/DE", "B2048/DE/8", "fp32"])
def test_sgd_gives_the_codes_of_the_oracle(buffer: str) -> None:
    params, source = trained(torch.optim.SGD, lr=0.1, momentum=0.8, weight_decay=0.01)
    ours = shard4bit.SGD4bit(params, momentum_buffer=buffer)
    shard4bit.import_state(ours, source)
    spec = {"B128/DE": (128, 4), "B2048/DE/8": (2048, 8)}.get(buffer)
    for param in params:
        matrix = oracle.matrix_shape(tuple(param.shape))
        values = source.state[param]["momentum_buffer"].numpy().reshape(matrix)
        expected: dict[str, Any] = {}
        big = oracle.is_quantized(tuple(param.shape)) and spec
        how = oracle.Spec(block=spec[0], bits=spec[1], mapping="de", signed=True) if big and spec else None
        oracle.store_moment(expected, "momentum_buffer", values, how)
        for key, want in expected.items():
            assert same_bits(ours.state[param][key].numpy(), np.asarray(want)), key
        assert ours.state[param]["step"] == 1  # the buffer has begun: no first step any more
    assert (ours.param_groups[0]["momentum"], ours.param_groups[0]["weight_decay"]) == (0.8, 0.01)


ENCODED = [("B128/DE", True), ("rank1", False), ("B7/DE-0", False), ("Tensor/DE", True), ("B2048/DE/8", True)]


@pytest.mark.parametrize("name, signed", [*ENCODED, ("factored", False)])
@QUICK
@given(problem=problems())
def test_any_cut_is_encoded_as_the_whole(name: str, signed: bool, problem: dict[str, Any]) -> None:
    factored = name == "factored"
    values = gradient({**problem, "special": None} if factored else problem, 3).float()
    values = values if signed else values.abs()
    shape, spec, cpu = problem["shape"], parse_spec(name, signed=signed, argument="x"), torch.device("cpu")
    whole = Rank.make(Slab.whole(shape), values, ("m",), [spec], [])
    pieces = cut(problem)
    ranks = [Rank.make(slab, values, ("m",), [spec], []) for slab, _ in pieces]
    encode(whole.moments[0], values.reshape(-1), (), cpu)
    in_threads(
        [
            partial(encode, r.moments[0], take(values, r.slab).reshape(-1), near, cpu)
            for r, (_, near) in zip(ranks, pieces, strict=True)
        ]
    )
    for part in parts(spec):
        expected = whole.moments[0].tensors[part.suffix]
        found = assemble(ranks, f"m_{part.suffix}").reshape(expected.shape)
        if factored:
            torch.testing.assert_close(found, expected, rtol=2.0**-23, atol=0)
        else:
            assert torch.equal(bits(found), bits(expected)), part.suffix


# ---- torchao and bitsandbytes -----------------------------------------------------------------------


def foreign_states(kind: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(parameter -> state, moment -> SHA-256 of the library's own dequantization), as real ones were."""
    states: dict[str, dict[str, Any]] = {}
    nested: dict[tuple[str, str], dict[str, Tensor]] = {}
    with safe_open(FIXTURE, "pt") as file:
        values = json.loads(file.metadata()["values"])
        for full in file.keys():  # noqa: SIM118
            of, name, key = full.split("/")
            if of != kind:
                continue
            if "." in key:
                nested.setdefault((name, key.split(".")[0]), {})[key.split(".")[1]] = file.get_tensor(full)
            else:
                states.setdefault(name, {})[key] = file.get_tensor(full)
    for (name, key), found in nested.items():
        states[name][key] = LikeTorchao(found, SHAPES_OF[name])
    return states, {k.removeprefix(f"{kind}/"): v for k, v in values.items() if k.startswith(f"{kind}/")}


SHAPES_OF = {"even": (48, 96), "odd": (65, 67), "bias": (7,)}
#: quantized moments in the fixture
KINDS = {"torchao4": 2, "torchao8": 2, "torchaofp8": 2, "bnb8": 4, "bnbsgd8": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_real_states_have_the_values_that_their_library_says(kind: str) -> None:
    states, digests = foreign_states(kind)
    assert len(digests) == KINDS[kind]
    names = ["momentum_buffer"] if "sgd" in kind else ["exp_avg", "exp_avg_sq"]
    params = {n: nn.Parameter(torch.ones(SHAPES_OF[n])) for n in states}
    make: Any = shard4bit.SGD4bit if "sgd" in kind else shard4bit.AdamW4bit
    ours = make(params.values(), quantize=False)  # keeps the values as they are
    group = {"params": list(range(len(states))), "lr": 0.5, "betas": [0.7, 0.8]}
    shard4bit.import_state(ours, {"state": dict(enumerate(states.values())), "param_groups": [group]})
    seen = 0
    for name, param in params.items():
        step, moments = read(states[name], names, name)
        assert step == 3 and ours.state[param]["step"] == 3
        for number, key in enumerate(names, 1):
            kept = ours.state[param][key]
            theirs = f"{name}/state{number}" if kind.startswith("bnb") else f"{name}/{key}"
            if theirs in digests:
                seen += 1
                assert hashlib.sha256(kept.numpy().tobytes()).hexdigest() == digests[theirs], theirs
            else:
                assert torch.equal(kept, moments[key].data)
    assert seen == KINDS[kind]
    assert ours.param_groups[0]["lr"] == 0.5
    assert ours.param_groups[0].get("momentum", 0.7) == 0.7


def test_the_wrapped_state_dict_of_bitsandbytes() -> None:
    """Its state_dict() hides the quantized tensors from FSDP in a dictionary of their own."""
    states, _ = foreign_states("bnb8")
    hidden = {k: v for k, v in states["odd"].items() if k != "step"}
    wrapped = {"step": 3, "__bnb_optimizer_quant_state__": hidden}
    results = []
    for state in (states["odd"], wrapped):
        ours = shard4bit.AdamW4bit([nn.Parameter(torch.ones(65, 67))])
        shard4bit.import_state(ours, {"state": {0: state}, "param_groups": [{"params": [0]}]})
        results.append(snapshot([], ours) | dict(next(iter(ours.state.values()))))
    assert_same(*results)


# ---- matching and options ---------------------------------------------------------------------------


def test_training_goes_on_as_it_would_have() -> None:
    """With fp32 moments nothing is lost: the very steps that torch would have done, up to rounding."""
    params, source = trained(lr=1e-2, weight_decay=0.2, betas=(0.8, 0.9))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    ours = shard4bit.AdamW4bit(others, quantize=False)
    shard4bit.import_state(ours, source.state_dict())
    back = torch.optim.AdamW(third := [nn.Parameter(p.detach().clone()) for p in params])
    back.load_state_dict(shard4bit.export_state(ours))
    assert back.param_groups[0]["lr"] == 1e-2 and back.param_groups[0]["betas"] == (0.8, 0.9)
    for optimizer, which in ((source, params), (ours, others), (back, third)):
        run(which, optimizer, range(3, 6))
    for a, b, c in zip(params, others, third, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_exported_state_has_our_moments() -> None:
    model = model_of()
    ours = shard4bit.AdamW4bit(model.parameters(), lr=0.3)
    run(model.parameters(), ours, range(2))
    found = shard4bit.export_state(ours)
    torchs = torch.optim.AdamW(model.parameters())
    assert set(found["param_groups"][0]) == set(torchs.state_dict()["param_groups"][0])
    for i, param in enumerate(model.parameters()):
        assert found["state"][i]["step"] == 2 and set(found["state"][i]) == {"step", "exp_avg", "exp_avg_sq"}
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(found["state"][i][name], ours.moment(param, name))


@pytest.mark.parametrize("momentum, steps", [(0.9, 2), (0.9, 0), (0.0, 2)])
def test_sgd_there_and_back(momentum: float, steps: int) -> None:
    params = parameters()
    ours = shard4bit.SGD4bit(params, lr=0.1, momentum=momentum, quantize=False, nesterov=momentum > 0)
    run(params, ours, range(steps))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    source = torch.optim.SGD(others)
    source.load_state_dict(shard4bit.export_state(ours))
    last = [nn.Parameter(p.detach().clone()) for p in params]
    again = shard4bit.SGD4bit(last, momentum=momentum, quantize=False)
    shard4bit.import_state(again, source.state_dict())
    for optimizer, which in ((ours, params), (source, others), (again, last)):
        run(which, optimizer, range(7, 9))
    for a, b, c in zip(params, others, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(a, c)


def test_a_parameter_without_a_state_starts_from_zeros() -> None:
    params, source = trained()
    del source.state[params[0]]
    ours = shard4bit.AdamW4bit(params)
    run(params, ours, range(2))
    shard4bit.import_state(ours, source)
    assert [float(ours.state[p]["step"]) for p in params] == [0, 3, 3, 3, 3]
    assert not ours.state[params[0]]["exp_avg_absmax"].any()
    assert not ours.state[params[0]]["exp_avg_codes"].any()


def test_names_match_parameters_in_another_order_and_other_groups() -> None:
    params = dict(zip("abcde", parameters(), strict=True))
    source = torch.optim.AdamW(params.items(), lr=0.5)
    run(params.values(), source, range(2))
    groups: Any = [
        {"params": [(n, params[n]) for n in "db"], "weight_decay": 0.0},
        {"params": [(n, params[n]) for n in "eca"]},
    ]
    ours = shard4bit.AdamW4bit(groups, lr=0.25, quantize=False)
    with pytest.raises(shard4bit.StateError, match="hyperparameters=False"):
        shard4bit.import_state(ours, source.state_dict())
    state = source.state_dict()
    named = {
        "state": {n: state["state"][i] for i, n in enumerate("abcde")}
    }  # as torch's DCP helpers name them
    named["param_groups"] = [{**state["param_groups"][0], "params": list("abcde")}]  # type: ignore[assignment]
    for given_source in (source, state, named):
        shard4bit.import_state(ours, given_source, hyperparameters=False)
        for param in params.values():
            assert torch.equal(ours.state[param]["exp_avg"], source.state[param]["exp_avg"])
    assert [g["lr"] for g in ours.param_groups] == [0.25, 0.25]
    unnamed = shard4bit.AdamW4bit(params.values())
    with pytest.raises(shard4bit.StateError, match="named_parameters"):
        shard4bit.import_state(unnamed, named)


def test_options_of_equal_groups_are_taken() -> None:
    params = parameters()

    def make(kind: Any, **more: Any) -> Any:
        groups: Any = [{"params": params[:2], "weight_decay": 0.0}, {"params": params[2:], "lr": 0.5}]
        return kind(groups, **more)

    source = make(torch.optim.AdamW, lr=0.125, eps=1e-6, maximize=True, betas=(0.5, 0.6))
    run(params, source, range(2))
    torch.optim.lr_scheduler.LambdaLR(source, lambda step: 0.5)
    shared = torch.tensor(0.9)
    ours = make(shard4bit.AdamW4bit)
    ours.param_groups[0]["lr"] = shared
    shard4bit.import_state(ours, source)
    first, second = ours.param_groups
    assert (first["lr"].item(), first["weight_decay"], first["initial_lr"]) == (0.0625, 0.0, 0.125)
    assert shared.item() == pytest.approx(0.9)
    assert (second["lr"], second["eps"], second["maximize"], second["betas"]) == (
        0.25,
        1e-6,
        True,
        (0.5, 0.6),
    )
    assert first["quantize"] is True and "amsgrad" not in first
    kept = make(shard4bit.AdamW4bit, lr=0.01)
    shard4bit.import_state(kept, source, hyperparameters=False)
    assert [g["lr"] for g in kept.param_groups] == [0.01, 0.5]


def test_memory_stays_flat() -> None:
    """No tensor is made that is larger than one parameter."""
    from tests.fsdp.recorder import Recorder

    params = [nn.Parameter(torch.ones(64, 100)) for _ in range(6)]
    source = torch.optim.AdamW(params)
    run(params, source, range(1))
    ours = shard4bit.AdamW4bit(params)
    ours.bind()
    with Recorder() as recorder:
        shard4bit.import_state(ours, source)
    assert recorder.created <= 6400 and recorder.calls == []


# ---- refused ----------------------------------------------------------------------------------------


def _edited(edit: Any) -> Any:
    def make() -> tuple[Any, Any]:
        params, source = trained()
        state = source.state_dict()
        edit(state)
        return shard4bit.AdamW4bit(params), state

    return make


def _drop(state: Any, key: str) -> None:
    del state["state"][0][key]


def _amsgrad() -> Any:
    params, source = trained(amsgrad=True)
    return shard4bit.AdamW4bit(params), source


def _adam() -> Any:
    params, source = trained(torch.optim.Adam, weight_decay=0.1)
    return shard4bit.AdamW4bit(params), source


def _wrong(make: Any, ours: Any) -> Any:
    def made() -> Any:
        params, source = trained(make)
        return ours(params), source

    return made


def _bnb_without_blocks() -> Any:
    states, _ = foreign_states("bnb8")
    del states["odd"]["absmax2"]
    state = {"state": {0: states["odd"]}, "param_groups": [{"params": [0]}]}
    return shard4bit.AdamW4bit([nn.Parameter(torch.ones(65, 67))]), state


def _ours(as_dict: bool) -> Any:
    def made() -> Any:
        params, source = trained(shard4bit.AdamW4bit)
        return shard4bit.AdamW4bit(params), source.state_dict() if as_dict else source

    return made


REFUSED: dict[str, tuple[Any, str]] = {
    "not an optimizer": (lambda: (shard4bit.AdamW4bit(parameters()), {"x": 1}), "expected an optimizer"),
    "a number": (lambda: (shard4bit.AdamW4bit(parameters()), 3), "int"),
    "other parameters": (lambda: (shard4bit.AdamW4bit(parameters()), trained()[1]), "state_dict"),
    "fewer groups": (_edited(lambda s: s.update(param_groups=[{"params": [0, 1]}])), "parameter groups of"),
    "no moment": (_edited(lambda s: _drop(s, "exp_avg_sq")), "exp_avg_sq"),
    "no step": (_edited(lambda s: _drop(s, "step")), "step is None"),
    "odd step": (_edited(lambda s: s["state"][0].update(step=0.5)), "step is 0.5"),
    "shape": (_edited(lambda s: s["state"][0].update(exp_avg=torch.ones(3))), r"shape \(3,\)"),
    "no tensor": (_edited(lambda s: s["state"][0].update(exp_avg=[1.0])), "list"),
    "negative": (_edited(lambda s: s["state"][1]["exp_avg_sq"].neg_()), "negative"),
    "bad option": (_edited(lambda s: s["param_groups"][0].update(eps=-1.0)), "eps=-1"),
    "amsgrad": (_amsgrad, "amsgrad"),
    "coupled decay": (_adam, "added to the gradient"),
    "sgd into adamw": (
        _wrong(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), shard4bit.AdamW4bit),
        "SGD4bit",
    ),
    "adamw into sgd": (_wrong(torch.optim.AdamW, shard4bit.SGD4bit), "AdamW4bit"),
    "bitsandbytes without blocks": (_bnb_without_blocks, "absmax2"),
    "ours": (_ours(False), "export_state"),
    "our state_dict": (_ours(True), "load_state_dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_changed(case: str) -> None:
    make, text = REFUSED[case]
    ours, source = make()
    params = [p for g in ours.param_groups for p in g["params"]]
    ours.bind()
    before = snapshot(params, ours)
    with pytest.raises(ValueError, match=text):
        shard4bit.import_state(ours, source)
    after = snapshot(params, ours)
    if case == "negative":  # is seen only when its turn comes
        before, after = ({k: v for k, v in s.items() if "state" not in k} for s in (before, after))
    assert_same(before, after)

"""Wrong hyper-parameters, group options and parameters: ValueErrors that say what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from shard4bit import AdamW4bit, QuantSpec, SGD4bit
from shard4bit.spec import Factored
from tests.optim.helpers import options

NAN, INF = float("nan"), float("inf")
NO_NUMBERS: list[Any] = ["1e-3", None, True, 1j, [0.1], torch.tensor([0.1, 0.2]), torch.tensor(1j)]
NO_BOOLEANS: list[Any] = [0, 1, None, "yes", torch.tensor(True)]
NO_SPECS: list[Any] = ["Rank-2/Linear", "", 4, None, ["B128/DE"], "B0/DE", "B128/DE/5"]

BAD: dict[Any, dict[str, list[Any]]] = {
    AdamW4bit: {
        "lr": [-1e-3, NAN, INF, torch.tensor(NAN), *NO_NUMBERS],
        "betas": [(0.9,), 0.9, None, "ab", (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), ("a", 0.9), (True, 0.9)]
        + [(0.9, 0.99, 0.999), (0.9, None)],
        "eps": [-1e-8, NAN, INF, *NO_NUMBERS],
        "weight_decay": [-0.1, NAN, INF, *NO_NUMBERS],
        "second_moment": [*NO_SPECS, QuantSpec(signed=True)],
        "first_moment": [*NO_SPECS, "rank1", "block", "factored", QuantSpec(signed=False), Factored()],
        "quantize": NO_BOOLEANS,
        "maximize": NO_BOOLEANS,
        "compensate": NO_BOOLEANS,
        "rounding": ["up", "", "Nearest", None, True, 1],
    },
    SGD4bit: {
        "lr": [-1e-3, NAN, INF, torch.tensor(-1.0), *NO_NUMBERS],
        "momentum": [-0.1, 1.5, NAN, INF, *NO_NUMBERS],
        "dampening": [-0.1, 1.5, NAN, INF, *NO_NUMBERS],
        "weight_decay": [-0.1, NAN, INF, *NO_NUMBERS],
        "nesterov": NO_BOOLEANS,
        "momentum_buffer": [*NO_SPECS, "rank1", QuantSpec(signed=False)],
        "quantize": NO_BOOLEANS,
        "maximize": NO_BOOLEANS,
        "compensate": NO_BOOLEANS,
    },
}
CASES = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}={value}".replace("\n", ""))
    for cls, values in BAD.items()
    for name, bad in values.items()
    for value in bad
]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3,)))


@pytest.mark.parametrize(("cls", "name", "value"), CASES)
def test_bad_values(cls: Any, name: str, value: Any) -> None:
    """As an argument, in a group, and in a group added later, which leaves the optimizer as it was."""
    ours = parameter()
    optimizer = cls([ours])
    before = [options(g) for g in optimizer.param_groups]
    for attempt in (
        lambda: cls([ours], **{name: value}),
        lambda: cls([{"params": [parameter()], name: value}]),
        lambda: optimizer.add_param_group({"params": [parameter()], name: value}),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        text = str(caught.value)
        bad_name = "block_size" if value == "B0/DE" else "bits" if value == "B128/DE/5" else name
        assert re.match(rf"{bad_name}(\[\d\])?=", text) and "expected" in text, text
    assert [options(g) for g in optimizer.param_groups] == before


@pytest.mark.parametrize("hyper", [{"momentum": 0.0}, {"dampening": 0.1}, {"momentum": 0, "dampening": 0.5}])
def test_nesterov_needs_momentum_without_dampening(hyper: dict[str, Any]) -> None:
    """As torch.optim.SGD."""
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
        torch.optim.SGD([parameter()], nesterov=True, **{"momentum": 0.9, **hyper})
    with pytest.raises(ValueError, match="nesterov=True with momentum=.*expected a positive momentum and no"):
        SGD4bit([parameter()], nesterov=True, **hyper)


def test_compensation_needs_an_error_that_ends() -> None:
    with pytest.raises(ValueError, match="compensate=True with a momentum of 1.0: .*expected momentum < 1"):
        SGD4bit([parameter()], momentum=1, compensate=True)
    param = parameter()
    optimizer = SGD4bit([param], compensate=True)
    optimizer.param_groups[0]["momentum"] = 1.0  # as a schedule may
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    with pytest.raises(ValueError, match="expected momentum < 1"):
        optimizer.step()
    assert torch.equal(param, before)


def test_good_values_at_the_ends_of_the_ranges() -> None:
    AdamW4bit([parameter()], lr=0, betas=[0.0, 0.0], eps=0, weight_decay=0)  # type: ignore[arg-type]
    AdamW4bit([parameter()], lr=torch.tensor([0.1]), eps=1e-30, second_moment=Factored())
    SGD4bit([parameter()], lr=1, momentum=1, dampening=1, weight_decay=3)
    SGD4bit([parameter()], momentum=0.5, nesterov=True)


MISSPELT = {
    AdamW4bit: {
        "weigth_decay": "weight_decay",
        "second_momnet": "second_moment",
        "quantise": "quantize",
        "maximise": "maximize",
        "beta": "betas",
        "learning_rate_lr": None,
    },
    SGD4bit: {"momentun": "momentum", "damping": "dampening", "nestrov": "nesterov", "my_note": None},
}


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
def test_misspelt_options(cls: Any) -> None:
    """In a group they are an error that names the option meant; other keys are the user's own."""
    for wrong, meant in MISSPELT[cls].items():
        group = {"params": [parameter()], wrong: 0.5}
        if meant is None:
            assert cls([group]).param_groups[0][wrong] == 0.5
            continue
        with pytest.raises(ValueError, match=f"unknown option '{wrong}' .* did you mean '{meant}'"):
            cls([group])
        optimizer = cls([parameter()])
        with pytest.raises(ValueError, match=wrong):
            optimizer.add_param_group({"params": [parameter()], wrong: 0.5})
        assert len(optimizer.param_groups) == 1
        with pytest.raises(TypeError, match=wrong):
            cls([parameter()], **{wrong: 0.5})


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64, torch.bool], ids=str)
def test_dtypes_of_parameters(cls: Any, dtype: torch.dtype) -> None:
    good, bad = parameter(), torch.zeros(4, 5, dtype=dtype)
    message = rf"shape \(4, 5\) has dtype {dtype}: expected float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=message):
        cls([good, bad])
    optimizer = cls([good])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [bad]})
    assert [g["params"] for g in optimizer.param_groups] == [[good]]


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
def test_what_torch_refuses(cls: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        cls(parameter())
    with pytest.raises(ValueError, match="non-leaf"):
        cls([parameter() * 2])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        cls([3.0])

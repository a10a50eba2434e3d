"""Steps that must fail: ValueErrors that say what arrived, and nothing changed by half."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shard4bit import AdamW4bit, SGD4bit, reference
from tests.optim.helpers import assert_same, fill_grads, normal, run, snapshot


def sparse(grad: Tensor) -> Tensor:
    return grad.to_sparse()


BAD_GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (
        sparse,
        r"parameter of shape \(70, 80\): a sparse gradient \(torch.sparse_coo\) .*sparse=False",
    ),
    "sparse csr": (lambda g: g.to_sparse_csr(), r"a sparse gradient \(torch.sparse_csr\)"),
    "complex": (lambda g: g.to(torch.complex64), "dtype torch.complex64, expected float32, bfloat16 or"),
    "float64": (lambda g: g.double(), "gradient of dtype torch.float64, expected float32"),
    "int64": (lambda g: g.long(), "gradient of dtype torch.int64, expected float32"),
    "device": (lambda g: g.to("meta"), "gradient on meta, parameter on cpu"),
    "shape": (lambda g: g[:3], r"gradient of shape \(3, 80\), parameter of \(70, 80\)"),
}


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_bad_gradients(kind: str, cls: Any) -> None:
    """Of the second parameter: the first and the third are not changed either."""
    spoil, message = BAD_GRADIENTS[kind]
    params = [nn.Parameter(normal((70, 80), i).clone()) for i in range(3)]
    optimizer = cls(params, weight_decay=0.1)
    run(params, optimizer, range(2))
    before = snapshot(params, optimizer)
    fill_grads(params, 5)
    bad = spoil(normal((70, 80), 6))
    bound = optimizer.bind()[1]
    kept = bound.placed
    # torch does not let such tensors become p.grad (sparse ones it does), so hand them in beneath it
    bound.placed = dataclasses.replace(kept, grad=lambda: bad, holder=None)
    optimizer._plans.clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert_same(snapshot(params, optimizer), before)
    bound.placed = kept
    optimizer._plans.clear()
    optimizer.step()
    assert not torch.equal(params[0], before["parameter 0"])


def test_a_sparse_embedding() -> None:
    """The way sparse gradients come about; torch's AdamW refuses them too."""
    embedding = nn.Embedding(100, 50, sparse=True)
    optimizer = AdamW4bit(embedding.parameters())
    embedding(torch.tensor([3, 4])).sum().backward()
    start = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"torch.nn.Embedding\(..., sparse=False\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="sparse"):
        torch.optim.AdamW(embedding.parameters()).step()
    assert torch.equal(embedding.weight, start)


@pytest.mark.parametrize("cls", [AdamW4bit, SGD4bit])
def test_an_error_in_the_middle_of_measuring(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with the second parameter, the first is as it was."""
    params = [nn.Parameter(normal((70, 80), i).clone()) for i in range(2)]
    spec = {"momentum_buffer": "Tensor/DE"} if cls is SGD4bit else {}
    optimizer = cls(params, **spec)
    run(params, optimizer, range(2))
    before = snapshot(params, optimizer)
    fill_grads(params, 5)
    measure, seen = reference._measure_window, []

    def fail_later(rule: Any, work: Any, *rest: Any) -> None:
        seen.append(work.param.data_ptr())
        if len(set(seen)) > 1:
            raise MemoryError("out of memory")
        measure(rule, work, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_measure_window", fail_later)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert set(seen) == {p.data_ptr() for p in params}
    assert_same(snapshot(params, optimizer), before)
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 3 for p in params)


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [(AdamW4bit, "betas", ("a", "b")), (AdamW4bit, "lr", None), (SGD4bit, "dampening", "much")],
)
def test_an_option_spoilt_by_hand(cls: Any, option: str, value: Any) -> None:
    params = [nn.Parameter(normal((70, 80), i).clone()) for i in range(2)]
    optimizer = cls([{"params": [p]} for p in params])
    run(params, optimizer, range(2))
    before = snapshot(params, optimizer)
    good = optimizer.param_groups[1][option]
    optimizer.param_groups[1][option] = value
    fill_grads(params, 5)
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    optimizer.param_groups[1][option] = good
    assert_same(snapshot(params, optimizer), before)


def test_momentum_switched_on_later() -> None:
    params = [nn.Parameter(normal((70, 80), i).clone()) for i in range(2)]
    optimizer = SGD4bit([{"params": [params[0]]}, {"params": [params[1]], "momentum": 0.0}])
    run(params, optimizer, range(2))
    optimizer.param_groups[1]["momentum"] = 0.9
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match=r"now need \['momentum_buffer'\].*build a new optimizer"):
        run(params, optimizer, [2])
    assert_same(snapshot(params, optimizer), before)


def test_moments_of_unknown_parameters_and_names() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW4bit([param])
    with pytest.raises(ValueError, match="no moment 'momentum_buffer'"):
        optimizer.moment(param, "momentum_buffer")
    with pytest.raises(ValueError, match="no moment 'exp_avg'"):
        optimizer.moment(nn.Parameter(torch.ones(3)), "exp_avg")


@pytest.mark.parametrize("late_first", [False, True])
def test_momentum_switched_on_before_the_first_step(late_first: bool) -> None:
    """Of two parameters of one group, one bound without a buffer and one thawed later."""
    early, late = (nn.Parameter(normal((70, 80), i).clone()) for i in range(2))
    late.requires_grad_(False)
    params = [late, early] if late_first else [early, late]
    optimizer = SGD4bit(params, momentum=0.0)
    optimizer.state_dict()  # binds
    optimizer.param_groups[0]["momentum"] = 0.9
    late.requires_grad_(True)
    with pytest.raises(ValueError, match=r"now need \['momentum_buffer'\]"):
        run(params, optimizer, [0])
    assert torch.equal(early, normal((70, 80), 0)) and torch.equal(late, normal((70, 80), 1))

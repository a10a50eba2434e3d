"""capturable=True on the CPU: the option, and that a state does not tell whether it was given."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import shard4bit
from shard4bit import AdamW4bit, SGD4bit
from shard4bit.optim.capture import Counts, rate
from shard4bit.reference import ReferenceBackend
from tests.optim.helpers import assert_same, fill_grads, model_of, run, snapshot

CLASSES = [AdamW4bit, SGD4bit]


def trained(cls: Any, steps: int = 3, **options: Any) -> tuple[Any, Any]:
    model = model_of()
    optimizer = cls(model.parameters(), **options)
    run(list(model.parameters()), optimizer, range(steps))
    return model, optimizer


def bits_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """Parameters, states and counts, without options."""
    found = snapshot(list(model.parameters()), optimizer)
    del found["options"]
    return found


# ---- steps ----


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("lr", [0.01, torch.tensor([0.01]), torch.tensor(0.01, dtype=torch.float64)], ids=str)
def test_steps_are_the_same(cls: Any, lr: Any) -> None:
    models = [trained(cls, lr=lr, capturable=capturable) for capturable in (False, True)]
    assert_same(bits_of(*models[0]), bits_of(*models[1]))


def test_an_lr_in_a_tensor_is_followed() -> None:
    lr = torch.tensor(0.0)
    model, optimizer = trained(AdamW4bit, lr=lr, weight_decay=0.1, capturable=True)
    assert torch.equal(model[0].weight, model_of()[0].weight)
    lr.fill_(0.1)
    optimizer.step()
    assert not torch.equal(model[0].weight, model_of()[0].weight)


# ---- the option ----


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("value", [0, 1, None, "yes", torch.tensor(True)])
def test_no_boolean(cls: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="capturable=.*expected True or False"):
        cls([nn.Parameter(torch.ones(3))], capturable=value)


def test_tensors_other_than_lr() -> None:
    param = nn.Parameter(torch.ones(3))
    tensor = torch.tensor(0.9)
    for cls, options in (
        (AdamW4bit, {"betas": (0.9, tensor)}),
        (AdamW4bit, {"eps": tensor}),
        (SGD4bit, {"momentum": tensor}),
        (SGD4bit, {"weight_decay": tensor}),
    ):
        cls([param], **options)
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*only lr may be a tensor"):
            cls([param], capturable=True, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_an_lr_of_another_dtype(dtype: torch.dtype) -> None:
    lr = torch.ones((), dtype=dtype)
    AdamW4bit([nn.Parameter(torch.ones(3))], lr=lr)
    with pytest.raises(
        ValueError, match=f"dtype {dtype} with capturable=True: expected a number, or a tensor"
    ):
        AdamW4bit([nn.Parameter(torch.ones(3))], lr=lr, capturable=True)


def test_an_lr_on_another_device() -> None:
    """On the host it may be read, if nothing is captured; elsewhere never."""
    cpu, there = torch.tensor(0.1, dtype=torch.float64), torch.device("meta")
    assert rate(cpu, there, capturing=False) == 0.1
    assert rate(0.1, there, capturing=True) == 0.1
    assert rate(cpu, cpu.device, capturing=True) is cpu
    for lr, device, capturing in ((cpu, there, True), (cpu.to(there), cpu.device, False)):
        with pytest.raises(ValueError, match=f"lr is a tensor on {lr.device}.*expected one on {device}"):
            rate(lr, device, capturing=capturing)


def test_groups_that_differ() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": params[:1], "capturable": True}, {"params": params[1:2]}]
    with pytest.raises(ValueError, match="capturable=False, the first one True"):
        AdamW4bit(groups)
    AdamW4bit([{**group, "capturable": True} for group in groups])
    optimizer = AdamW4bit(groups[:1])
    with pytest.raises(ValueError, match="capturable=False, the first one True"):
        optimizer.add_param_group({"params": params[2:]})
    assert len(optimizer.param_groups) == 1


def test_an_option_changed_later() -> None:
    """Before the first step it counts; afterwards the counts lie where they lie."""
    model = model_of()
    optimizer = AdamW4bit(model.parameters())
    optimizer.param_groups[0]["capturable"] = True
    run(list(model.parameters()), optimizer, range(1))
    before = bits_of(model, optimizer)
    optimizer.param_groups[0]["capturable"] = False
    with pytest.raises(ValueError, match="has capturable=False, the step counts were made with .*=True"):
        optimizer.step()
    assert_same(bits_of(model, optimizer), before)


# ---- devices ----


def bound_on(device: str) -> Any:
    held = torch.zeros(3, device=device)
    return SimpleNamespace(
        placed=SimpleNamespace(data=lambda: held), step=torch.tensor(5.0), work=SimpleNamespace()
    )


def test_where_the_counts_are() -> None:
    counts, bounds = Counts(), [bound_on("cpu"), bound_on("meta")]
    with pytest.raises(ValueError, match="parameters on cpu and meta: build one optimizer a device"):
        counts.gather(bounds, True)
    counts.gather(bounds, False)
    assert counts.vector.tolist() == [5.0, 5.0] and bounds[1].work.count is None
    counts.gather(bounds[1:], True)
    assert counts.vector.device.type == "meta" and bounds[1].work.count is bounds[1].step
    with pytest.raises(ValueError, match="capturable=True on meta needs the kernels"):
        counts.on_device(ReferenceBackend())


def test_a_capture_with_parameters_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be updated once, when the graph is made, and never again."""
    for capturable, message in ((True, "the parameters are on cpu"), (False, "capturable=True")):
        model, optimizer = trained(AdamW4bit, capturable=capturable)
        before = bits_of(model, optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            with pytest.raises(ValueError, match=f"captured in a CUDA graph, .*{message}"):
                optimizer.step()
        assert_same(bits_of(model, optimizer), before)


# ---- states and checkpoints ----


@pytest.mark.parametrize("cls", CLASSES)
def test_checkpoints_do_not_tell(cls: Any, tmp_path: Path) -> None:
    """The same bytes with and without, and each loads into the other."""
    roots = [tmp_path / "without", tmp_path / "with"]
    for capturable, root in enumerate(roots):
        model, optimizer = trained(cls, lr=0.01, capturable=bool(capturable))
        shard4bit.save(root, model, optimizer, step=3)
    files = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in roots]
    assert files[0] == files[1] and files[0]
    assert all((roots[0] / name).read_bytes() == (roots[1] / name).read_bytes() for name in files[0])
    for capturable, root in enumerate(reversed(roots)):
        model = model_of(1)
        optimizer = cls(model.parameters(), capturable=bool(capturable))
        shard4bit.load(root, model, optimizer)
        assert optimizer.param_groups[0]["capturable"] is bool(capturable)
        continues(model, optimizer, cls)


def continues(model: Any, optimizer: Any, cls: Any) -> None:
    """As a run of five steps that was never interrupted."""
    run(list(model.parameters()), optimizer, range(3, 5))
    expected, other = trained(cls, 5, lr=0.01)
    assert_same(bits_of(model, optimizer), bits_of(expected, other))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("capturable", [False, True])
def test_states_of_the_other_kind(cls: Any, capturable: bool) -> None:
    model, source = trained(cls, lr=0.01, capturable=not capturable)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    optimizer = cls(model.parameters(), capturable=capturable)
    optimizer.load_state_dict(torch.load(file))
    assert optimizer.param_groups[0]["capturable"] is capturable
    continues(model, optimizer, cls)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies(copied: Any) -> None:
    model, optimizer = copied(trained(AdamW4bit, lr=0.01, capturable=True))
    assert optimizer.param_groups[0]["capturable"] is True
    continues(model, optimizer, AdamW4bit)


def test_old_pickles() -> None:
    model, optimizer = trained(AdamW4bit, lr=0.01)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["capturable"]
    again = AdamW4bit.__new__(AdamW4bit)
    again.__setstate__(state)
    continues(model, again, AdamW4bit)


def test_exchange() -> None:
    """Another optimizer's option is its own."""
    model = model_of()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.05)
    fill_grads(model.parameters(), 0)
    theirs.step()
    ours = AdamW4bit(model.parameters(), capturable=True)
    shard4bit.import_state(ours, theirs)
    assert ours.param_groups[0]["capturable"] is True and ours.param_groups[0]["lr"] == 0.05
    assert {float(state["step"]) for state in ours.state.values()} == {1.0}
    exported = shard4bit.export_state(ours)
    assert exported["param_groups"][0]["capturable"] is False
    torch.optim.AdamW(model.parameters()).load_state_dict(exported)
    momentum = shard4bit.export_state(SGD4bit(model.parameters(), capturable=True))
    assert "capturable" not in momentum["param_groups"][0]


def test_report() -> None:
    model, optimizer = trained(AdamW4bit, capturable=True)
    fill_grads(model.parameters(), 9)
    expected, other = trained(AdamW4bit)
    fill_grads(expected.parameters(), 9)
    assert optimizer.report().as_json() == other.report().as_json()

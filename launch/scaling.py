"""The state of fp16's loss scaler in a form that every engine reads, torch's GradScalers and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

State = dict[str, Any]


def _neutral(state: Mapping[str, Any]) -> State | None:
    """scale; clean: steps since it last changed; hysteresis: DeepSpeed's. From this form, torch's or
    DeepSpeed's own, which earlier checkpoints have; None for what is none of them."""
    if "loss_scale" in state:
        return state["loss_scale"] and dict(state["loss_scale"])
    if "scale" in state:
        return {"scale": state["scale"], "clean": state.get("_growth_tracker", 0)}
    if "cur_scale" in state:
        clean = state.get("cur_iter", 0) - state.get("last_overflow_iter", -1) - 1
        return {"scale": state["cur_scale"], "clean": clean, "hysteresis": state.get("cur_hysteresis")}
    return None


def saved(own: Mapping[str, Any]) -> State:
    """What a checkpoint holds of a scaler: ``own`` is torch's state_dict, or the fields of DeepSpeed's."""
    return {"loss_scale": _neutral(own)}


def for_torch(state: Mapping[str, Any], scaler: Any) -> None:
    """Give what was saved to a GradScaler."""
    own, found = scaler.state_dict(), _neutral(state)
    if own and found is not None:
        clean = found.get("clean", 0) % own["growth_interval"]  # torch grows at equality, and never beyond
        scaler.load_state_dict({**own, "scale": float(found["scale"]), "_growth_tracker": clean})


def for_deepspeed(state: Mapping[str, Any], scaler: Any) -> None:
    """Give what was saved to DeepSpeed's loss scaler, where it is a dynamic one."""
    found = _neutral(state)
    if found is None or not hasattr(scaler, "last_overflow_iter"):
        return
    scaler.cur_scale = found["scale"]
    scaler.cur_iter = scaler.last_overflow_iter + 1 + found.get("clean", 0)  # only their distance counts
    if found.get("hysteresis") is not None:
        scaler.cur_hysteresis = found["hysteresis"]

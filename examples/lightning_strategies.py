"""Lightning's strategies as lightning_train.py needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

import shard4bit


class Fsdp1(FSDPStrategy):
    """FSDPStrategy, with shard4bit for models and optimizers: FSDP1's own format cannot hold packed states,
    and ModelCheckpoint would end with an error."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        folder = Path(self.broadcast(filepath))
        shard4bit.save(folder, self.model, self.optimizers[0], step=checkpoint["global_step"], rng=True)
        if self.global_rank == 0:
            torch.save(checkpoint, folder / "lightning.pt")  # loops, callbacks, schedulers

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        shard4bit.load(checkpoint_path, self.model, self.optimizers[0])
        return torch.load(Path(checkpoint_path) / "lightning.pt", weights_only=weights_only)


class Zero(DeepSpeedStrategy):
    """DeepSpeedStrategy, on the CPU too, which Lightning refuses."""

    def setup_environment(self) -> None:
        if torch.cuda.is_available():
            return super().setup_environment()
        self.parallel_devices = [
            torch.device("cpu", i) for i in range(self.num_processes)
        ]  # it asks for their numbers
        super(DeepSpeedStrategy, self).setup_environment()

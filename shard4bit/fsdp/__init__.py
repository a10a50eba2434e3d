"""PyTorch FSDP: ``wrap(model, AdamW4bit, lr=...)``."""

from shard4bit.fsdp.wrap import wrap

__all__ = ["wrap"]

"""DeepSpeed ZeRO stage 0, 1 and 2: ``"type": "AdamW4bit"`` in the JSON, and what needs the engine.

Importing this imports DeepSpeed and makes it know our optimizers, which the hook of torch.backends
(shard4bit_hook) does on demand for optimizers that the JSON names.
"""

import warnings

import torch

from shard4bit.deepspeed.attach import install
from shard4bit.deepspeed.factory import AdamW4bit, SGD4bit
from shard4bit.deepspeed.reading import full_moment, local_moment
from shard4bit.errors import LayoutError

for _make in (AdamW4bit, SGD4bit):
    if not hasattr(torch.optim, _make.__name__):
        setattr(torch.optim, _make.__name__, _make)
try:
    install()
except LayoutError as error:  # raised again where an optimizer is asked for
    warnings.warn(str(error), stacklevel=2)

__all__ = ["AdamW4bit", "SGD4bit", "full_moment", "local_moment"]

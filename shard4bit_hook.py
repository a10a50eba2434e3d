"""The hook that torch calls when it is imported: it makes AdamW4bit and SGD4bit known to DeepSpeed by name.

DeepSpeed resolves the "type" of an optimizer in its JSON configuration with ``getattr(torch.optim, type)``.
torch calls every entry point of the group "torch.backends" (see setup.py) at the end of its own import, and
fails to import if one raises. So this module stands outside the package, uses nothing but the standard
library, and survives whatever state the package is in. SHARD4BIT_HOOK=0 turns it off.
"""

import os
import sys

NAMES = ("AdamW4bit", "SGD4bit")


def _factory(name):
    """A function that finds the real one when it is called; until then nothing of shard4bit is imported."""

    def make(params, **options):
        import shard4bit.deepspeed

        return getattr(shard4bit.deepspeed, name)(params, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"shard4bit.deepspeed.{name}, put here by shard4bit for DeepSpeed's configuration."
    return make


def install():
    """Set ``torch.optim.AdamW4bit`` and ``torch.optim.SGD4bit`` where they are free. Never raises."""
    try:
        optim = sys.modules.get("torch.optim")
        if optim is not None and os.environ.get("SHARD4BIT_HOOK", "1") != "0":
            for name in NAMES:
                if not hasattr(optim, name):
                    setattr(optim, name, _factory(name))
    except Exception:  # whatever it is, `import torch` must go on
        pass

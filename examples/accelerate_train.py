"""Train with Hugging Face accelerate: FSDP2, FSDP1, or DeepSpeed ZeRO 1 and 2.

torchrun --standalone --nproc-per-node 2 examples/accelerate_train.py --engine fsdp2
torchrun --standalone --nproc-per-node 2 examples/accelerate_train.py --engine fsdp2 --resume

The second one starts from step 3 and ends with the digest of the first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, FullyShardedDataParallelPlugin

import shard4bit
from examples import common
from launch.cluster import leave

ACCUMULATE = 2  # batches per step
OPTIONS: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1}


def make_accelerator(engine: str) -> Accelerator:
    """With the plugin of an engine. Clipping is DeepSpeed's own under ZeRO."""
    if engine.startswith("fsdp"):
        sharded = FullyShardedDataParallelPlugin(
            fsdp_version=int(engine[-1]),
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        plugin: dict[str, Any] = {"fsdp_plugin": sharded}
    else:
        common.prepare_deepspeed()
        zero = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": ACCUMULATE,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": int(engine[-1])},
            "optimizer": {"type": "AdamW4bit", "params": {**OPTIONS, "no_decay": ["*norm*"]}},
        }
        plugin = {"deepspeed_plugin": DeepSpeedPlugin(zero)}
    return Accelerator(gradient_accumulation_steps=ACCUMULATE, step_scheduler_with_optimizer=False, **plugin)


def prepare(accelerator: Accelerator, engine: str) -> tuple[Any, Any, Any, Any]:
    """Model, optimizer, scheduler and data. What differs between the engines is here."""
    model, data = common.small_llama(), torch.utils.data.DataLoader(common.Bytes(), batch_size=4)
    if engine == "fsdp2":  # accelerate shards the model and puts the new parameters into the optimizer
        optimizer = shard4bit.AdamW4bit(common.decay_groups(model), **OPTIONS)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
    elif engine == "fsdp1":  # the optimizer comes after the wrapping; False: read no state_dict of it
        model, data = accelerator.prepare(model, data)
        optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, no_decay=["*norm*"], **OPTIONS)
        optimizer = accelerator.prepare(optimizer, device_placement=[False])
    else:  # DeepSpeed makes the optimizer that its configuration names, and steps the scheduler
        dummy = DummyOptim(model.parameters(), **OPTIONS)
        schedule = DummyScheduler(dummy, lr_scheduler_callable=common.halving)
        return accelerator.prepare(model, dummy, schedule, data)
    return model, optimizer, accelerator.prepare(common.halving(optimizer)), data


def save(accelerator: Accelerator, engine: str, folder: str, parts: tuple[Any, Any, Any], step: int) -> None:
    if engine == "fsdp1":  # its own format cannot hold packed states: save_state raises, and says so
        model, optimizer, scheduler = parts
        extra = {"scheduler": scheduler.state_dict()}
        shard4bit.save(folder, model, optimizer.optimizer, step=step, extra=extra, rng=True)
    else:
        accelerator.save_state(folder)


def load(accelerator: Accelerator, engine: str, folder: str, parts: tuple[Any, Any, Any]) -> None:
    if engine == "fsdp1":
        model, optimizer, scheduler = parts
        found = shard4bit.load(folder, model, optimizer.optimizer)
        scheduler.load_state_dict(found.extra["scheduler"])
    else:
        accelerator.load_state(folder)


def main() -> None:
    options = common.arguments(__doc__, ["fsdp2", "fsdp1", "zero1", "zero2"]).parse_args()
    common.treat_cpu_as_gpu(options.engine)
    accelerator = make_accelerator(options.engine)
    model, optimizer, scheduler, data = prepare(accelerator, options.engine)
    parts, folder = (model, optimizer, scheduler), common.own_folder(options, "accelerate")
    losses, step = [], 0
    if options.resume:
        load(accelerator, options.engine, folder, parts)
        step = options.save_at
        data = accelerator.skip_first_batches(data, step * ACCUMULATE)
    for batch in data:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step() if accelerator.sync_gradients else None
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if step == options.save_at and not options.resume:
            save(accelerator, options.engine, folder, parts, step)
        if step == options.steps:
            break
    own = () if options.engine.startswith("zero") else (optimizer.optimizer,)
    common.report(losses, shard4bit.digest(model, *own), step=step, lr=scheduler.get_last_lr()[0])
    accelerator.end_training()  # and the process group


if __name__ == "__main__":
    main()
    leave(0)  # on CPUs, gloo's threads now and then abort a process that ends by itself

"""Train with Lightning: FSDP2 (ModelParallelStrategy), FSDPStrategy, or DeepSpeedStrategy (ZeRO 1 and 2).

torchrun --standalone --nproc-per-node 2 examples/lightning_train.py --engine fsdp2
torchrun --standalone --nproc-per-node 2 examples/lightning_train.py --engine fsdp2 --resume

The second one starts from step 3 and ends with the digest of the first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, Subset

import shard4bit
from examples import common
from examples.lightning_strategies import Fsdp1, Zero
from launch.cluster import leave

OPTIONS: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1}
BATCH, ACCUMULATE = 4, 2  # sequences, batches per step
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class Module(L.LightningModule):
    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine, self.model, self.losses = engine, common.small_llama(), []

    def configure_model(self) -> None:
        layers, device = self.model.model.layers, self.trainer.strategy.root_device
        if self.engine == "fsdp2":
            for part in (*layers, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
        elif self.engine == "fsdp1":
            policy = ModuleWrapPolicy({type(layers[0])})
            self.model = FullyShardedDataParallel(self.model, auto_wrap_policy=policy, device_id=device)

    def configure_optimizers(self) -> Any:  # called after the sharding; not at all for DeepSpeed's JSON
        if self.engine == "fsdp2":
            optimizer = shard4bit.AdamW4bit(common.decay_groups(self), **OPTIONS)
        else:
            optimizer = shard4bit.fsdp.wrap(self, shard4bit.AdamW4bit, no_decay=["*norm*"], **OPTIONS)
        schedule = common.halving(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:  # DeepSpeed clips by its JSON
        if self.engine == "fsdp1":
            self.model.clip_grad_norm_(1.0)
        elif self.engine == "fsdp2":
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def train_dataloader(self) -> Any:  # a resumed Trainer begins the data anew: leave out what was seen
        data, seen = common.Bytes(), self.trainer.global_step * BATCH * ACCUMULATE * WORLD
        own = range(seen + self.global_rank, len(data), WORLD)
        return DataLoader(Subset(data, own), batch_size=BATCH)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        if index % ACCUMULATE == ACCUMULATE - 1:  # the last batch of a step
            self.losses.append(self.trainer.strategy.reduce(loss.detach().clone()).item())
        return loss


def strategy_for(engine: str) -> Any:
    if engine == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    if engine == "fsdp1":
        return Fsdp1()
    common.prepare_deepspeed()
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": OPTIONS["lr"], "warmup_num_steps": 4}}
    return Zero(
        config={
            "zero_optimization": {"stage": int(engine[-1])},
            "optimizer": {"type": "AdamW4bit", "params": {**OPTIONS, "no_decay": ["*norm*"]}},
            "scheduler": warmup,
            "gradient_clipping": 1.0,
            "train_micro_batch_size_per_gpu": BATCH,
        }
    )


def main() -> None:
    options = common.arguments(__doc__, ["fsdp2", "fsdp1", "zero1", "zero2"]).parse_args()
    folder = common.own_folder(options, "lightning")
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=options.save_at, save_top_k=-1)
    trainer = L.Trainer(
        strategy=strategy_for(options.engine),
        devices=WORLD,
        max_steps=options.steps,
        accumulate_grad_batches=ACCUMULATE,
        callbacks=[] if options.resume else [every],
        enable_checkpointing=not options.resume,
        use_distributed_sampler=False,  # train_dataloader takes this rank's own
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(options.engine)
    trainer.fit(module, ckpt_path=f"{folder}/step={options.save_at}.ckpt" if options.resume else None)
    model = trainer.strategy.model
    own = () if options.engine.startswith("zero") else (trainer.optimizers[0],)
    rate = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
    common.report(module.losses, shard4bit.digest(model, *own), step=trainer.global_step, lr=rate)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)  # on CPUs, gloo's threads now and then abort a process that ends by itself

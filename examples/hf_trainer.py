"""Train with the Trainer of Hugging Face transformers: FSDP2, FSDP1, or DeepSpeed ZeRO 1 and 2.

torchrun --standalone --nproc-per-node 2 examples/hf_trainer.py --engine fsdp2
torchrun --standalone --nproc-per-node 2 examples/hf_trainer.py --engine fsdp2 --resume

The second one starts from step 3 and ends with the digest of the first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout
from transformers import Trainer, TrainingArguments

import shard4bit
from examples.common import (
    Bytes,
    arguments,
    own_folder,
    prepare_deepspeed,
    report,
    small_llama,
    treat_cpu_as_gpu,
)
from launch.cluster import leave

OPTIONS: dict[str, Any] = {"lr": 2e-3, "weight_decay": 0.1}


def training_arguments(engine: str, steps: int, save_at: int, folder: str) -> TrainingArguments:
    chosen: dict[str, Any]
    wrap: dict[str, Any]
    if engine == "fsdp2":
        wrap = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        chosen = {"fsdp": True, "fsdp_config": {**wrap, "state_dict_type": "SHARDED_STATE_DICT"}}
    elif engine == "fsdp1":  # Fsdp1Trainer keeps model and optimizer
        wrap = {"version": 1, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        wrap["sync_module_states"] = False  # all ranks begin alike (and True wants a GPU)
        chosen = {"fsdp": True, "fsdp_config": wrap, "save_only_model": True}
    else:
        prepare_deepspeed()
        zero = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": int(engine[-1])},
            "optimizer": {"type": "AdamW4bit", "params": {**OPTIONS, "no_decay": ["*norm*"]}},
        }
        chosen = {"deepspeed": zero}
    return TrainingArguments(
        accelerator_config={"use_configured_state": treat_cpu_as_gpu(engine)},
        output_dir=folder,
        max_steps=steps,
        save_steps=save_at,
        save_strategy="steps" if save_at else "no",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=OPTIONS["lr"],
        weight_decay=OPTIONS["weight_decay"],
        lr_scheduler_type="cosine",
        train_sampling_strategy="sequential",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        **chosen,
    )


class Fsdp1Trainer(Trainer):
    """FSDP1 hides parameters in flat ones, and its own checkpoints cannot hold packed states: Trainer would
    ask for one and get an error. So wrap makes the optimizer, and shard4bit keeps model and optimizer."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:  # called with the wrapped model
            made = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, no_decay=["*norm*"], **OPTIONS)
            self.optimizer = self.accelerator.prepare(made, device_placement=[False])  # reads no state_dict
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        extra, step = {"scheduler": self.lr_scheduler.state_dict()}, self.state.global_step
        root = output_dir or self.args.output_dir
        shard4bit.save(root, self.model, self.optimizer.optimizer, step=step, extra=extra, rng=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        found = shard4bit.load(resume_from_checkpoint, self.model, self.optimizer.optimizer)
        self.lr_scheduler.load_state_dict(found.extra["scheduler"])


def main() -> None:
    options = arguments(__doc__, ["fsdp2", "fsdp1", "zero1", "zero2"]).parse_args()
    folder = own_folder(options, "trainer")
    checkpoint = f"{folder}/checkpoint-{options.save_at}" if options.resume else None
    kind = Fsdp1Trainer if options.engine == "fsdp1" else Trainer
    zero = options.engine.startswith("zero")
    trainer = kind(
        small_llama(),
        training_arguments(options.engine, options.steps, 0 if checkpoint else options.save_at, folder),
        train_dataset=Bytes(),
        # Trainer makes groups with weight decay and without. (DeepSpeed's JSON names the optimizer itself.)
        optimizer_cls_and_kwargs=None if zero else (shard4bit.AdamW4bit, {"lr": OPTIONS["lr"]}),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if zero:
        digest = shard4bit.digest(trainer.model_wrapped)
    else:
        digest = shard4bit.digest(trainer.model_wrapped, trainer.optimizer.optimizer)
    rate = trainer.lr_scheduler.get_last_lr()[0]
    report(losses, digest, step=trainer.state.global_step, lr=rate)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
    leave(0)  # on CPUs, gloo's threads now and then abort a process that ends by itself

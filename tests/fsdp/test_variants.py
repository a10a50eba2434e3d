"""The ways in which FSDP2, tensor parallelism and DDP shard and train a model: real gradients, and after
every step the bits of one process that takes the same global gradients; then a save, and a load elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

import shard4bit
from tests.fsdp import models
from tests.fsdp.models import Arrays, canonical, same
from tests.pool import pool

WIDTH, TOKENS, STEPS = 48, 101, 3
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
BF16, FP16 = torch.bfloat16, torch.float16


class Block(nn.Module):
    """Two linear layers, as tensor parallelism cuts them, with a norm. A cut of 172 columns in two misses
    the blocks of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 172), nn.Linear(172, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A tied embedding, blocks, a convolution, stacked experts, a row, and tensors smaller than the world."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(TOKENS, WIDTH)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.conv = nn.Conv1d(WIDTH, 33, 3)
            self.experts = nn.Parameter(torch.randn(6, 16, WIDTH) / 7)
            self.row = nn.Parameter(torch.randn(1, 4500) / 70)
            self.few = nn.Parameter(torch.ones(3))
            self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, skip: bool = False) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks[:1] if skip else self.blocks:
            x = x + block(x)
        far = self.conv(x.transpose(1, 2)).square().mean()
        routed = torch.einsum("btd,eod->bteo", x, self.experts).tanh().square().mean()
        extra = far + routed + 0.01 * (self.row.square().sum() + self.few.prod())
        return cross_entropy(self.head(x).flatten(0, 1).float(), tokens.roll(1, 1).flatten()) + extra.float()


def tokens(step: int, rank: int) -> Tensor:
    return torch.from_numpy(models.rng_of("tokens", step, rank).integers(0, TOKENS, (4, 9)))


# ---- ways to shard -----------------------------------------------------------------------------


def sharded(model: Any, **options: Any) -> Any:
    options.setdefault("mesh", models.mesh_of(dist.get_world_size()))
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def hsdp(model: Any) -> Any:
    return sharded(model, mesh=models.mesh_of(2, 2))


def experts(model: Any) -> Any:
    return sharded(model, shard_placement_fn=models.of_shape)


def only_the_root(model: Any) -> Any:
    return fully_shard(model, mesh=models.mesh_of(dist.get_world_size()))


def with_policy(param: torch.dtype, reduce: torch.dtype) -> Callable[[Any], Any]:
    return lambda model: sharded(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)
    )


def offloaded(model: Any) -> Any:
    return sharded(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def from_meta(_: Any) -> Any:
    ordinary = Net(tied=False)
    with torch.device("meta"):
        model = sharded(Net(tied=False))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(models.scatter(ordinary.get_parameter(name).detach(), param))
    return model


def checkpointed(model: Any) -> Any:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return sharded(model)


def compiled(backend: str, wrapper: bool) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        for i, block in enumerate(model.blocks):
            if wrapper:  # puts "_orig_mod." into names
                model.blocks[i] = torch.compile(block, backend=backend)
            else:
                block.compile(backend=backend)
        return sharded(model)

    return make


def tensor_parallel(model: Any) -> Any:
    mesh = models.mesh_of(2, 2)
    for block in model.blocks:
        parallelize_module(block, mesh["d1"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return sharded(model, mesh=mesh["d0"])


def ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


# ---- ways to train -----------------------------------------------------------------------------


def backward(model: Any, optimizer: Any, step: int, rank: int) -> bool:
    model(tokens(step, rank)).backward()
    return True


def accumulating(model: Any, optimizer: Any, step: int, rank: int) -> bool:
    """Two micro-batches, of which only the second one communicates."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    with model.no_sync() if parallel else contextlib.nullcontext():
        if not parallel:
            model.set_requires_gradient_sync(False)
        model(tokens(10 + step, rank)).backward()
    if not parallel:
        model.set_requires_gradient_sync(True)
    return backward(model, optimizer, step, rank)


def clipping(model: Any, optimizer: Any, step: int, rank: int) -> bool:
    backward(model, optimizer, step, rank)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    total = norm.full_tensor() if isinstance(norm, DTensor) else norm
    assert total > 0.05
    return True


def skipping(model: Any, optimizer: Any, step: int, rank: int) -> bool:
    """In the second step a block has no gradients, on any rank."""
    model(tokens(step, rank), skip=step == 1).backward()
    missing = [n for n, p in inner(model).named_parameters() if p.grad is None]
    assert len(missing) == (6 if step == 1 else 0) and all("blocks.1" in n for n in missing)
    return True


def scaling(make: Callable[[], Any]) -> Callable[..., bool]:
    """Scaled losses; in the second step one rank's loss overflows, and all skip the step."""

    def scaled(model: Any, optimizer: Any, step: int, rank: int) -> bool:
        scaler = model.__dict__.setdefault("scaler", make())
        before = scaler.get_scale()
        loss = model(tokens(step, rank))
        scaler.scale(loss * float("inf") if step == 1 and rank == 0 else loss).backward()
        scaler.unscale_(optimizer)
        model.finish = lambda: scaler.step(optimizer)
        finite = all(bool(full_tensor(p.grad).isfinite().all()) for p in model.parameters())
        model.after = lambda: (scaler.update(), scaler.get_scale() < before)
        return finite

    return scaled


def full_tensor(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Variant:
    world: int
    shard: Callable[[Any], Any] = sharded
    train: Callable[..., bool] = backward
    dtype: torch.dtype = torch.float32
    elsewhere: int = 3  # ranks that load what was saved; 0: this process alone
    same_data: int = 1  # neighbouring ranks that compute the same (tensor parallelism)


def grad_scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=64.0)


def sharded_scaler() -> Any:
    return ShardedGradScaler(device="cpu", init_scale=64.0)


VARIANTS: dict[str, Variant] = {
    "nested": Variant(4),
    "root only": Variant(3, only_the_root, elsewhere=2),
    "mixed precision": Variant(2, with_policy(BF16, torch.float32)),
    "bf16 parameters": Variant(3, dtype=BF16, elsewhere=2),
    "kept after forward": Variant(3, lambda m: sharded(m, reshard_after_forward=False), elsewhere=2),
    "hsdp": Variant(4, hsdp),
    "experts by dimension 1": Variant(4, experts),
    "offloaded": Variant(2, offloaded),
    "meta": Variant(3, from_meta, elsewhere=2),
    "activation checkpointing": Variant(2, checkpointed),
    "compiled in place": Variant(2, compiled("aot_eager", False)),
    "compiled wrappers": Variant(2, compiled("eager", True)),
    "accumulation": Variant(3, train=accumulating, elsewhere=2),
    "clipping": Variant(3, train=clipping, elsewhere=2),
    "no gradients in a step": Variant(4, train=skipping),
    "GradScaler, fp16": Variant(2, with_policy(FP16, torch.float32), scaling(grad_scaler)),
    "ShardedGradScaler, fp16": Variant(
        3, with_policy(FP16, torch.float32), scaling(sharded_scaler), elsewhere=2
    ),
    "tensor parallel": Variant(4, tensor_parallel, same_data=2),
    "ddp": Variant(3, ddp, elsewhere=2),
    "ddp, no gradients in a step": Variant(2, ddp, skipping, elsewhere=0),
}
SLOW = {
    "inductor": Variant(2, compiled("inductor", False)),
    "bf16 reduction": Variant(2, with_policy(BF16, BF16), elsewhere=0),
    "accumulation, hsdp": Variant(4, hsdp, accumulating, elsewhere=0),
    "tensor parallel, accumulation": Variant(4, tensor_parallel, accumulating, elsewhere=0, same_data=2),
    "ddp, accumulation": Variant(2, ddp, accumulating, elsewhere=4),
    "resharded after forward": Variant(2, lambda m: sharded(m, reshard_after_forward=True), elsewhere=0),
}


# ---- on the ranks ------------------------------------------------------------------------------


def inner(model: Any) -> Any:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def short(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def optimizer_of(model: Any, **options: Any) -> Any:
    """By ``wrap`` where it is sharded; elsewhere the same groups by hand, with the plain names."""
    named = [(short(n), p) for n, p in inner(model).named_parameters()]
    groups = [
        {"params": [pair for pair in named if not pair[0].endswith("bias")]},
        {"params": [pair for pair in named if pair[0].endswith("bias")], "weight_decay": 0.0},
    ]
    if not isinstance(model, FSDPModule):
        return shard4bit.AdamW4bit(groups, **options)
    optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, no_decay=["*bias"], **options)
    names = [[n for n, _ in group["params"]] for group in groups]
    assert [group["param_names"] for group in optimizer.param_groups] == names
    plain = Net(tied="head.weight" not in names[0])
    assert sorted(names[0] + names[1]) == sorted(n for n, _ in plain.named_parameters())
    return optimizer


def arrays(model: Any, optimizer: Any) -> Arrays:
    return {short(k): v for k, v in canonical(inner(model), optimizer).items()}


def compare(model: Any, optimizer: Any, shadow: Any, plain: Any, where: Any) -> str:
    """Everything that can be seen in whole, in bits. (Parts cut within blocks or bytes are no DTensors.)
    Returns a hash of it."""
    found, expected = arrays(model, optimizer), arrays(shadow, plain)
    names = {short(n): p for n, p in inner(model).named_parameters()}
    for key in [k for k in expected if k.startswith("state/") and not k.endswith("/step")]:
        _, name, entry = key.split("/")
        if isinstance(names[name].data, DTensor) and not isinstance(
            optimizer.state[names[name]][entry], DTensor
        ):
            assert entry.endswith(("absmax", "codes")) and any(
                p == Shard(1) for p in names[name].data.placements
            ), key
            del found[key], expected[key]
    same(found, expected, where)
    return hashlib.sha256(b"".join(found[key].tobytes() for key in sorted(found))).hexdigest()


def run_variant(name: str, root: str) -> tuple[str, str]:
    """Train, with every step checked against a plain optimizer in this process; save. The digest, and a
    hash of what this rank sees."""
    variant, rank = {**VARIANTS, **SLOW}[name], dist.get_rank()
    model = variant.shard(Net().to(variant.dtype))
    optimizer = optimizer_of(model, **OPTIONS)
    shadow: Any = Net(tied=name != "meta").to(variant.dtype)
    plain = optimizer_of(shadow, **OPTIONS)
    for step in range(STEPS):
        finite = variant.train(model, optimizer, step, rank // variant.same_data)
        for (key, param), other in zip(inner(model).named_parameters(), shadow.parameters(), strict=True):
            other.grad = None if param.grad is None else full_tensor(param.grad).clone()
            assert other.grad is None or other.grad.any() or not finite, key
        assert finite or "Scaler" in name
        getattr(model, "finish", optimizer.step)()
        if finite:
            plain.step()
        if "Scaler" in name:
            assert model.after()[1] == (not finite) == (step == 1)
        seen = compare(model, optimizer, shadow, plain, (name, step, rank))
        optimizer.zero_grad()
    shard4bit.save(root, model, optimizer, step=STEPS)
    digest = shard4bit.digest(model, optimizer)
    assert digest == shard4bit.digest(shadow, plain)
    return digest, seen


def whole_digest(root: str, dtype: torch.dtype, tied: bool) -> str:
    """Load into a model of other values, sharded over these ranks (or not); its digest."""
    model: Any = Net(tied).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    model = sharded(model) if dist.is_initialized() else model
    optimizer = optimizer_of(model, lr=0.5)
    found = shard4bit.load(root, model, optimizer)
    assert found.step == STEPS and optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
    return shard4bit.digest(model, optimizer)


def check(name: str, variant: Variant, path: Path) -> None:
    results = set(pool(variant.world).run(run_variant, name, str(path)))
    assert len(results) == 1  # all ranks see the same bits, replicas too
    digests = {digest for digest, _ in results}
    args = (str(path), variant.dtype, name != "meta")
    elsewhere = (
        pool(variant.elsewhere).run(whole_digest, *args) if variant.elsewhere else [whole_digest(*args)]
    )
    assert set(elsewhere) == digests


#: nearly covered by others
LONG = (
    *("root only", "kept after forward", "compiled wrappers", "activation checkpointing", "accumulation"),
    *("ShardedGradScaler, fp16", "ddp, no gradients in a step", "bf16 parameters"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in VARIANTS]
)
def test_every_way_to_shard_and_train(name: str, tmp_path: Path) -> None:
    check(name, VARIANTS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_ways(name: str, tmp_path: Path) -> None:
    check(name, SLOW[name], tmp_path)


# ---- loading into each way ---------------------------------------------------------------------


def filled() -> Any:
    model = Net()
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    return model


def loaded_into(name: str, root: str) -> str:
    """Load what one process wrote; the digest. Asserts that a further step is that of one process."""
    variant, rank = VARIANTS[name], dist.get_rank()
    model, shadow = variant.shard(filled()), filled()
    optimizer, plain = optimizer_of(model, lr=0.5), optimizer_of(shadow, lr=0.7)
    assert shard4bit.load(root, model, optimizer).step == shard4bit.load(root, shadow, plain).step == STEPS
    assert [g["lr"] for g in optimizer.param_groups] == [OPTIONS["lr"]] * 2
    digest = shard4bit.digest(model, optimizer)
    compare(model, optimizer, shadow, plain, (name, "loaded"))
    backward(model, optimizer, STEPS, rank // variant.same_data)
    for param, other in zip(model.parameters(), shadow.parameters(), strict=True):
        other.grad = full_tensor(param.grad).clone()
    optimizer.step()
    plain.step()
    compare(model, optimizer, shadow, plain, (name, "stepped"))
    assert shard4bit.digest(model, optimizer) == shard4bit.digest(shadow, plain) != digest
    return digest


INTO = ("tensor parallel", "compiled in place")
INTO_SLOW = ("offloaded", "compiled wrappers", "activation checkpointing", "experts by dimension 1")


@pytest.mark.parametrize("name", [*INTO, *(pytest.param(name, marks=pytest.mark.slow) for name in INTO_SLOW)])
def test_loading_into_other_ways(name: str, tmp_path: Path) -> None:
    model = Net()
    optimizer = optimizer_of(model, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, optimizer, step, 0)
        optimizer.step()
    shard4bit.save(tmp_path, model, optimizer, step=STEPS)
    expected = shard4bit.digest(model, optimizer)
    assert set(pool(VARIANTS[name].world).run(loaded_into, name, str(tmp_path))) == {expected}

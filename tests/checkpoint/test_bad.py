"""Bad checkpoints, bad arguments and failing ranks: an error on every rank, and nothing half-changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import xxhash
from torch import nn

import shard4bit
from shard4bit.checkpoint import plan, store
from shard4bit.checkpoint.header import parse_header
from shard4bit.checkpoint.manifest import seal
from shard4bit.errors import CheckpointError, Shard4bitError
from tests.checkpoint import ranks
from tests.fsdp import models
from tests.fsdp.models import Zoo, optimizer_of
from tests.pool import pool

SHAPES: dict[str, tuple[int, ...]] = {"a": (129, 301), "b": (70, 80), "bias": (301,), "tiny": (1,)}
STEP = 3
WORLD = 2


def save(root: str) -> str:
    model = models.sharded(Zoo(SHAPES), "fsdp")
    optimizer = optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, STEP)
    shard4bit.save(root, model, optimizer, step=STEP)
    return shard4bit.digest(model, optimizer)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    pool(WORLD).run(save, str(root))
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def directory(root: Path) -> Path:
    return root / f"step-{STEP:010d}"


Outcome = tuple[str, bool, str, bool, bool]


def attempt(
    path: str, shapes: dict[str, tuple[int, ...]], kind: str, options: dict[str, Any], plain: bool = False
) -> Outcome:
    """Load into a model with a history of its own. Returns the error's class, whether it is one of
    shard4bit's (and a ValueError), its text, and whether tensors and options are as before."""
    model = models.sharded(Zoo(shapes), "plain" if plain else "fsdp")
    optimizer = optimizer_of(kind, model.parameters(), lr=0.125)
    models.train(model, optimizer, 1, first=40)
    before, groups = shard4bit.digest(model, optimizer), options_of(optimizer)
    error: Exception | None = None
    try:
        shard4bit.load(path, model, optimizer, **options)
    except Exception as caught:
        error = caught
    same = shard4bit.digest(model, optimizer) == before
    ours = isinstance(error, CheckpointError) and isinstance(error, Shard4bitError | ValueError)
    return type(error).__name__, ours, str(error), same, options_of(optimizer) == groups


def options_of(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def refused(outcomes: list[Outcome], *words: str) -> None:
    """Every rank: CheckpointError with these words, and nothing changed."""
    for rank, (kind, ours, text, tensors, options) in enumerate(outcomes):
        assert ours, (rank, kind, text)
        for word in words:
            assert word in text, (rank, word, text)
        assert tensors and options, (rank, text)


def load(path: Path, **options: Any) -> list[Outcome]:
    return pool(WORLD).run(attempt, str(path), SHAPES, "rank1", options)


def test_the_checkpoint_itself_is_good(root: Path) -> None:
    """The control of all below: unspoilt, it loads and changes both tensors and options."""
    for kind, _, _, tensors, options in load(root):
        assert (kind, tensors, options) == ("NoneType", False, False)


# ---- another model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"new": (90, 60)}, ["model/new", "state/new/exp_avg", "lacks", "strict=False"]),
        ({"a": None}, ["model/a", "state/a/exp_avg_absmax", "strict=False"]),
        ({"b": (80, 70)}, ["b: ", "[70, 80]", "[80, 70]"]),
        ({"bias": (300,)}, ["bias: ", "[301]", "[300]"]),
        ({"a": (129, 301, 1)}, ["a: ", "[129, 301, 1]"]),
    ],
)
def test_another_model(root: Path, change: dict[str, Any], words: list[str]) -> None:
    shapes = {k: v for k, v in {**SHAPES, **change}.items() if v is not None}
    refused(pool(WORLD).run(attempt, str(root), shapes, "rank1", {}), *words)
    refused(pool(3).run(attempt, str(root), shapes, "rank1", {}), *words)


@pytest.mark.parametrize(
    "kind, words",
    [("block", ["a: ", "Rank-1/Linear", "B128/Linear"]), ("sgd", ["a: ", "momentum_buffer", "exp_avg"])],
)
def test_another_spec_or_optimizer(root: Path, kind: str, words: list[str]) -> None:
    refused(pool(WORLD).run(attempt, str(root), SHAPES, kind, {}), *words)
    refused(pool(WORLD).run(attempt, str(root), SHAPES, kind, {"strict": False}), *words)


def other_groups(path: str) -> Outcome:
    model = models.sharded(Zoo(SHAPES), "fsdp")
    params = list(model.parameters())
    optimizer = optimizer_of("rank1", [{"params": params[2:]}, {"params": params[:2]}])
    before, groups = shard4bit.digest(model, optimizer), options_of(optimizer)
    with pytest.raises(CheckpointError) as caught:
        shard4bit.load(path, model, optimizer)
    same = shard4bit.digest(model, optimizer) == before
    unchanged = options_of(optimizer) == groups
    shard4bit.load(path, model, optimizer, hyperparameters=False)  # as the message says
    assert shard4bit.digest(model, optimizer) != before
    return type(caught.value).__name__, True, str(caught.value), same, unchanged


def test_other_groups(root: Path) -> None:
    refused(pool(WORLD).run(other_groups, str(root)), "groups", "[4]", "[2, 2]", "hyperparameters=False")


def other_dtype(path: str) -> Outcome:
    model = models.sharded(Zoo(SHAPES, torch.bfloat16), "fsdp")
    optimizer = optimizer_of("rank1", model.parameters())
    before = shard4bit.digest(model, optimizer)
    with pytest.raises(CheckpointError) as caught:
        shard4bit.load(path, model, optimizer)
    same = shard4bit.digest(model, optimizer) == before
    return type(caught.value).__name__, True, str(caught.value), same, True


def test_parameters_of_another_dtype(root: Path) -> None:
    refused(pool(WORLD).run(other_dtype, str(root)), "model/", "F32", "BF16")


# ---- damaged files -----------------------------------------------------------------------------


def no_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def truncate(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


def truncate_to(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(data)  # type: ignore[return-value]


def edit(change: Callable[[dict[str, Any]], Any], *, sign: bool) -> Callable[[Path], None]:
    """Change the manifest, with a right checksum if ``sign``."""

    def spoil(path: Path) -> None:
        body = json.loads((path / "manifest.json").read_bytes())
        change(body)
        checksum = body.pop("checksum", None)
        raw = seal(body)
        if not sign:
            raw = raw[:13] + str(checksum).encode() + raw[29:]
        (path / "manifest.json").write_bytes(raw)

    return spoil


def pieces_of(body: dict[str, Any]) -> list[list[int]]:
    """[file, row0, row1, col0, col1] of each piece; others may share the layout, hence a copy."""
    info = body["tensors"]["state/a/exp_avg_codes"]
    body["layouts"].append([list(piece) for piece in body["layouts"][info["layout"]]])
    info["layout"] = len(body["layouts"]) - 1
    return body["layouts"][-1]


def repeat_first(body: dict[str, Any]) -> None:
    pieces = pieces_of(body)
    pieces.append(pieces[0])


def change_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change a data file's header, at the same length, with right checksums of it and the manifest."""

    def spoil(path: Path) -> None:
        raw = (path / FILE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        head = raw[:8] + text + b" " * (length - len(text))
        assert len(text) <= length
        (path / FILE).write_bytes(head + raw[8 + length :])
        body = json.loads((path / "manifest.json").read_bytes())
        body.pop("checksum")
        body["files"][1]["header"] = xxhash.xxh3_64_hexdigest(head)
        (path / "manifest.json").write_bytes(seal(body))

    return spoil


def bare(header: dict[str, Any], name: str = "state/a/exp_avg_codes") -> str:
    return next(key for key in header if key.startswith(name))


def link(path: Path) -> None:
    target = path.parent / "elsewhere"
    (path / "rank-00001.safetensors").rename(target)
    (path / "rank-00001.safetensors").symlink_to(target)


def garble(path: Path) -> None:
    data = bytearray((path / "manifest.json").read_bytes())
    data[len(data) // 2] ^= 0x80
    (path / "manifest.json").write_bytes(data)


def flip(place: int) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        data = bytearray((path / FILE).read_bytes())
        data[place] ^= 1
        (path / FILE).write_bytes(data)

    return spoil


def flip_filling(path: Path) -> None:
    length = int.from_bytes((path / FILE).read_bytes()[:8], "little")
    flip(8 + length - 1)(path)


FILE = "rank-00001.safetensors"
SPOILT: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no directory": (no_directory, ["copy"]),
    "no manifest": (remove("manifest.json"), ["no complete checkpoint"]),
    "an empty manifest": (write("manifest.json", b""), ["manifest.json"]),
    "a manifest of lists": (write("manifest.json", b"[" * 100_000), ["manifest.json"]),
    "a manifest of nothing": (write("manifest.json", b"[]"), ["manifest.json", "not the manifest"]),
    "a flipped bit in the manifest": (garble, ["manifest.json"]),
    "half a manifest": (truncate_to("manifest.json", 1000), ["manifest.json"]),
    "no data file": (remove(FILE), [FILE, "missing"]),
    "a link": (link, [FILE]),
    "a truncated data file": (truncate(FILE), [FILE, "bytes"]),
    "an empty data file": (truncate_to("rank-00000.safetensors", 0), ["rank-00000", "0 bytes"]),
    "an edited step count": (
        edit(lambda b: b["parameters"]["a"].update(step=99), sign=False),
        ["manifest.json", "checksum"],
    ),
    "no checksum": (edit(lambda b: b.pop("checksum"), sign=False), ["manifest.json", "checksum"]),
    "another version": (edit(lambda b: b.update(version=2), sign=True), ["version 2"]),
    "another format": (edit(lambda b: b.update(format="x"), sign=True), ["manifest.json"]),
    "no tensors": (edit(lambda b: b.pop("tensors"), sign=True), ["manifest.json", "malformed"]),
    "no content": (edit(lambda b: b.update(content={}), sign=True), ["manifest.json", "malformed"]),
    "no groups": (edit(lambda b: b.update(groups=None), sign=True), ["manifest.json", "malformed"]),
    "odd groups": (edit(lambda b: b.update(groups=[{"parameters": 3}]), sign=True), ["malformed"]),
    "an odd option": (
        edit(lambda b: b["groups"][0]["options"].update(lr="x"), sign=True),
        ["lr='x'"],
    ),
    "odd facts": (edit(lambda b: b["parameters"].update(a=3), sign=True), ["malformed"]),
    "an odd step count": (
        edit(lambda b: b["parameters"]["a"].update(step="x"), sign=True),
        ["malformed"],
    ),
    "an odd size": (edit(lambda b: b["files"][1].update(size=-1), sign=True), ["malformed"]),
    "an odd header": (edit(lambda b: b["files"][1].update(header="../../etc"), sign=True), ["malformed"]),
    "a file too few": (edit(lambda b: b["files"].pop(), sign=True), ["malformed", "1 files of 2 ranks"]),
    "an odd step": (edit(lambda b: b.update(step="three"), sign=True), ["malformed"]),
    "a gap": (edit(lambda b: pieces_of(b).pop(), sign=True), ["state/a/exp_avg_codes", "elements"]),
    "an overlap": (
        edit(repeat_first, sign=True),
        ["state/a/exp_avg_codes", "overlap"],
    ),
    "an unlisted file": (
        edit(lambda b: pieces_of(b)[0].__setitem__(0, 2), sign=True),
        ["malformed", "file 2 of 2"],
    ),
    "a path for a file": (
        edit(lambda b: pieces_of(b)[0].__setitem__(0, "../elsewhere"), sign=True),
        ["malformed", "integers"],
    ),
    "a negative offset": (
        edit(lambda b: pieces_of(b)[0].__setitem__(1, -1), sign=True),
        ["malformed", "negative"],
    ),
    "another file": (
        edit(lambda b: pieces_of(b)[0].__setitem__(0, 1), sign=True),
        ["state/a/exp_avg_codes", FILE, "lacks"],
    ),
    "no such layout": (
        edit(lambda b: b["tensors"]["model/a"].update(layout=99), sign=True),
        ["model/a", "layout 99"],
    ),
    "a place beyond the end": (
        change_header(lambda h: h[bare(h)]["data_offsets"].__setitem__(1, 10**7)),
        ["state/a/exp_avg_codes", FILE, "bytes"],
    ),
    "another place": (
        change_header(lambda h: h[bare(h)]["data_offsets"].__setitem__(0, 0)),
        ["state/a/exp_avg_codes", FILE, "bytes"],
    ),
    "another name": (
        change_header(lambda h: h.update({"x": h.pop(list(h)[-1])})),
        [FILE, "'x'", "named"],
    ),
    "no checksums": (
        change_header(lambda h: h["__metadata__"].update(xxh3="")),
        [FILE, "lacks checksums"],
    ),
    "other checksums": (
        change_header(lambda h: h["__metadata__"].update(xxh3="0" * len(h["__metadata__"]["xxh3"]))),
        [FILE, "model/", "checksum differs"],
    ),
    "a flipped bit in a header": (flip(20), [FILE, "header"]),
    "a flipped bit in a header's length": (flip(1), [FILE, "header"]),
    "a flipped bit in a header's filling": (flip_filling, [FILE, "header"]),
    "another dtype": (
        edit(lambda b: b["tensors"]["model/bias"].update(dtype="I32"), sign=True),
        ["model/bias", "I32"],
    ),
    "an unknown dtype": (
        edit(lambda b: b["tensors"]["model/bias"].update(dtype="F7"), sign=True),
        ["model/bias", "F7"],
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_checkpoints(name: str, root: Path) -> None:
    spoil, words = SPOILT[name]
    spoil(directory(root))
    refused(load(root), *words)


def test_a_checkpoint_named_outright_and_nothing_at_all(root: Path, tmp_path: Path) -> None:
    remove("manifest.json")(directory(root))
    refused(load(directory(root)), "no complete checkpoint")
    refused(load(tmp_path / "nowhere"), "nowhere")
    (tmp_path / "empty").mkdir()
    refused(load(tmp_path / "empty"), "empty", "no complete checkpoint")


def places() -> list[tuple[str, int]]:
    """(tensor, which of its bytes): first, last and middle ones, of both ranks' files."""
    keys = [
        "model/a",
        "model/tiny",
        "state/b/exp_avg_codes",
        "state/a/exp_avg_sq_col_max",
        "state/bias/exp_avg",
    ]
    return [(key, part) for key in keys for part in (0, 1, 2)]


@pytest.mark.parametrize("key, part", places())
def test_one_flipped_byte(key: str, part: int, root: Path) -> None:
    """Any byte of any tensor: every rank refuses, and the text names the file and the tensor."""
    manifest = json.loads((directory(root) / "manifest.json").read_bytes())
    layout = manifest["layouts"][manifest["tensors"][key]["layout"]]
    path = directory(root) / f"rank-{layout[-1 if part == 2 else 0][0]:05d}.safetensors"
    data = bytearray(path.read_bytes())
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    stored = next(s for s in parse_header(bytes(header), len(data)) if s.key == key)
    size = (stored.rect.row1 - stored.rect.row0) * stored.row_bytes
    data[stored.begin + (0, size // 2, size - 1)[part]] ^= 0x10
    path.write_bytes(data)
    refused(load(root), path.name, key, "damaged")


def digest_of_loaded(path: str) -> str:
    model = models.sharded(Zoo(SHAPES), "fsdp")
    optimizer = optimizer_of("rank1", model.parameters())
    shard4bit.load(path, model, optimizer)
    return shard4bit.digest(model, optimizer)


def single() -> str:
    model = Zoo(SHAPES)
    optimizer = optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, STEP)
    return shard4bit.digest(model, optimizer)


# ---- bad arguments, bad places -----------------------------------------------------------------


def save_with(root: str, what: str) -> str:
    """A call of save that must fail; its error's text."""
    model = models.sharded(Zoo(SHAPES), "fsdp")
    optimizer: Any = optimizer_of("rank1", model.parameters())
    arguments: dict[str, Any] = {"step": STEP}
    if what == "extra":
        arguments["extra"] = {"f": {1, 2}}
    elif what == "a complex number":
        arguments["extra"] = {"a": [1, {"z": 1j}]}
    elif what == "a sparse tensor":
        arguments["extra"] = {"t": torch.eye(3).to_sparse()}
    elif what == "keep_last":
        arguments["keep_last"] = 0
    elif what == "extra on one rank":
        arguments["extra"] = object() if dist.get_rank() == 1 else None
    elif what == "step":
        arguments["step"] = -1
    elif what == "float step":
        arguments["step"] = 3.0
    elif what == "model":
        model = list(model.parameters())
    elif what == "foreign optimizer":
        optimizer = torch.optim.AdamW(model.parameters())
    elif what == "stranger":
        optimizer = optimizer_of("rank1", [*model.parameters(), nn.Parameter(torch.zeros(11, 13))])
    elif what == "stale":
        optimizer = optimizer_of("rank1", Zoo(SHAPES).parameters())
    elif what == "nothing":
        optimizer, arguments["parameters"] = None, False
    elif what == "complex":
        model.register_buffer("freqs", torch.zeros(3, dtype=torch.complex64))
    elif what == "options":
        optimizer.param_groups[0]["note"] = {1, 2}
    elif what == "an infinite option":
        optimizer.add_param_group({"params": [], "note": {"rates": [1.0, float("inf")]}})
    for call in (
        lambda: shard4bit.save(root, model, optimizer, **arguments),
        lambda: shard4bit.load(root, model, optimizer),
    ):
        if call.__code__.co_names[1] == "load" and what not in ("model", "foreign optimizer", "stranger"):
            continue
        with pytest.raises(CheckpointError) as caught:
            call()
    return str(caught.value)


ARGUMENTS = {
    "extra": "extra must be JSON",
    "a complex number": "extra must be JSON or tensors: extra['a'][1]['z'] is a complex",
    "a sparse tensor": "extra['t'] is a Tensor",
    "keep_last": "keep_last=0",
    "extra on one rank": "extra must be JSON",
    "step": "step=-1",
    "float step": "step=3.0",
    "model": "expected a torch.nn.Module, got list",
    "foreign optimizer": "AdamW",
    "stranger": "(11, 13)",
    "stale": "build it after fully_shard",
    "nothing": "nothing to save",
    "complex": "freqs",
    "options": "cannot hold the option param_groups[0]['note']={1, 2} of type set",
    "an infinite option": "param_groups[1]['note']['rates'][1]=inf of type float: expected finite numbers",
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_bad_arguments(what: str, root: Path) -> None:
    before = sorted(p.name for p in root.rglob("*"))
    shutil.rmtree(directory(root) / "x", ignore_errors=True)
    for text in pool(WORLD).run(save_with, str(root), what):
        assert ARGUMENTS[what] in text
    assert sorted(p.name for p in root.rglob("*")) == before


def save_again(root: str) -> tuple[str, str]:
    model = models.sharded(Zoo(SHAPES), "fsdp")
    with pytest.raises(CheckpointError) as caught:
        shard4bit.save(root, model, step=STEP)
    with pytest.raises(CheckpointError) as other:
        shard4bit.save(root + "/a-file", model, step=STEP)
    return str(caught.value), str(other.value)


def test_an_existing_step_or_an_unusable_root(root: Path) -> None:
    (root / "a-file").write_text("x")
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    for exists, unusable in pool(WORLD).run(save_again, str(root)):
        assert "exists already" in exists and f"step-{STEP:010d}" in exists
        assert "a-file" in unusable
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


# ---- a rank that fails in mid-save -------------------------------------------------------------


PLACES: dict[str, Any] = {
    "write_file": store,
    "holding": plan,
    "owned": plan,
    "arrange": plan,
    "_check_place": store,
    "Hidden": store,
    "_fsync_directory": store,
    "check_unique": plan,
}


def fail_in_save(root: str, where: str, bad: int) -> tuple[str, str, bool, str]:
    """Save with a failure on one rank, then again without. Returns the error, whether the state is as
    before, and the digest."""
    model = models.sharded(Zoo(SHAPES), "fsdp")
    optimizer = optimizer_of("rank1", model.parameters())
    models.train(model, optimizer, STEP)
    before, real = shard4bit.digest(model, optimizer), getattr(PLACES[where], where)

    def failing(*args: Any) -> Any:
        if dist.get_rank() != bad:
            return real(*args)
        if where == "write_file":  # half a file, then the disk is full
            real(args[0], list(args[1])[:1])
        raise OSError(28, "No space left on device")

    with mock.patch.object(PLACES[where], where, failing), pytest.raises(CheckpointError) as caught:
        shard4bit.save(root, model, optimizer, step=STEP)
    dist.barrier()
    left = sorted(os.listdir(root)) if os.path.isdir(root) else []
    dist.barrier()
    digest = shard4bit.digest(model, optimizer)
    shard4bit.save(root, model, optimizer, step=STEP)
    return str(caught.value), str(left), digest == before, digest


@pytest.mark.parametrize(
    "where, bad",
    [
        ("write_file", 0),
        ("write_file", 1),
        ("holding", 1),
        ("check_unique", 1),
        ("owned", 1),
        ("arrange", 0),
        ("_check_place", 0),
        ("Hidden", 0),
        ("_fsync_directory", 0),
    ],
)
def test_a_failing_rank(where: str, bad: int, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    for text, left, unchanged, digest in pool(WORLD).run(fail_in_save, root, where, bad):
        assert f"rank {bad}" in text and "No space left" in text
        assert left == "[]"
        assert unchanged
        assert digest == single()
    assert os.listdir(root) == [f"step-{STEP:010d}"]
    assert pool(3).run(digest_of_loaded, root) == [single()] * 3


def not_shared(root: str) -> str:
    """Every rank with a directory of its own, as on nodes without a shared filesystem."""
    model = models.sharded(Zoo(SHAPES), "fsdp")
    real = store.write_file

    def elsewhere(path: Path, pieces: Any) -> Any:
        if dist.get_rank() == 1:
            path = Path(root + "-of-another-node")
        return real(path, pieces)

    with mock.patch.object(store, "write_file", elsewhere), pytest.raises(CheckpointError) as caught:
        shard4bit.save(root, model, step=STEP)
    return str(caught.value)


def test_no_shared_filesystem(tmp_path: Path) -> None:
    for text in pool(WORLD).run(not_shared, str(tmp_path / "root")):
        assert "shared filesystem" in text and "rank 1" in text
    assert os.listdir(tmp_path / "root") == []


def test_in_one_process(root: Path) -> None:
    """The same errors without any process group."""
    truncate(FILE)(directory(root))
    refused([attempt(str(root), SHAPES, "rank1", {}, True)], FILE, "bytes")
    with pytest.raises(CheckpointError, match="exists already"):
        shard4bit.save(root, Zoo(SHAPES), step=STEP)
    assert ranks.STEPS == STEP

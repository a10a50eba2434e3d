"""Damage and hostile input, in one process: every one refused, by name, with nothing changed."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shard4bit
from shard4bit.checkpoint import header
from shard4bit.checkpoint.header import Stored, parse_header
from shard4bit.checkpoint.manifest import MAX_BYTES, parse_manifest, seal
from shard4bit.checkpoint.pieces import Rect
from shard4bit.checkpoint.reading import needs
from shard4bit.checkpoint.verify import verify
from shard4bit.errors import CheckpointError
from tests.checkpoint import many

NAMES = [f"rank-{rank:05d}.safetensors" for rank in range(3)]
FILES = ["manifest.json", *NAMES]
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def values_of(seed: int) -> many.Matrices:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model/a": (30, 40), "state/a/exp_avg_codes": (30, 20), "model/b": (7, 1), "state/b/x": (1, 33)}
    kinds = {"state/a/exp_avg_codes": torch.uint8}
    return {
        key: (torch.randn(shape, generator=generator) * 50).to(kinds.get(key, torch.float32))
        for key, shape in shapes.items()
    }


def saved(root: Path, seed: int, world: int = 3) -> Path:
    """Rows in ``world`` parts; step = seed."""
    values = values_of(seed)
    ranks = []
    for rank in range(world):
        cuts = {key: (len(v) * rank // world, len(v) * (rank + 1) // world) for key, v in values.items()}
        ranks.append(
            [
                many.piece(key, v, Rect(*cuts[key], 0, v.shape[1]))
                for key, v in values.items()
                if cuts[key][0] < cuts[key][1]
            ]
        )
    return many.save(root, ranks, step=seed)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("good"), 1)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    return {
        "another step": saved(root, 2),
        "another world size": saved(root, 3, world=4),
        "the same step and model": saved(root / "twin", 1, world=2),
    }


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / good.name)
    return tmp_path / good.name


def refused(path: Path, *words: str) -> str:
    """Loading raises, with these words, and changes nothing; ``verify`` finds it too."""
    targets = {key: torch.full_like(value, 77) for key, value in values_of(1).items()}
    with pytest.raises(CheckpointError) as caught:
        many.load(path, many.whole(targets))
    text = str(caught.value)
    for word in words:
        assert word in text, (word, text)
    assert all((value == 77).all() for value in targets.values())
    faults = verify(path)
    assert faults and all(word in "\n".join(faults) for word in words), (words, faults)
    return text


def parts_of(path: Path) -> list[Stored]:
    raw = path.read_bytes()
    return parse_header(raw[8 : 8 + int.from_bytes(raw[:8], "little")], len(raw))


def test_the_good_one_is_good(good: Path) -> None:
    expected = values_of(1)
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    many.load(good, many.whole(found))
    assert all(found[key].equal(expected[key]) for key in expected)
    assert verify(good) == []


def flip(path: Path, byte: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def test_single_bits(copy: Path) -> None:
    """1,000 of them, in the manifest, the headers and the data; those in data name the tensor."""
    rng = random.Random(0)
    places = {name: parts_of(copy / name) for name in NAMES}
    hit = dict.fromkeys(("manifest", "header", "data"), 0)
    for _ in range(1000):
        name = rng.choice(FILES)
        path = copy / name
        byte, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        flip(path, byte, bit)
        words, kind = [name], "manifest" if name == "manifest.json" else "header"
        for part in places.get(name, ()):
            if part.begin <= byte < part.begin + part.rect.shape[0] * part.row_bytes:
                words, kind = [name, part.key], "data"
        refused(copy, *words)
        hit[kind] += 1
        flip(path, byte, bit)
    assert min(hit.values()) > 100, hit
    assert verify(copy) == []


def test_truncated_extended_and_blanked_files(copy: Path) -> None:
    rng = random.Random(1)
    for number in range(150):
        path = copy / rng.choice(FILES)
        raw = path.read_bytes()
        cut = rng.randrange(len(raw))
        if number % 3 == 0:
            path.write_bytes(raw[:cut])
        elif number % 3 == 1:
            path.write_bytes(raw + rng.randbytes(rng.randrange(1, 50)))
        else:
            path.write_bytes(raw[:cut] + bytes(len(raw) - cut))  # as after a crash of the file system
        if path.read_bytes() != raw:
            refused(copy, path.name)
        path.write_bytes(raw)
    assert verify(copy) == []


def test_files_exchanged_missing_and_of_other_checkpoints(copy: Path, others: dict[str, Path]) -> None:
    for a in NAMES:
        for b in NAMES:
            if a < b:
                (copy / a).rename(copy / "x"), (copy / b).rename(copy / a), (copy / "x").rename(copy / b)
                refused(copy, "rank-")
                (copy / a).rename(copy / "x"), (copy / b).rename(copy / a), (copy / "x").rename(copy / b)
    for name in NAMES:
        raw = (copy / name).read_bytes()
        (copy / name).unlink()
        refused(copy, name, "missing")
        (copy / name).mkdir()
        refused(copy, name)
        (copy / name).rmdir()
        os.mkfifo(copy / name)  # must not wait for a writer
        refused(copy, name)
        (copy / name).unlink()
        for other in others.values():
            if (other / name).exists():
                shutil.copy(other / name, copy / name)
                refused(copy, name)
        (copy / name).write_bytes(raw)
    raw = (copy / "manifest.json").read_bytes()
    for other in others.values():
        shutil.copy(other / "manifest.json", copy / "manifest.json")
        refused(copy, "rank-")
    (copy / "manifest.json").write_bytes(raw)
    assert verify(copy) == []


def test_a_header_of_another_step_with_the_same_sizes(copy: Path, others: dict[str, Path]) -> None:
    name = NAMES[1]
    other = (others["another step"] / name).read_bytes()
    assert len(other) == (copy / name).stat().st_size
    (copy / name).write_bytes(other)
    assert "another checkpoint" in refused(copy, name)


def test_edited_manifests(copy: Path) -> None:
    """Any number or letter changed by hand, without the checksum."""
    rng = random.Random(2)
    path = copy / "manifest.json"
    raw = path.read_bytes()
    for _ in range(200):
        place = rng.randrange(len(raw))
        new = rng.choice(b'0123456789abcxyz{}[]," ')
        if new != raw[place]:
            path.write_bytes(raw[:place] + bytes([new]) + raw[place + 1 :])
            refused(copy, "manifest.json")


# ---- hostile input -----------------------------------------------------------------------------


@contextmanager
def bounded(seconds: float = 20.0, size: int = 1500 << 20) -> Iterator[None]:
    """CPU seconds, and bytes by which this process may grow."""

    def memory(field: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before, start = memory("VmRSS"), time.process_time()
    yield
    assert time.process_time() - start < seconds
    assert memory("VmHWM") - before < size


def body_of(path: Path) -> dict[str, Any]:
    body = json.loads((path / "manifest.json").read_bytes())
    body.pop("checksum")
    return body


def set_shape(shape: list[Any]) -> Callable[[dict[str, Any]], None]:
    return lambda b: b["tensors"]["model/a"].update(shape=shape)


def set_rect(*numbers: Any) -> Callable[[dict[str, Any]], None]:
    """The first piece of a layout of several."""
    return lambda b: max(b["layouts"], key=len)[0].__setitem__(slice(None), numbers)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a huge shape": set_shape([2**40, 2**20]),
    "a shape beyond 64 bits": set_shape([2**70, 1]),
    "a negative shape": set_shape([-30, -40]),
    "a shape of floats": set_shape([30.0, 40.0]),
    "a shape of three": set_shape([30, 40, 1]),
    "a bool for a number": set_shape([True, 40]),
    "a negative offset": set_rect(0, -5, 10, 0, 40),
    "an offset beyond 64 bits": set_rect(0, 2**70, 2**71, 0, 40),
    "an overlap": set_rect(0, 0, 11, 0, 40),
    "a gap": set_rect(0, 0, 9, 0, 40),
    "a piece turned round": set_rect(0, 10, 0, 0, 40),
    "a path for a file": set_rect("../../etc/passwd", 0, 10, 0, 40),
    "no such file": set_rect(3, 0, 10, 0, 40),
    "a file of -1": set_rect(-1, 0, 10, 0, 40),
    "a piece of four": set_rect(0, 0, 10, 0),
    "no such layout": lambda b: b["tensors"]["model/a"].update(layout=10**6),
    "the last layout from behind": lambda b: b["tensors"]["model/a"].update(layout=-1),
    "files with names": lambda b: b.update(files={n: 1 for n in ("../a", "b", "c")}),
    "a header that is a path": lambda b: b["files"][0].update(header="../../../etc/pas"),
    "an unknown dtype": lambda b: b["tensors"]["model/a"].update(dtype="F128"),
    "a list for a dtype": lambda b: b["tensors"]["model/a"].update(dtype=["F32"]),
    "tensors in a list": lambda b: b.update(tensors=[1]),
    "no step": lambda b: b.pop("step"),
    "a million layouts": lambda b: b.update(layouts=[[[0, 0, 1, 0, 1]]] * 10**6),
    "a million pieces": lambda b: max(b["layouts"], key=len).extend([[0, 0, 1, 0, 1]] * 10**6),
    "a million tensors": lambda b: b["tensors"].update(
        {f"t{i}": {"dtype": "F32", "shape": [1, 1], "layout": 0} for i in range(10**6)}
    ),
    "a million files": lambda b: b["files"].extend([b["files"][0]] * 10**6),
    "extra of another shape": lambda b: b.update(version=1.5),
}


SLOW = tuple(what for what in HOSTILE if "million" in what)


@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=[pytest.mark.slow] if w in SLOW else []) for w in HOSTILE]
)
def test_hostile_manifests(what: str, copy: Path) -> None:
    body = body_of(copy)
    HOSTILE[what](body)
    raw = seal(body)
    (copy / "manifest.json").write_bytes(raw)
    del body
    with bounded():
        refused(copy, "manifest.json")


def with_checksum(raw: bytes) -> bytes:
    """``raw`` is what follows the first brace."""
    return b'{"checksum":"' + xxhash.xxh3_64_hexdigest(b"{" + raw).encode() + b'",' + raw


def test_hostile_json(copy: Path) -> None:
    path = copy / "manifest.json"
    rest = path.read_bytes()[31:]
    assert with_checksum(rest) == path.read_bytes()
    duplicate = rest.replace(b'"step":1,', b'"step":1,"step":2,')
    inner = rest.replace(b'"model/a":{', b'"model/a":{"dtype":"U8",')
    assert duplicate != rest != inner
    texts = [
        with_checksum(duplicate),
        with_checksum(inner),
        with_checksum(rest.replace(b'"extra":null', b'"extra":NaN')),
        with_checksum(rest.replace(b'"extra":null', b'"extra":-Infinity')),
        with_checksum(rest.replace(b'"extra":null', b'"extra":' + b"9" * 10**6)),
        with_checksum(rest.replace(b'"extra":null', b'"extra":' + b"[" * 10**6 + b"]" * 10**6)),
        with_checksum(rest.replace(b'"extra":null', b'"extra":' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5)),
        with_checksum(rest.replace(b'"extra":null', b'"extra":"\xff"')),
        b" " + path.read_bytes(),
        path.read_bytes() + b" ",
        path.read_bytes().replace(b'"checksum"', b'"checksun"'),
        b"",
        b"null",
        b"\x80\x04.",
        b" " * (MAX_BYTES + 1),
        b"[" * MAX_BYTES,
    ]
    for raw in texts:
        path.write_bytes(raw)
        with bounded():
            refused(copy, "manifest.json")


def test_links_are_not_followed(copy: Path) -> None:
    for name in FILES:
        target = copy.parent / name
        (copy / name).rename(target)
        (copy / name).symlink_to(target)
        refused(copy, name)
        (copy / name).unlink()
        target.rename(copy / name)
    assert verify(copy) == []


def reheaded(copy: Path, name: str, head: bytes, tail: bytes) -> None:
    """A file of another header, which the manifest promises."""
    (copy / name).write_bytes(head + tail)
    body = body_of(copy)
    number = NAMES.index(name)
    body["files"][number] = {"header": xxhash.xxh3_64_hexdigest(head), "size": len(head) + len(tail)}
    (copy / "manifest.json").write_bytes(seal(body))


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def test_hostile_headers(copy: Path) -> None:
    """With right checksums of themselves."""
    raw = (copy / NAMES[0]).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text, tail = raw[8 : 8 + length], raw[8 + length :]
    name = next(k for k in json.loads(text) if k.startswith("model/a")).encode()
    texts = [
        text.replace(name, b"../../" + name),
        text.replace(b'"data_offsets":[0,', b'"data_offsets":[-8,'),
        text.replace(b'"data_offsets":[0,', b'"data_offsets":[99999999999999999999,'),
        text.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1),
        text.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1),
        text.replace(b'"shape":[10,40]', b'"shape":[40,10]'),
        text.replace(b'"shape":[10,40]', b'"shape":[1000000000,40]'),
        text.replace(b'"chunk_bytes":"4194304"', b'"chunk_bytes":"0"'),
        text.replace(b'"chunk_bytes":"4194304"', b'"chunk_bytes":"99999999999999"'),
        text.replace(b'"__metadata__"', b'"__metadota__"'),
        text.replace(name, name.replace(b"0:10", b"0:010")),
        text.replace(name, name.replace(b"0:10", b"-0:10")),
        text[:-1] + b"]",
        b"[" * 10**6,
        b"{}",
        b"null",
        b'{"a":1,"a":1}',
        b"{" + b",".join(b'"%d":0' % i for i in range(10**6)) + b"}",
        pickle.dumps({"a": 1}),
    ]
    for changed in texts:
        assert changed != text, changed[:100]
        reheaded(copy, NAMES[0], framed(changed), tail)
        with bounded():
            refused(copy, NAMES[0])
    for said in (2**63 - 1, 2**64 - 1, header.MAX_BYTES + 1, len(raw)):
        reheaded(copy, NAMES[0], said.to_bytes(8, "little") + text, tail)
        with bounded(5.0, 200 << 20):
            refused(copy, NAMES[0], "header")
    reheaded(copy, NAMES[0], framed(text), tail)
    assert verify(copy) == []


# ---- fuzzing -----------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)
words = st.sampled_from(["shape", "layout", "dtype", "size", "header", "F32", "U8", "rank-00000.safetensors"])
anything = st.recursive(
    scalars | words,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(words | st.text(max_size=6), inner, max_size=6)
    ),
    max_leaves=20,
)


def mutated(draw: Callable[..., Any], body: Any) -> Any:
    """One value somewhere in it replaced, removed or doubled."""
    node, trail = body, []
    while isinstance(node, dict | list) and node and (not trail or draw(st.integers(0, 5))):
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = draw(st.sampled_from(list(keys)))
        trail.append((node, key))
        node = node[key]
    parent, key = trail[-1]
    action = draw(st.sampled_from(["replace", "remove", "double", "shift"]))
    if action == "remove":
        del parent[key]
    elif action == "double" and isinstance(parent, list):
        parent.append(parent[key])
    elif action == "shift" and type(node) is int:
        parent[key] = node + draw(st.sampled_from([-1, 1, 7, 2**31, 2**62, -(2**63)]))
    else:
        parent[key] = draw(anything)
    return body


@quick
@given(st.binary(max_size=200))
def test_fuzz_bytes(raw: bytes) -> None:
    for text in (raw, with_checksum(raw)):
        with pytest.raises(CheckpointError):
            parse_manifest(text)
        with pytest.raises(CheckpointError):
            parse_header(text, len(text) + 8)


@quick
@given(anything)
def test_fuzz_json(value: Any) -> None:
    body = value if isinstance(value, dict) else {"tensors": value, "files": value, "layouts": value}
    with pytest.raises(CheckpointError):
        parse_manifest(seal({"format": "shard4bit", "version": 1, **body}))
    text = json.dumps(value).encode()
    with suppress(CheckpointError):
        assert parse_header(text, len(text) + 8) == []


@quick
@given(st.data())
def test_fuzz_manifests(good: Path, data: st.DataObject) -> None:
    """Sealed anew: what is accepted says the same of the files, or the files do not fit."""
    original = parse_manifest((good / "manifest.json").read_bytes())
    try:
        manifest = parse_manifest(seal(mutated(data.draw, body_of(good))))
    except CheckpointError:
        return
    for key, info in manifest.tensors.items():
        area = sum(r.rect.area for r in info.entries)
        assert area == info.shape[0] * info.shape[1]
        needs(manifest, [(key, Rect(0, info.shape[0], 0, info.shape[1]))])
    assert len(manifest.files) == len(original.files)


@quick
@given(st.data())
def test_fuzz_headers(good: Path, data: st.DataObject) -> None:
    raw = (good / NAMES[0]).read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    changed = json.dumps(mutated(data.draw, json.loads(text))).encode()
    size = len(raw) - len(text) + len(changed)
    try:
        found = parse_header(changed, size)
    except CheckpointError:
        return
    end = 8 + len(changed)
    for part in found:  # one after the other, within the file
        assert part.begin == end
        end += part.rect.shape[0] * part.row_bytes
    assert end == size


# ---- no pickle ---------------------------------------------------------------------------------

BANNED = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"}


def test_nothing_on_the_path_can_execute_a_file() -> None:
    package = Path(shard4bit.__file__).parent
    files = [*(package / "checkpoint").glob("*.py"), package / "api.py", package / "inventory.py"]
    assert len(files) > 12
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {a.name.split(".")[0] for a in node.names} & BANNED, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in BANNED, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in CALLS, (path, node.lineno)
                assert not any(k.arg == "allow_pickle" for k in node.keywords), path


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_not_executed(name: str, copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    raw = pickle.dumps(Trap(mark))
    pickle.loads(raw)
    assert mark.is_dir()  # it would
    mark.rmdir()
    size = (copy / name).stat().st_size
    for text in (raw, raw + bytes(max(0, size - len(raw)))):
        (copy / name).write_bytes(text)
        refused(copy, name)
    torch.save(Trap(mark), copy / name)
    refused(copy, name)
    assert not mark.exists()

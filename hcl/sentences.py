"""Sentences for the trainer: a row of x is the number of a sentence, its positives stand beside it.

`load("pydoc")` and `load("novels")` hand over `Sentences`, the trainer's data, with three encoders.
The corpus itself is made in `hcl.corpus`; the losses are in `hcl.neighbours`, the tasks that judge
an encoder in `hcl.sentence_tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hcl import corpus, sentence_tasks
from hcl.corpus import PAD, Vocabulary
from hcl.sentence_tasks import Task

ENCODERS = ("quickthoughts", "transformer", "bag")
HEADS = 4  # of the transformer's attention
EMBEDDED = 512  # sentences that `embed` reads at once
LONG = 100 * EMBEDDED  # texts from which on it shows its progress


class GRU(nn.Module):
    """A bidirectional GRU over word embeddings: (B, L) numbers to its last states, (B, 2 hidden).

    Padding is left out before the words are looked up, which saves half of the time at 14 words of
    30 and makes a sentence's states independent of the others in its batch.
    """

    def __init__(self, words: int, *, width: int, hidden: int):
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=PAD)
        nn.init.uniform_(self.words.weight, -0.1, 0.1)  # as the released code of quick-thoughts
        self.gru = nn.GRU(width, hidden, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != PAD).sum(dim=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            tokens, lengths, batch_first=True, enforce_sorted=False
        )
        last = self.gru(packed._replace(data=self.words(packed.data)))[1]
        return torch.cat([last[0], last[1]], dim=1)  # one a direction


class QuickThoughts(nn.Module):
    """Two such encoders f and g side by side, nothing shared: (B, L) to (B, 4 hidden), f first.

    Training compares f of a sentence with g of its neighbours; a sentence's embedding is both.
    Source: Logeswaran & Lee 2018, released code (words 620 wide, 600 hidden a direction).
    """

    pair = True  # the output is f and g: chunk(2, dim=1)

    def __init__(self, words: int, *, width: int = 128, hidden: int = 64):
        super().__init__()
        self.f = GRU(words, width=width, hidden=hidden)
        self.g = GRU(words, width=width, hidden=hidden)
        self.out_dim = 4 * hidden

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.f(tokens), self.g(tokens)], dim=1)


class Transformer(nn.Module):
    """A small transformer, the mean of its last states over the words: (B, L) to (B, width).

    Raises: ValueError for a width that the heads cannot share, or more words than ``longest``.
    """

    pair = False

    def __init__(self, words: int, *, width: int = 128, layers: int = 2, longest: int = 512):
        super().__init__()
        if width % HEADS:
            raise ValueError(f"width={width}: a multiple of {HEADS}, the transformer's heads")
        self.words = nn.Embedding(words, width, padding_idx=PAD)
        self.places = nn.Embedding(longest, width)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            width, HEADS, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.out_dim = width

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > (longest := self.places.num_embeddings):
            raise ValueError(f"tokens {tuple(tokens.shape)}: at most {longest} words would do")
        empty = tokens == PAD
        place = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.layers(self.words(tokens) + self.places(place), src_key_padding_mask=empty)
        return _mean(h, ~empty)


class Bag(nn.Module):
    """The mean of the words' embeddings: (B, L) to (B, width). The baseline that reads no order."""

    pair = False

    def __init__(self, words: int, *, width: int = 128):
        super().__init__()
        self.words = nn.Embedding(words, width, padding_idx=PAD)
        self.out_dim = width

    def forward(self, tokens: Tensor) -> Tensor:
        return _mean(self.words(tokens), tokens != PAD)


def _mean(h: Tensor, kept: Tensor) -> Tensor:
    """Mean of states (B, L, d) over the places that are kept (B, L)."""
    weight = kept.to(h).unsqueeze(2)
    return (h * weight).sum(dim=1) / weight.sum(dim=1)


@dataclass(eq=False, kw_only=True)
class Sentences:
    """Sentences in the order of their books (implements `hcl.train.Data`).

    x_*: (n,) int64, numbers of sentences; y_*: (n,) int64, their books. No book is in both parts.
    tokens: (N, L) int32, the words of all of them; book: (N,) int64. tasks: what judges an encoder.
    """

    name: str
    classes: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: Tensor
    book: Tensor
    vocabulary: Vocabulary
    max_words: int
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    tasks: tuple[Task, ...] = ()

    @property
    def x_probe(self) -> Tensor:
        return self.x_train

    @property
    def y_probe(self) -> Tensor:
        return self.y_train

    def inputs(self, x: Tensor) -> Tensor:
        """Words of the sentences x (B,): (B, L) int64, L as many as the longest of them has."""
        return _trimmed(self.tokens[x])

    def next_of(self, x: Tensor) -> Tensor:
        """The sentence after x (B,) in its book; the one before, of a book's last; its only one."""
        ahead, behind = (x + 1).clamp(max=len(self.book) - 1), (x - 1).clamp(min=0)
        follows = (ahead != x) & (self.book[ahead] == self.book[x])
        return torch.where(follows, ahead, behind.where(self.book[behind] == self.book[x], x))

    def views(
        self, x: Tensor, generator: torch.Generator, mate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Words of sentences x (B,) and of the next ones, or of mate: twice (B, L) int64.

        Nothing is drawn. A sentence is not changed: its neighbour is its positive.
        """
        both = self.inputs(torch.cat([x, self.next_of(x) if mate is None else mate]))
        return both[: len(x)], both[len(x) :]

    def blocks(self, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Rows of an epoch's blocks: ``batch`` consecutive training sentences each, (batch,) int64.

        There are n // batch blocks, in random order. Their borders move by a random offset of up to
        half a block; at the ends, where one would stick out, it is pushed back over its neighbour.

        Raises: ValueError for a batch larger than the training part, or below 2.
        """
        n = len(self.x_train)
        if not 2 <= batch <= n:
            raise ValueError(f"batch={batch}: {self.name} has {n} training sentences; 2 to {n}")
        device, half = generator.device, batch // 2
        low, high = -half, n % batch + half
        offset = torch.randint(low, high + 1, (1,), generator=generator, device=device)
        order = torch.randperm(n // batch, generator=generator, device=device)
        starts = (offset + batch * order).clamp(0, n - batch).tolist()
        return (torch.arange(s, s + batch, device=device) for s in starts)

    def encoder(
        self, name: str, *, width: int = 128, hidden: int = 64, layers: int = 2
    ) -> nn.Module:
        """A new encoder: "quickthoughts" (width, hidden), "transformer" (width, layers) or "bag".

        Raises: ValueError for another name, or a number below 1.
        """
        for what, value in (("width", width), ("hidden", hidden), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{what}={value}: 1 or more would do")
        words = len(self.vocabulary)
        if name == "quickthoughts":
            return QuickThoughts(words, width=width, hidden=hidden)
        if name == "transformer":
            return Transformer(words, width=width, layers=layers, longest=self.max_words)
        if name == "bag":
            return Bag(words, width=width)
        raise ValueError(f"encoder={name!r}: sentences have {', '.join(ENCODERS)}")

    @torch.no_grad()
    def embed(self, encoder: nn.Module, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of any texts by an encoder in eval mode: (n, d) float32, in their order.

        Words outside the vocabulary are one unknown word, and only the first max_words are read.
        Raises: ValueError for no texts.
        """
        tokens = self.vocabulary.encode(texts, max_words=self.max_words)
        order = (tokens != PAD).sum(dim=1).argsort(stable=True)  # alike in length: less padding
        training = encoder.training
        encoder.eval()
        try:
            parts = [
                encoder(_trimmed(tokens[rows].to(self.tokens.device))).float().cpu()
                for rows in tqdm(
                    order.split(EMBEDDED), desc="embed", leave=False, disable=len(texts) < LONG
                )
            ]
        finally:
            encoder.train(training)
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy_(0, order, found).numpy()


def _trimmed(rows: Tensor) -> Tensor:
    """Rows (B, L) without the columns in which all are padding, int64."""
    return rows[:, : int((rows != PAD).any(dim=0).sum())].long()


def load(
    name: str = "pydoc",
    *,
    root: str | Path | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    books: int = 0,
    vocabulary: int = 20_000,
    max_words: int = 30,
    held_out: float = 0.1,
    n_train: int = 0,
    n_test: int = 2000,
    tasks: int = 0,
) -> Sentences:
    """A corpus (:func:`hcl.corpus.load`) whose last books are held out of the training.

    books, vocabulary, max_words: as there; the vocabulary is that of all books read. held_out: the
    share of books, one at least, that are for testing. n_train: the first so many of the others'
    sentences, 0 all. n_test: at most so many of those held out, 0 all. tasks: 1 also reads the six
    tasks of :mod:`hcl.sentence_tasks`, 0 none.
    seed: changes nothing, for nothing is drawn.

    Raises: ValueError: an option out of range, or a single book; FileNotFoundError: the corpus or a
    file of a task is missing (the message names it).

    >>> data = load("pydoc", n_train=1000)
    >>> len(data.x_train), data.inputs(data.x_train[:400]).shape[1] <= 30
    (1000, True)
    >>> data.encoder("quickthoughts")(data.inputs(data.x_train[:4])).shape
    torch.Size([4, 256])
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: a share of the books, above 0 and below 1")
    for what, value in (("n_train", n_train), ("n_test", n_test)):
        if value < 0:
            raise ValueError(f"{what}={value}: 0 (all) or more would do")
    if tasks not in (0, 1):
        raise ValueError(f"tasks={tasks}: 1 (the six tasks) or 0 (none) would do")
    judges = tuple(sentence_tasks.load(task, root=root) for task in sentence_tasks.NAMES * tasks)
    for task in judges:
        sentence_tasks.check(task)
    found = corpus.load(name, root=root, vocabulary=vocabulary, max_words=max_words, books=books)
    n, first = _split(found, held_out, n_train)
    end = min(first + n_test, len(found)) if n_test else len(found)
    kept = torch.cat([torch.arange(n), torch.arange(first, end)])  # no other is ever seen
    book = found.book[kept].to(device)
    x = torch.arange(len(kept), device=device)
    return Sentences(
        name=name,
        classes=found.books,
        texts=found.texts[:n] + found.texts[first:end],
        tokens=found.tokens[kept].to(device),
        book=book,
        vocabulary=found.vocabulary,
        max_words=max_words,
        x_train=x[:n],
        y_train=book[:n],
        x_test=x[n:],
        y_test=book[n:],
        tasks=judges,
    )


def _split(found: corpus.Corpus, held_out: float, n_train: int) -> tuple[int, int]:
    """How many sentences are trained on, and the number of the first that is held out."""
    if (count := len(found.books)) < 2:
        raise ValueError(f"{found.name}: {count} book read, two would do: one is held out")
    left = min(max(1, round(held_out * count)), count - 1)
    first = int((found.book < count - left).sum())
    if n_train > first:
        raise ValueError(f"n_train={n_train}: {found.name} has {first} training sentences")
    return n_train or first, first

"""Consecutive sentences: text to sentences, words to numbers, a padded table of both.

`load("novels")` reads a folder of plain-text books, `load("pydoc")` the English text that every
CPython ships. Both hand over a `Corpus`, whose row i + 1 follows row i in its book. Sentences are
split by the library sentencex, imported where it is used.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hcl.atomic import whole_or_nothing
from hcl.imagesets import data_root

PAD, UNKNOWN = 0, 1  # numbers of no word and of a word outside the vocabulary
WORD = re.compile(r"[^\W_]+|[^\w\s]")  # a run of letters and digits, or one mark
SHORTEST = 3  # words of a sentence that is kept
WHOLE = 0.55  # share of lines with a mark at their end, from which on a line is a paragraph
FORMAT = 2  # of the cached table; a change makes it anew


def words(sentence: str) -> list[str]:
    """Lower-case words and marks of a sentence; "it's" and "it 's" are the same three.

    >>> words("It's Mr. Hyde!")
    ['it', "'", 's', 'mr', '.', 'hyde', '!']
    """
    return WORD.findall(sentence.lower())


def sentences(text: str) -> list[str]:
    """Sentences of a text in order; fragments of few words are left out.

    A paragraph is a line; where many lines break off in mid-sentence, they are joined again up to
    a short or an empty one.

    >>> sentences("Call me Ishmael. Some years ago, I went to sea.\\nI. LOOMINGS")
    ['Call me Ishmael.', 'Some years ago, I went to sea.']
    """
    from sentencex import segment

    found = []
    for paragraph in _paragraphs(text):
        for part in segment("en", paragraph):
            if len(words(part)) > SHORTEST and re.search(r"[.?!][\"'”’)\]]*$", part.strip()):
                found.append(part.strip())
    return found


def _paragraphs(text: str) -> list[str]:
    """Lines, or, where most of them break off in mid-sentence, what these were wrapped from."""
    lines = text.splitlines()
    lengths = sorted(len(line.rstrip()) for line in lines if line.strip())
    whole = sum(bool(re.search(r"[^\w\s,]\s*$", line)) for line in lines)  # that end with a mark
    if whole >= WHOLE * len(lengths):
        return lines
    width = lengths[9 * len(lengths) // 10]  # of a line that is full
    found: list[str] = [""]
    for line in lines:
        found[-1] += " " + line.strip()
        if len(line.rstrip()) < 0.75 * width:  # an empty line, or the last of a paragraph
            found.append("")
    return found


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of words, the most frequent first; 0 is no word and 1 an unknown one."""

    listed: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str], *, size: int = 20_000) -> "Vocabulary":
        """The `size` most frequent words; of equally frequent ones, the first of the alphabet.

        Raises: ValueError for fewer than two different words.

        >>> Vocabulary.of(["a rose is a rose"], size=2).listed
        ('a', 'rose')
        """
        if size < 1:
            raise ValueError(f"vocabulary is {size}: one word at least would do")
        counts = Counter(word for text in texts for word in words(text))
        if len(counts) < 2:
            raise ValueError(f"texts have {len(counts)} different words: no sentence says anything")
        return cls(tuple(sorted(counts, key=lambda w: (-counts[w], w))[:size]))

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {word: k for k, word in enumerate(self.listed, start=UNKNOWN + 1)}

    def __len__(self) -> int:
        return len(self.listed) + 2

    def encode(self, texts: Sequence[str], *, max_words: int = 30) -> Tensor:
        """Numbers of the first `max_words` words of each text, padded at the end: (n, L) int32.

        A text without words is one unknown word, so that every row has something to read.
        Raises: ValueError for no texts or max_words < 1.

        >>> Vocabulary(("the", "sea")).encode(["the deep sea", "Sea"])
        tensor([[2, 1, 3],
                [3, 0, 0]], dtype=torch.int32)
        """
        if not len(texts):
            raise ValueError("texts is empty: one sentence at least would do")
        if max_words < 1:
            raise ValueError(f"max_words is {max_words}: one at least would do")
        rows = [[self.numbers.get(w, UNKNOWN) for w in words(t)[:max_words]] for t in texts]
        table = np.full((len(rows), max(1, max(map(len, rows)))), PAD, np.int32)
        for k, row in enumerate(rows):
            table[k, : len(row) or 1] = row or [UNKNOWN]
        return torch.from_numpy(table)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Sentences in the order of their books.

    tokens: (n, L) int32, padded with 0; book: (n,) int64, which of `books` a row is of.
    """

    name: str
    books: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: Tensor
    book: Tensor
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.texts)


def load(
    name: str = "pydoc",
    *,
    root: str | Path | None = None,
    vocabulary: int = 20_000,
    max_words: int = 30,
    books: int = 0,
) -> Corpus:
    """A corpus by its name: "pydoc", or a folder of plain-text books under the data folder.

    "pydoc" is the language reference that every CPython ships, so its text depends on the version
    of Python. A folder holds one book a file (``*.txt``, UTF-8, a paragraph a line or wrapped
    lines); ``books`` takes the first so many, 0 all. A folder's sentences are cached beside it, as
    the table of this vocabulary and length.

    Raises: FileNotFoundError: no such folder, or no book in it; ValueError: a number out of range,
    a book without a sentence, bytes that are not UTF-8 (with their line), or one word alone.

    >>> corpus = load("pydoc")
    >>> len(corpus) > 2000, corpus.tokens.shape[1] <= 30
    (True, True)
    """
    for what, value, least in (
        ("vocabulary", vocabulary, 1), ("max_words", max_words, 1), ("books", books, 0)
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{what} is {value}: {least} or more would do")
    if name == "pydoc":
        return _assemble(name, _pydoc(), vocabulary, max_words)
    folder = data_root(root) / name
    paths = sorted(folder.glob("*.txt"))[: books or None]
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no *.txt in it; put one plain-text book a file there (UTF-8; "
            "Project Gutenberg's would do), or use 'pydoc', which needs no file"
        )
    cache = _cache_of(folder, paths, vocabulary, max_words)
    if cache.exists():
        try:
            return _from_cache(name, cache)
        except (ValueError, KeyError, EOFError, BadZipFile):
            pass  # damaged: made again
    texts = {path.stem: _sentences_of(path) for path in tqdm(paths, desc=name, leave=False)}
    corpus = _assemble(name, texts, vocabulary, max_words)
    _to_cache(corpus, cache)
    return corpus


def _sentences_of(path: Path) -> list[str]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert it") from None
    if not (found := sentences(text)):
        raise ValueError(
            f"{path}: has no sentence of more than {SHORTEST} words that ends in . ? or !; "
            "take it out"
        )
    return found


def _pydoc() -> dict[str, list[str]]:
    """Prose of CPython's help topics: their paragraphs, without grammar, code and headings."""
    from pydoc_data.topics import topics

    found = {}
    for topic in sorted(topics):
        paragraphs = re.split(r"\n\s*\n", topics[topic])
        prose = [" ".join(p.split()) for p in paragraphs if not re.search(r"::=|>>>|\*{4}|={4}", p)]
        if kept := sentences("\n".join(prose)):
            found[topic] = kept
    return found


def _assemble(name: str, texts: dict[str, list[str]], size: int, max_words: int) -> Corpus:
    flat = [text for book in texts.values() for text in book]
    vocabulary = Vocabulary.of(flat, size=size)
    lengths = torch.tensor([len(book) for book in texts.values()])
    book = torch.arange(len(texts)).repeat_interleave(lengths)
    tokens = vocabulary.encode(flat, max_words=max_words)
    return Corpus(name, tuple(texts), tuple(flat), tokens, book, vocabulary)


def _cache_of(folder: Path, paths: list[Path], size: int, max_words: int) -> Path:
    """Named by what decides it: files with sizes and times, vocabulary, length, format."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    key = hashlib.sha256(repr((FORMAT, stats, size, max_words)).encode()).hexdigest()[:12]
    return folder / f"sentences-{key}.npz"


def _to_cache(corpus: Corpus, path: Path) -> None:
    with whole_or_nothing(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            books=np.array(corpus.books),
            texts=np.frombuffer("\n".join(corpus.texts).encode(), np.uint8),
            words=np.frombuffer("\n".join(corpus.vocabulary.listed).encode(), np.uint8),
            tokens=corpus.tokens.numpy(),
            book=corpus.book.numpy(),
        )


def _from_cache(name: str, path: Path) -> Corpus:
    with np.load(path) as held:
        texts, listed = (held[k].tobytes().decode().split("\n") for k in ("texts", "words"))
        return Corpus(
            name,
            tuple(map(str, held["books"])),
            tuple(texts),
            torch.from_numpy(held["tokens"]),
            torch.from_numpy(held["book"]),
            Vocabulary(tuple(listed)),
        )

"""Text to sentences to numbers: what is kept, in which order, and what is refused."""

import pytest
import torch

from hcl import corpus
from hcl.corpus import PAD, UNKNOWN, Vocabulary


def book(folder, name, text):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def shelf(tmp_path):
    """Two books; the second begins with a byte-order mark and has a heading and a fragment."""
    folder = tmp_path / "shelf"
    book(folder, "a", "The sea was calm that night. Nobody spoke of it again.\nIt rained for days.")
    book(
        folder,
        "b",
        b"\xef\xbb\xbfCHAPTER I.\nMr. Hyde left the old house. Gone.\nWho was he to her?",
    )
    return tmp_path


def load(shelf, **options):
    return corpus.load("shelf", root=shelf, **options)


def test_sentences_keep_the_order_of_their_books(shelf):
    found = load(shelf)
    assert found.books == ("a", "b")
    assert found.texts == (
        "The sea was calm that night.", "Nobody spoke of it again.", "It rained for days.",
        "Mr. Hyde left the old house.", "Who was he to her?",
    )  # fmt: skip
    assert found.book.tolist() == [0, 0, 0, 1, 1]
    assert len(found) == 5


WRAPPED = """\
The old house stood at the end of the lane, and
nobody had lived there. It was said that the
sea could be heard in its rooms on calm nights,
though it lay ten miles from the coast.
{}CHAPTER II
{}Nobody spoke of it again that year, for the harvest
had been good, and there was work for all. Then
it rained for days.
"""


@pytest.mark.parametrize("between", ["", "\n"], ids=["no empty lines", "empty lines"])
def test_wrapped_lines_are_joined_to_paragraphs(tmp_path, between):
    book(tmp_path / "shelf", "a", WRAPPED.format(between, between))
    found = corpus.load("shelf", root=tmp_path)
    assert found.texts == (
        "The old house stood at the end of the lane, and nobody had lived there.",
        "It was said that the sea could be heard in its rooms on calm nights, though it lay ten "
        "miles from the coast.",
        "Nobody spoke of it again that year, for the harvest had been good, and there was work for "
        "all.",
        "Then it rained for days.",
    )


def test_numbers_lead_back_to_the_words(shelf):
    found = load(shelf)
    for row, text in zip(found.tokens, found.texts, strict=True):
        numbers = [k for k in row.tolist() if k != PAD]
        assert [found.vocabulary.listed[k - 2] for k in numbers] == corpus.words(text)
        assert not row[len(numbers) :].any()
    assert found.tokens.dtype == torch.int32


def test_a_small_vocabulary_keeps_the_most_frequent(shelf):
    found = load(shelf, vocabulary=3)
    assert found.vocabulary.listed == (".", "it", "the")  # 4, 2 and 2 times
    assert len(found.vocabulary) == 5
    assert (found.tokens == UNKNOWN).sum() > 10
    assert found.tokens.max() == 4


def test_a_long_sentence_is_cut(shelf):
    found = load(shelf, max_words=4)
    assert found.tokens.shape == (5, 4)
    assert (found.tokens > PAD).all()


def test_the_second_load_reads_the_cache_and_a_changed_book_does_not(shelf, monkeypatch):
    first = load(shelf)
    monkeypatch.setattr(corpus, "sentences", lambda text: pytest.fail("read again"))
    second = load(shelf)
    assert second.texts == first.texts
    assert second.books == first.books
    assert second.vocabulary == first.vocabulary
    assert torch.equal(second.tokens, first.tokens)
    assert torch.equal(second.book, first.book)
    monkeypatch.undo()
    book(shelf / "shelf", "a", "Something else was written here. Then it was done.")
    assert load(shelf).texts[0] == "Something else was written here."
    assert len(load(shelf, books=1).books) == 1


def test_words_of_tokenised_and_of_running_text_agree():
    assert corpus.words("it 's a `` film ''") == ["it", "'", "s", "a", "`", "`", "film", "'", "'"]
    assert corpus.words("It's") == corpus.words("it 's")
    assert corpus.words("naïve Äther 1984 snake_case") == [
        "naïve", "äther", "1984", "snake", "case"
    ]  # fmt: skip


def test_a_text_without_words_has_one_unknown():
    rows = Vocabulary(("a",)).encode(["", "a"])
    assert rows.tolist() == [[UNKNOWN], [2]]


def test_the_built_in_text_is_prose():
    found = corpus.load()
    assert len(found) > 2000
    assert not any("::=" in text or ">>>" in text for text in found.texts)
    letters = sum(sum(c.isalpha() or c.isspace() for c in t) for t in found.texts)
    assert letters > 0.8 * sum(map(len, found.texts))
    assert found.texts == corpus.load().texts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"Fine words are here.\nBad \xff byte in this line.\n", r"bad\.txt, line 2: not UTF-8"),
        ("", r"bad\.txt: has no sentence"),
        ("CHAPTER I.\n\n", r"bad\.txt: has no sentence"),
    ],
)
def test_a_bad_book_is_named(tmp_path, text, message):
    book(tmp_path / "shelf", "bad", text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    assert not list((tmp_path / "shelf").glob("*.npz"))


def test_a_missing_folder_says_what_to_put_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*one plain-text book a file"):
        corpus.load("nowhere", root=tmp_path)


def test_a_corpus_of_one_word_is_refused():
    with pytest.raises(ValueError, match="different words"):
        Vocabulary.of(["very very very"])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vocabulary": 0}, "vocabulary is 0"), ({"max_words": 0}, "max_words is 0")],
)
def test_impossible_options_are_refused(shelf, change, message):
    with pytest.raises(ValueError, match=message):
        load(shelf, **change)
    with pytest.raises(ValueError, match="texts is empty"):
        Vocabulary(("a",)).encode([])


@pytest.mark.parametrize("change", [{"books": -1}, {"vocabulary": 0}, {"max_words": 0}], ids=str)
def test_a_number_out_of_range_is_refused_before_a_book_is_read(change, tmp_path):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: "):
        corpus.load("nowhere", root=tmp_path, **change)


def test_a_damaged_table_is_made_again(tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "one.txt").write_text("Call me by my name. I went far to the sea.\n")
    first = corpus.load("few", root=tmp_path)
    (cache,) = (tmp_path / "few").glob("*.npz")
    whole = cache.read_bytes()
    for damage in (b"", whole[:100], b"no zip"):
        cache.write_bytes(damage)
        assert corpus.load("few", root=tmp_path).texts == first.texts
        assert len(cache.read_bytes()) == len(whole)

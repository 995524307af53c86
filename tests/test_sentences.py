"""Sentences for the trainer: neighbours, blocks, held-out books, encoders, and what is refused."""

import itertools

import numpy as np
import pytest
import torch

from hcl import corpus, sentence_tasks, sentences
from hcl.corpus import PAD, UNKNOWN, Vocabulary
from hcl.sentences import ENCODERS, Sentences, load

NOUNS = ("sea", "ship", "storm", "harbour", "captain", "whale", "island")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def write(root, lengths, folder="shelf"):
    """Books of so many sentences each, no two alike, of five to eleven words."""
    (root / folder).mkdir()
    for b, n in enumerate(lengths):
        lines = [
            f"Line {k} of book {b} names " + " and ".join(NOUNS[: 1 + (b + k) % 4]) + "."
            for k in range(n)
        ]
        (root / folder / f"{b}.txt").write_text("\n".join(lines))
    return root


@pytest.fixture
def shelf(tmp_path):
    return write(tmp_path, (7, 1, 5, 4))


@pytest.fixture(scope="module")
def pydoc():
    return load("pydoc", vocabulary=2000)


def of_books(*lengths, n_train=None):
    """The data object itself, of books without words worth reading."""
    book = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    n = n_train or len(book)
    x = torch.arange(len(book))
    return Sentences(
        name="made", classes=tuple(map(str, range(len(lengths)))), texts=("the sea",) * len(book),
        tokens=torch.full((len(book), 2), 2, dtype=torch.int32), book=book, max_words=9,
        vocabulary=Vocabulary(("the", "sea")), x_train=x[:n], y_train=book[:n], x_test=x[n:],
        y_test=book[n:],
    )  # fmt: skip


# what is read


def test_the_last_books_are_held_out_whole(shelf):
    data = load("shelf", root=shelf, held_out=0.5)
    assert data.classes == ("0", "1", "2", "3")
    assert data.x_train.tolist() == list(range(8))
    assert data.y_train.tolist() == [0] * 7 + [1]
    assert data.x_test.tolist() == list(range(8, 17))
    assert data.y_test.tolist() == [2] * 5 + [3] * 4
    assert data.x_probe is data.x_train
    assert data.y_probe is data.y_train
    assert data.tasks == ()


@pytest.mark.parametrize(("held_out", "left"), [(0.01, 1), (0.3, 1), (0.4, 2), (0.99, 3)])
def test_one_book_at_least_is_on_either_side(shelf, held_out, left):
    data = load("shelf", root=shelf, held_out=held_out)
    assert data.y_test.unique().tolist() == [0, 1, 2, 3][-left:]
    assert data.y_train.unique().tolist() == [0, 1, 2, 3][:-left]


def test_rows_are_the_sentences_of_the_corpus(shelf):
    whole = corpus.load("shelf", root=shelf)
    data = load("shelf", root=shelf, n_train=6, held_out=0.5)
    assert data.texts == whole.texts[:6] + whole.texts[8:]
    for row, text in zip(data.tokens, data.texts, strict=True):
        numbers = [k for k in row.tolist() if k != PAD]
        assert [data.vocabulary.listed[k - 2] for k in numbers] == corpus.words(text)
    assert (len(data.x_train), len(data.x_test)) == (6, 9)
    assert data.tokens.dtype == torch.int32
    assert data.book[data.x_test].equal(data.y_test)


def test_a_cut_of_the_training_part_has_no_neighbour_beyond_it(shelf):
    data = load("shelf", root=shelf, n_train=5, held_out=0.3)
    assert data.next_of(data.x_train).tolist() == [1, 2, 3, 4, 3]


def test_numbers_of_books_words_and_length_are_handed_on(shelf):
    data = load("shelf", root=shelf, books=2, vocabulary=5, max_words=6)
    assert data.classes == ("0", "1")
    assert len(data.vocabulary) == 7
    assert data.tokens.shape == (8, 6)
    assert data.max_words == 6


def test_pydoc_needs_no_file_and_the_seed_changes_nothing(pydoc):
    again = load("pydoc", vocabulary=2000, seed=5)
    assert again.tokens.equal(pydoc.tokens)
    assert not set(pydoc.y_train.tolist()) & set(pydoc.y_test.tolist())
    assert len(pydoc.x_test) > 20


# words, neighbours, blocks


def test_inputs_are_the_words_without_needless_padding(pydoc):
    lengths = (pydoc.tokens != PAD).sum(dim=1)
    x = lengths.argsort()[[0, 40, 80]]
    rows = pydoc.inputs(x)
    assert rows.shape == (3, lengths[x].max())
    assert rows.dtype == torch.int64
    for row, k in zip(rows, x, strict=True):
        known = [pydoc.vocabulary.numbers.get(w, UNKNOWN) for w in corpus.words(pydoc.texts[k])]
        assert row[row != PAD].tolist() == known[: pydoc.max_words]


def test_a_neighbour_is_of_the_same_book():
    data = of_books(3, 1, 2)
    assert data.next_of(torch.arange(6)).tolist() == [1, 2, 1, 3, 5, 4]
    assert of_books(1).next_of(torch.tensor([0])).tolist() == [0]
    assert of_books(2, 1).next_of(torch.arange(3)).tolist() == [1, 0, 2]


def test_views_are_a_sentence_and_its_neighbour_or_its_mate(pydoc):
    x = torch.tensor([4, 100, 7])
    for mate, other in ((None, pydoc.next_of(x)), (torch.tensor([9, 8, 7]),) * 2):
        v1, v2 = pydoc.views(x, gen(), mate)
        assert torch.cat([v1, v2]).shape == (6, v1.shape[1])
        for view, rows in ((v1, x), (v2, other)):
            want = pydoc.inputs(rows)
            assert view[:, : want.shape[1]].equal(want)
            assert not view[:, want.shape[1] :].any()


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (12, 3), (9, 9), (11, 9), (7, 2), (400, 40)])
def test_blocks_are_consecutive_and_as_many_as_fit(n, batch):
    data = of_books(n, 5, n_train=n)
    seen, firsts, ends = set(), set(), [0, 0]
    for seed in range(60):
        blocks = list(data.blocks(batch, gen(seed)))
        assert len(blocks) == n // batch
        for block in blocks:
            assert block.tolist() == list(range(block[0], block[0] + batch))
            assert 0 <= block[0] <= n - batch
        rows = set(itertools.chain.from_iterable(b.tolist() for b in blocks))
        assert len(rows) >= (n // batch) * batch - batch // 2  # at most half a block twice
        seen |= rows
        ends = [ends[0] + (0 in rows), ends[1] + (n - 1 in rows)]
        firsts.add(min(int(b[0]) for b in blocks))
    assert seen == set(range(n))
    assert min(ends) > 15  # neither end is neglected
    assert len(firsts) > 1 or n == batch


def test_blocks_come_in_random_order_and_a_seed_repeats_them():
    data = of_books(400)
    one, two, three = ([int(b[0]) for b in data.blocks(20, gen(s))] for s in (1, 1, 2))
    assert one == two
    assert one != sorted(one)
    assert [s % 20 for s in one] != [s % 20 for s in three]  # other borders


# encoders


@pytest.fixture(params=ENCODERS)
def encoder(request, pydoc):
    torch.manual_seed(0)
    return pydoc.encoder(request.param, width=16, hidden=8, layers=2)


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(encoder, pydoc):
    x = torch.arange(50)
    padded = pydoc.tokens[x].long()
    for mode in (True, False):
        encoder.train(mode)
        together = encoder(padded)
        assert together.shape == (50, encoder.out_dim)
        alone = torch.cat([encoder(pydoc.inputs(row[None])) for row in x])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_padding_gets_no_gradient(encoder, pydoc):
    encoder(pydoc.tokens[:20].long()).square().sum().backward()
    tables = [m for m in encoder.modules() if isinstance(m, torch.nn.Embedding)]
    words = [m.weight.grad for m in tables if m.num_embeddings == len(pydoc.vocabulary)]
    assert len(words) == 1 + encoder.pair
    for grad in words:
        assert not grad[PAD].any()
        read = pydoc.tokens[:20].unique()
        assert grad[read[read != PAD]].any(dim=1).all()


def test_order_matters_but_not_to_the_bag(encoder, pydoc):
    words = pydoc.inputs(torch.tensor([3]))
    same = torch.allclose(encoder(words), encoder(words.flip(1)), atol=1e-5)
    assert same == isinstance(encoder, sentences.Bag)


def test_f_and_g_are_two_encoders(pydoc):
    torch.manual_seed(0)
    encoder = pydoc.encoder("quickthoughts", width=16, hidden=8)
    f, g = encoder(pydoc.inputs(torch.arange(6))).chunk(2, dim=1)
    assert f.shape == g.shape == (6, 16)
    assert not torch.allclose(f, g, atol=1e-3)
    f.sum().backward()
    assert all(p.grad is not None for p in encoder.f.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in encoder.g.parameters())
    assert [pydoc.encoder(name).pair for name in ENCODERS] == [True, False, False]


def test_the_states_of_the_gru_are_those_of_its_equations():
    torch.manual_seed(1)
    encoder = sentences.GRU(9, width=3, hidden=2).double()
    gru, sentence = encoder.gru, [4, 2, 7]

    def run(words, end):
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_i, w_h, b_i, b_h = (getattr(gru, f"{kind}_l0{end}") for kind in kinds)
        h = torch.zeros(2, dtype=torch.float64)
        for word in words:
            (ri, zi, ni), (rh, zh, nh) = (
                part.chunk(3) for part in (w_i @ encoder.words.weight[word] + b_i, w_h @ h + b_h)
            )
            reset, update = torch.sigmoid(ri + rh), torch.sigmoid(zi + zh)
            h = (1 - update) * torch.tanh(ni + reset * nh) + update * h
        return h

    want = torch.cat([run(sentence, ""), run(sentence[::-1], "_reverse")])
    found = encoder(torch.tensor([[5, 6, 5, 6, 3], [*sentence, PAD, PAD]]))[1]
    torch.testing.assert_close(found, want)


def test_the_bag_is_a_mean():
    bag = sentences.Bag(9, width=4)
    found = bag(torch.tensor([[3, 4, 4, PAD]]))[0]
    torch.testing.assert_close(found, (bag.words.weight[3] + 2 * bag.words.weight[4]) / 3)


# embeddings of other texts


def test_embed_keeps_the_order_and_the_mode(encoder, pydoc, monkeypatch):
    monkeypatch.setattr(sentences, "EMBEDDED", 7)
    texts = pydoc.texts[:40]
    encoder.train()
    found = pydoc.embed(encoder, texts)
    assert encoder.training
    assert (found.shape, found.dtype) == ((40, encoder.out_dim), np.float32)
    encoder.eval()
    want = encoder(pydoc.inputs(torch.arange(40))).detach().numpy()
    np.testing.assert_allclose(found, want, atol=1e-5)
    pydoc.embed(encoder, texts[:1])
    assert not encoder.training


def test_embed_reads_texts_without_a_known_word_and_cuts_long_ones(encoder, pydoc):
    long = "the " * 29 + "end of it all, and more"
    found = pydoc.embed(encoder, ["", "qqqq", long, " ".join(long.split()[:30])])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(found[2], found[3], atol=1e-6)
    with pytest.raises(ValueError, match="texts is empty"):
        pydoc.embed(encoder, [])


def test_the_mode_is_restored_when_an_encoder_fails(pydoc):
    class Broken(torch.nn.Module):
        def forward(self, tokens):
            raise RuntimeError("broken")

    encoder = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        pydoc.embed(encoder, ["the sea"])
    assert encoder.training


def six_tasks(root):
    """All files of the six tasks, laid out as SentEval has them, 20 lines a label."""
    files = {
        name: "the sea was calm\nnobody spoke\n" * 10
        for pair in sentence_tasks.TWO_FILES.values()
        for name in pair
    }
    files |= dict.fromkeys(
        sentence_tasks.TREC, "LOC:city Where is Rome ?\nNUM:dist How far ?\n" * 2
    )
    pairs = "1\t5\t6\tA ship.\tThe ship.\n0\t7\t8\tA storm.\tNo.\n" * 2
    pairs = f"Quality\tID\tID\tString\tString\n{pairs}"
    for name, text in (files | dict.fromkeys(sentence_tasks.MSRP, pairs)).items():
        path = root / "sentences" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_six_tasks_are_read_and_embedded(shelf):
    six_tasks(shelf)
    data = load("shelf", root=shelf, tasks=1)
    assert tuple(task.name for task in data.tasks) == sentence_tasks.NAMES
    encoder = data.encoder("quickthoughts", width=8, hidden=2)
    for task in data.tasks:
        x = sentence_tasks.features(task, lambda texts: data.embed(encoder, texts))
        assert x.shape == (len(task.labels), 16 if task.name == "MSRP" else 8)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("MR/rt-polarity.neg", "one line\n", r"MR has \[1, 20\] rows"),
        ("TREC/train_5500.label", "LOC:city Where ?\nLOC:city Who ?\n", r"TREC has \[2\] rows"),
        ("MRPC/msr_paraphrase_test.txt", "Quality\tID\tID\tString\tString\n", "MSRP.* 0 to test"),
    ],
    ids=["few", "one label", "no test part"],
)
def test_a_task_that_cannot_be_judged_is_refused_before_training(shelf, file, text, message):
    six_tasks(shelf)
    (shelf / "sentences" / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load("shelf", root=shelf, tasks=1)


def test_a_missing_task_is_named_before_anything_else(shelf):
    six_tasks(shelf)
    (shelf / "sentences" / "MR" / "rt-polarity.pos").unlink()
    with pytest.raises(FileNotFoundError, match=r"rt-polarity\.pos: is missing"):
        load("shelf", root=shelf, tasks=1)
    load("shelf", root=shelf)


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0.0}, "held_out=0.0: a share"),
        ({"held_out": 1.0}, "held_out=1.0: a share"),
        ({"held_out": -0.2}, "held_out=-0.2"),
        ({"held_out": float("nan")}, "held_out=nan"),
        ({"n_train": -1}, "n_train=-1"),
        ({"n_train": 14}, "n_train=14: shelf has 13 training sentences"),
        ({"tasks": 2}, "tasks=2"),
        ({"books": 1}, "shelf: 1 book read, two would do"),
        ({"books": -1}, "books is -1"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"max_words": 0}, "max_words is 0"),
    ],
)
def test_options_out_of_range_are_refused(shelf, options, message):
    with pytest.raises(ValueError, match=message):
        load("shelf", root=shelf, **options)


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("nowhere", root=tmp_path)


@pytest.mark.parametrize("batch", [0, 1, 9])
def test_a_batch_that_does_not_fit_is_refused_at_the_call(batch):
    with pytest.raises(ValueError, match=f"batch={batch}: made has 8 training sentences; 2 to 8"):
        of_books(8).blocks(batch, gen())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lstm", {}, "encoder='lstm': sentences have quickthoughts, transformer, bag"),
        ("bag", {"width": 0}, "width=0"),
        ("quickthoughts", {"hidden": 0}, "hidden=0"),
        ("transformer", {"layers": 0}, "layers=0"),
        ("transformer", {"width": 30}, "width=30: a multiple of 4"),
    ],
)
def test_encoders_that_cannot_be_are_refused(pydoc, name, options, message):
    with pytest.raises(ValueError, match=message):
        pydoc.encoder(name, **options)


def test_a_transformer_reads_no_more_words_than_it_has_places():
    encoder = of_books(3).encoder("transformer", width=8, layers=1)
    with pytest.raises(ValueError, match=r"tokens \(1, 10\): at most 9 words"):
        encoder(torch.full((1, 10), 2))

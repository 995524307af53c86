"""The six tasks: what is read of their files, how they are judged, what is refused."""

import re

import numpy as np
import pytest

from hcl import sentence_tasks
from hcl.sentence_tasks import NAMES, Task, features, judge, load

HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


@pytest.fixture
def folder(tmp_path):
    """All files of the six tasks, a few lines each."""
    for files in sentence_tasks.TWO_FILES.values():
        for file, text in zip(files, ("bad one\nbad two\n\n", "good one\n"), strict=True):
            write(tmp_path, file, text)
    write(
        tmp_path, "TREC/train_5500.label", "LOC:city Where is Rome\xf0now ?\nNUM:dist How far ?\n"
    )
    write(tmp_path, "TREC/TREC_10.label", "ABBR:exp What is NATO ?\n")
    train, test = HEADER + "1\t5\t6\tA cat.\tThe cat.\n", HEADER + "0\t7\t8\tA dog.\tNo – “cat”.\n"
    write(tmp_path, sentence_tasks.MSRP[0], "\ufeff" + train, "utf-8")
    write(tmp_path, sentence_tasks.MSRP[1], test, "utf-8")
    return tmp_path


def write(root, file, text, encoding="latin-1"):
    path = root / "sentences" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def test_two_files_are_two_classes(folder):
    task = load("MR", root=folder)
    assert task.texts == ("bad one", "bad two", "good one")
    assert task.labels.tolist() == [0, 0, 1]
    assert task.n_train == 0


def test_questions_have_coarse_classes_and_a_test_part(folder):
    task = load("TREC", root=folder)
    assert task.texts == ("Where is Romeðnow ?", "How far ?", "What is NATO ?")
    assert task.labels.tolist() == [1, 2, 0]  # ABBR, LOC, NUM
    assert task.n_train == 2


def test_paraphrases_are_pairs(folder):
    task = load("MSRP", root=folder)
    assert task.texts == ("A cat.", "A dog.")
    assert task.second == ("The cat.", "No – “cat”.")
    assert task.labels.tolist() == [1, 0]
    assert task.n_train == 1


def test_features_of_a_pair_do_not_depend_on_its_order():
    rng = np.random.default_rng(0)
    vectors = {text: rng.standard_normal(3) for text in "abcd"}

    def embed(texts):
        return np.stack([vectors[t] for t in texts])

    one = Task("MSRP", ("a", "b"), np.array([0, 1]), second=("c", "d"))
    other = Task("MSRP", ("c", "d"), np.array([0, 1]), second=("a", "b"))
    np.testing.assert_array_equal(features(one, embed), features(other, embed))
    want = np.concatenate([abs(vectors["a"] - vectors["c"]), vectors["a"] * vectors["c"]])
    np.testing.assert_allclose(features(one, embed)[0], want)
    assert features(Task("MR", ("a",), np.array([0])), embed).shape == (1, 3)


def test_folds_judge_what_can_be_learned_and_nothing_else():
    rng = np.random.default_rng(1)
    y = np.arange(300) % 2
    task = Task("MR", ("",) * 300, y)
    x = rng.standard_normal((300, 5))
    assert 0.35 < judge(task, x)["accuracy"] < 0.65  # chance
    x[:, 0] += 8 * y
    assert judge(task, x)["accuracy"] > 0.97
    assert judge(task, x, seed=3) == judge(task, x, seed=3)


def test_the_sets_own_test_part_is_what_is_judged():
    """Labels of the test part are turned around: a model of the training part is always wrong."""
    y = np.arange(100) % 2
    x = np.column_stack([y, np.zeros(100)]).astype(float)
    labels = np.where(np.arange(100) < 80, y, 1 - y)
    found = judge(Task("MSRP", ("",) * 100, labels, second=("",) * 100, n_train=80), x)
    assert found == {"accuracy": 0.0, "f1": 0.0}


def test_f1_is_of_the_positive_class():
    y = np.array([0, 1] * 40 + [0, 0, 1, 1])
    x = np.array([[v] for v in [0.0, 1.0] * 40 + [1.0, 0.0, 1.0, 0.0]])
    found = judge(Task("MSRP", ("",) * 84, y, second=("",) * 84, n_train=80), x)
    assert found == {"accuracy": 0.5, "f1": pytest.approx(0.5)}  # one hit, one miss, one false


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(folder, name):
    kinds = {**sentence_tasks.TWO_FILES, "TREC": sentence_tasks.TREC, "MSRP": sentence_tasks.MSRP}
    gone = folder / "sentences" / kinds[name][1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(gone))}: is missing; SentEval"):
        load(name, root=folder)


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("MR", "MR/rt-polarity.neg", b"", r"\.neg: is empty"),
        ("CR", "CR/custrev.pos", b"fine\nbad \xff\n", r"\.pos, line 2: not utf-8"),
        ("TREC", "TREC/TREC_10.label", b"HUM:ind Who ?\nWho was he ?\n", r"label, line 2: is 'Who"),
        ("MSRP", "MRPC/msr_paraphrase_test.txt", b"head\n1\t2\t3\tone\n", r"line 2: has 4"),
        ("MSRP", "MRPC/msr_paraphrase_train.txt", b"head\nx\t2\t3\ta\tb\n", r"line 2: has 5.*'x'"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(folder, name, file, text, message):
    (folder / "sentences" / file).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        load(name, root=folder)


def test_what_does_not_fit_is_refused():
    task = Task("MR", ("a", "b"), np.array([0, 1]))
    with pytest.raises(ValueError, match="name is 'SST'"):
        load("SST")
    with pytest.raises(ValueError, match="x has 3 rows and MR 2"):
        judge(task, np.zeros((3, 1)))
    with pytest.raises(ValueError, match="NaN"):
        judge(task, np.full((2, 1), np.nan))

"""Loading pictures (real digits, and tiny sets written in the published layouts) and encoders."""

import functools
import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision import datasets

from hcl import imagesets, vision
from hcl.views import GENTLE, SIMCLR, Augmentation
from hcl.vision import DamagedDataError, load

RANDOM = np.random.default_rng(0)
FOLDERS = {name: s.folder for name, s in imagesets.SOURCES.items() if name != "digits"}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on this machine that serves `tmp_path`; the value is its address."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def pictures(n, *shape):
    return RANDOM.integers(0, 256, (n, *shape), dtype=np.uint8)


# --- tiny data sets in the published layouts, with the checksums torchvision should expect -------


def write_cifar(root, monkeypatch, kind="CIFAR10", per_file=20):
    cls, many = getattr(datasets, kind), kind == "CIFAR10"
    folder, key = root / cls.base_folder, "labels" if many else "fine_labels"
    classes = 10 if many else 100
    folder.mkdir(parents=True)

    def batch(name):
        x, y = pictures(per_file, 3 * 32 * 32), RANDOM.integers(0, classes, per_file).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": x, key: y}))
        return [name, md5(folder / name)], x.reshape(-1, 3, 32, 32), y

    names = [f"data_batch_{i}" for i in range(1, 6)] if many else ["train"]
    train, test = [batch(name) for name in names], batch("test_batch" if many else "test")
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: [f"class {i}" for i in range(classes)]}))
    monkeypatch.setattr(cls, "train_list", [entry for entry, _, _ in train])
    monkeypatch.setattr(cls, "test_list", [test[0]])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})
    return (
        np.concatenate([x for _, x, _ in train]),
        [label for _, _, y in train for label in y],
        *test[1:],
    )


def write_stl10(root, monkeypatch):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    x = {part: pictures(n, 3, 96, 96) for part, n in (("train", 6), ("test", 4), ("unlabeled", 9))}
    y = {part: RANDOM.integers(1, 11, len(x[part]), dtype=np.uint8) for part in ("train", "test")}
    for part, images in x.items():
        images.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # column by column
    for part, labels in y.items():
        labels.tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))

    def listed(*names):
        return [[name, md5(folder / name)] for name in names]

    train = listed("train_X.bin", "train_y.bin", "unlabeled_X.bin")
    monkeypatch.setattr(datasets.STL10, "train_list", train)
    monkeypatch.setattr(datasets.STL10, "test_list", listed("test_X.bin", "test_y.bin"))
    return x, y


def idx(array):
    """LeCun's idx format: type 8 = uint8, the shape as big-endian integers, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_fashionmnist(root, monkeypatch=None):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    parts = {}
    for part, n in (("train", 12), ("t10k", 5)):
        parts[part] = pictures(n, 28, 28), RANDOM.integers(0, 10, n, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(parts[part][0]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(parts[part][1]))
    return parts


def write_tinyimagenet(root, monkeypatch):
    folder = root / "tiny-imagenet-200"
    ids = ["n02", "n01", "n03"]
    monkeypatch.setattr(imagesets, "TINYIMAGENET_PER_CLASS", 2)
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(ids) + "\n")
    (folder / "words.txt").write_text("n01\tdog, hound\nn02\tcat\nn03\toak\nn99\tother\n")
    for label, wnid in enumerate(ids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(2):
            flat = Image.new("RGB" if i else "L", (64, 64), (80 * label,) * 3 if i else 80 * label)
            flat.save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", quality=95)
        Image.new("RGB", (64, 64), (0, 0, 80 * label)).save(
            folder / "val" / "images" / f"val_{label}.JPEG", quality=95
        )
    rows = [f"val_{label}.JPEG\t{wnid}\t0\t0\t9\t9" for label, wnid in enumerate(ids)]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows[::-1]) + "\n")


def write_cifar100(root, monkeypatch):
    return write_cifar(root, monkeypatch, "CIFAR100")


WRITERS = {
    "cifar10": write_cifar,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "fashionmnist": write_fashionmnist,
    "tinyimagenet": write_tinyimagenet,
}


# --- digits: real data ---------------------------------------------------------------------------


def test_digits_are_scikit_learns_split_in_the_classes_proportions():
    data = load("digits")
    assert data.x_train.shape == (1257, 1, 8, 8)
    assert data.x_test.shape == (540, 1, 8, 8)
    assert data.x_train.dtype == torch.uint8
    assert data.y_train.dtype == torch.int64
    assert data.classes == tuple("0123456789")
    assert data.augmentation == GENTLE
    every = np.bincount(load_digits().target)
    assert np.abs(np.bincount(data.y_train) - 0.7 * every).max() <= 1
    ours = torch.cat([data.x_train, data.x_test]).flatten(1).float() / 255 * 16
    theirs = load_digits().data
    assert np.abs(np.sort(ours.sum(1)) - np.sort(theirs.sum(1))).max() < 64 * 16 / 510
    whole = {tuple(row) for row in theirs.astype(int).tolist()}
    assert {tuple(row) for row in ours.round().int().tolist()} == whole


def test_the_seed_draws_the_split():
    a, b, c = load("digits"), load("digits"), load("digits", seed=1)
    assert torch.equal(a.x_train, b.x_train)
    assert torch.equal(a.y_test, b.y_test)
    assert not torch.equal(a.x_train, c.x_train)


def test_probe_rows_are_the_training_rows_where_all_are_labelled():
    data = load("digits", n_train=100)
    assert data.x_probe is data.x_train
    assert data.y_probe is data.y_train


def test_inputs_have_mean_zero_and_deviation_one():
    data = load("digits")
    x = data.inputs(data.x_train)
    assert x.dtype == torch.float32
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(x[:3], data.inputs(data.x_train[:3]))


def test_views_are_two_normalised_draws():
    data = load("digits")
    x = data.x_train[:64]
    first, second = data.views(x, torch.Generator().manual_seed(0))
    again, _ = data.views(x, torch.Generator().manual_seed(0))
    assert first.shape == second.shape == (64, 1, 8, 8)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert first.min() >= data.inputs(torch.zeros_like(x)).min() - 1e-6
    similar = torch.cosine_similarity(first.flatten(1), data.inputs(x).flatten(1))
    swapped = torch.cosine_similarity(first.flatten(1), data.inputs(x.roll(1, 0)).flatten(1))
    assert similar.mean() > swapped.mean() + 0.2


# --- options -------------------------------------------------------------------------------------


def test_subsets_keep_the_classes_proportions():
    data = load("digits", n_train=200, n_test=101)
    assert len(data.x_train) == 200
    assert np.bincount(data.y_train, minlength=10).tolist() == pytest.approx([20] * 10, abs=1)
    assert len(data.x_test) == len(data.y_test) == 101
    other = load("digits", n_train=200, seed=3)
    assert not torch.equal(data.x_train, other.x_train)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=60), st.data())
def test_subset_draws_distinct_rows_by_turns(labels, data):
    y = np.array(labels)
    n = data.draw(st.integers(1, len(y)))
    rows = vision.subset(y, n, seed=data.draw(st.integers(0, 3)))
    assert len(set(rows.tolist())) == n
    assert (np.diff(rows) > 0).all()
    share = n / len(y)
    for label in set(labels):  # Sainte-Laguë: no class is a whole turn from its share
        assert abs((y[rows] == label).sum() - share * (y == label).sum()) < 1 + 0.5 * len(
            set(labels)
        )


def test_subset_of_equal_classes_is_equal():
    y = np.repeat(np.arange(7), 30)
    assert np.bincount(y[vision.subset(y, 70, seed=1)]).tolist() == [10] * 7


def test_resized_agrees_with_pillow():
    x = pictures(5, 3, 24, 24)
    ours = vision.resized(torch.from_numpy(x), 9).numpy()
    for i in range(5):
        theirs = Image.fromarray(x[i].transpose(1, 2, 0)).resize((9, 9), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(theirs).transpose(2, 0, 1).astype(int) - ours[i]).max() <= 1
    assert load("digits", size=16).x_test.shape == (540, 1, 16, 16)


def test_own_statistics_are_those_of_the_training_pictures(tmp_path, monkeypatch):
    x, *_ = write_cifar(tmp_path, monkeypatch)
    data = load("cifar10", root=tmp_path)
    np.testing.assert_allclose(data.mean.flatten(), (x / 255).mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(data.std.flatten(), (x / 255).std((0, 2, 3)), atol=1e-6)


def test_released_statistics_are_the_released_codes(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    data = load("cifar10", root=tmp_path, statistics="released")
    assert data.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert data.std.flatten().tolist() == pytest.approx([0.2023, 0.1994, 0.2010])


def test_view_size_and_augmentation(tmp_path, monkeypatch):
    write_stl10(tmp_path, monkeypatch)
    data = load("stl10", root=tmp_path, view_size=32)
    first, second = data.views(data.x_train[:2], torch.Generator())
    assert first.shape == second.shape == (2, 3, 32, 32)
    assert data.inputs(data.x_test[:2]).shape == (2, 3, 96, 96)
    own = Augmentation(blur=0.0)
    assert load("digits", augmentation=own).augmentation == own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "imagenet"}, "cifar10, cifar100, stl10, fashionmnist, tinyimagenet"),
        ({"n_train": 1258}, "n_train=1258.*1257"),
        ({"n_test": 0}, "n_test=0.*540"),
        ({"size": 0}, "size=0"),
        ({"view_size": 0}, "side=0"),
        ({"statistics": "mine"}, "'own' or 'released'"),
        ({"statistics": "released"}, "colour"),
    ],
)
def test_what_cannot_be_loaded_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(**{"name": "digits", **options})


# --- the real sets' layouts ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, monkeypatch, kind):
    x_train, y_train, x_test, y_test = write_cifar(tmp_path, monkeypatch, kind)
    data = load(kind.lower(), root=tmp_path)
    assert torch.equal(data.x_train, torch.from_numpy(x_train))
    assert torch.equal(data.x_test, torch.from_numpy(x_test))
    assert data.y_train.tolist() == y_train
    assert data.y_test.tolist() == y_test
    assert data.classes[3] == "class 3"
    assert data.augmentation == SIMCLR


def test_stl10_trains_on_everything_and_probes_on_the_labelled(tmp_path, monkeypatch):
    x, y = write_stl10(tmp_path, monkeypatch)
    data = load("stl10", root=tmp_path)
    assert torch.equal(data.x_train, torch.from_numpy(np.concatenate([x["train"], x["unlabeled"]])))
    assert data.y_train.tolist() == [int(label) - 1 for label in y["train"]] + [-1] * 9
    assert torch.equal(data.x_probe, torch.from_numpy(x["train"]))
    assert data.y_probe.tolist() == [int(label) - 1 for label in y["train"]]
    assert torch.equal(data.x_test, torch.from_numpy(x["test"]))
    few = load("stl10", root=tmp_path, n_train=5, size=32)
    assert few.x_train.shape == (5, 3, 32, 32)
    assert few.x_probe.shape == (6, 3, 32, 32)


def test_fashionmnist(tmp_path):
    parts = write_fashionmnist(tmp_path)
    data = load("fashionmnist", root=tmp_path)
    assert torch.equal(data.x_train[:, 0], torch.from_numpy(parts["train"][0]))
    assert torch.equal(data.x_test[:, 0], torch.from_numpy(parts["t10k"][0]))
    assert data.y_test.tolist() == parts["t10k"][1].tolist()
    assert data.classes[9] == "Ankle boot"
    assert data.views(data.x_train, torch.Generator())[0].shape == (12, 1, 28, 28)


def test_tinyimagenet(tmp_path, monkeypatch):
    write_tinyimagenet(tmp_path, monkeypatch)
    data = load("tinyimagenet", root=tmp_path)
    assert data.classes == ("cat", "dog", "oak")
    assert data.x_train.shape == (6, 3, 64, 64)
    assert data.y_train.tolist() == [0, 0, 1, 1, 2, 2]
    assert (data.x_train.float().mean((1, 2, 3)) - 80 * data.y_train).abs().max() < 2
    assert data.y_test.tolist() == [2, 1, 0]
    assert (data.x_test[:, 2].float().mean((1, 2)) - 80 * data.y_test).abs().max() < 3


HCL_DATA = Path(os.environ.get("HCL_DATA") or "data")


@pytest.mark.skipif(
    not (HCL_DATA / FOLDERS["cifar10"]).is_dir(), reason="needs CIFAR-10 in $HCL_DATA or data/"
)
def test_real_cifar10_has_the_published_statistics():
    data = load("cifar10", root=HCL_DATA)
    assert data.x_train.shape == (50_000, 3, 32, 32)
    assert torch.bincount(data.y_train).tolist() == [5000] * 10
    assert torch.bincount(data.y_test).tolist() == [1000] * 10
    assert data.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert data.std.flatten().tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)
    assert data.classes[:3] == ("airplane", "automobile", "bird")


# --- missing and damaged -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_set_says_how_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"hcl data {name}. \(\d+ MB\).*HCL_DATA"):
        load(name, root=tmp_path)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_empty_folder_is_damaged(tmp_path, name):
    (tmp_path / FOLDERS[name]).mkdir()
    with pytest.raises(DamagedDataError, match=f"damaged or incomplete.*hcl data {name}"):
        load(name, root=tmp_path)


@pytest.mark.parametrize("name", FOLDERS)
def test_every_file_cut_short_or_lost_is_noticed(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path, monkeypatch)
    load(name, root=tmp_path)
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        if path.name in ("class_names.txt", "words.txt", "wnids.txt"):
            continue  # shorter lists of words: no checksum is published
        content = path.read_bytes()
        for broken in (content[: len(content) // 2], None):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            with pytest.raises(DamagedDataError):
                load(name, root=tmp_path)
            path.write_bytes(content)
    load(name, root=tmp_path)


def test_a_pickle_that_does_not_unpickle_is_damaged(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(b"\x80\x05nonsense")
    known = [[name, md5(tmp_path / "cifar-10-batches-py" / name)] for name in
             (f"data_batch_{i}" for i in range(1, 6))]  # fmt: skip
    monkeypatch.setattr(datasets.CIFAR10, "train_list", known)
    with pytest.raises(DamagedDataError, match=r"UnpicklingError|EOFError|ValueError"):
        load("cifar10", root=tmp_path)


def test_a_folder_without_permission_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "stl10_binary").mkdir()

    def refuse(root, seed):
        raise PermissionError(13, "Permission denied")

    locked = imagesets.SOURCES["stl10"]._replace(read=refuse)
    monkeypatch.setitem(imagesets.SOURCES, "stl10", locked)
    with pytest.raises(PermissionError):
        load("stl10", root=tmp_path)


# --- where and how to get them -------------------------------------------------------------------


def test_data_root(tmp_path, monkeypatch):
    monkeypatch.delenv("HCL_DATA", raising=False)
    assert imagesets.data_root().name == "data"
    monkeypatch.setenv("HCL_DATA", str(tmp_path))
    assert imagesets.data_root() == tmp_path
    assert imagesets.data_root("elsewhere") == Path("elsewhere")
    write_fashionmnist(tmp_path)
    assert len(load("fashionmnist").x_train) == 12


def test_download_cifar10_checks_and_unpacks(tmp_path, monkeypatch, site):
    made, got = tmp_path / "made", tmp_path / "got"
    x_train, *_ = write_cifar(made, monkeypatch)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made / "cifar-10-batches-py", "cifar-10-batches-py")
    got.mkdir()
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{site}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR10, "filename", "cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(RuntimeError, match="corrupted"):
        vision.download("cifar10", got)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    assert vision.download("cifar10", got) == got / "cifar-10-batches-py"
    assert torch.equal(load("cifar10", root=got).x_train, torch.from_numpy(x_train))


def test_download_tinyimagenet(tmp_path, monkeypatch, site):
    write_tinyimagenet(tmp_path / "made", monkeypatch)
    archive = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "made").rglob("*"):
            file.write(path, path.relative_to(tmp_path / "made"))
    monkeypatch.setattr(imagesets, "TINYIMAGENET", (f"{site}/{archive.name}", md5(archive)))
    vision.download("tinyimagenet", tmp_path / "got")
    assert load("tinyimagenet", root=tmp_path / "got").classes == ("cat", "dog", "oak")


def test_download_fashionmnist(tmp_path, monkeypatch, site):
    write_fashionmnist(tmp_path / "made")
    resources = []
    for path in sorted((tmp_path / "made" / "FashionMNIST" / "raw").iterdir()):
        packed = tmp_path / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((packed.name, md5(packed)))
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{site}/"])
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    assert vision.download("fashionmnist", tmp_path / "got") == tmp_path / "got" / "FashionMNIST"
    assert len(load("fashionmnist", root=tmp_path / "got").x_train) == 12


def test_download_stl10_asks_for_every_part(tmp_path, monkeypatch, site):
    x, _ = write_stl10(tmp_path / "made", monkeypatch)
    archive = tmp_path / "stl10.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / "stl10_binary", "stl10_binary")
    monkeypatch.setattr(datasets.STL10, "url", f"{site}/{archive.name}")
    monkeypatch.setattr(datasets.STL10, "filename", "stl10.tar.gz")
    monkeypatch.setattr(datasets.STL10, "tgz_md5", md5(archive))
    vision.download("stl10", tmp_path / "got")
    assert len(load("stl10", root=tmp_path / "got").x_train) == len(x["train"]) + 9


def test_download_of_digits_needs_nothing_and_of_others_is_refused(tmp_path):
    vision.download("digits", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="choose one of"):
        vision.download("mnist", tmp_path)


# --- encoders ------------------------------------------------------------------------------------


def macs(net, x):
    """Multiplications of the convolutions for one picture."""
    total = []

    def count(module, _, output):
        total.append(output[0].numel() * module.weight[0].numel())

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    net(x)
    return sum(total)


@pytest.mark.parametrize(
    ("name", "out_dim", "parameters", "billions"),
    [("resnet18", 512, 11_168_832, 0.555), ("resnet50", 2048, 23_500_352, 1.298)],
)
def test_resnets_have_the_stem_for_small_pictures(name, out_dim, parameters, billions):
    net = vision.encoder(name).eval()
    assert net.out_dim == out_dim
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.conv1.weight.shape == (64, 3, 3, 3)
    assert macs(net, torch.rand(1, 3, 32, 32)) / 1e9 == pytest.approx(billions, abs=0.001)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, out_dim)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (3, 33, 40)])
@pytest.mark.parametrize("name", ["resnet18", "small", "mlp", "raw"])
def test_encoders_take_every_shape(name, shape):
    net = vision.encoder(name, channels=shape[0], pixels=shape[1] * shape[2])
    features = net(torch.rand(4, *shape))
    assert features.shape == (4, net.out_dim)
    assert features.dtype == torch.float32


def test_small_costs_what_it_says():
    net = vision.encoder("small")
    assert macs(net, torch.rand(2, 3, 32, 32)) / 1e6 == pytest.approx(4.0, abs=0.05)
    assert net.out_dim == 128


@pytest.mark.parametrize("name", ["small", "mlp", "resnet18"])
def test_every_weight_gets_a_gradient(name):
    net = vision.encoder(name, pixels=64)
    net(torch.rand(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_memory_format_does_not_matter(name):
    net, x = vision.encoder(name).eval(), torch.rand(2, 3, 16, 16)
    plain = net(x)
    net = net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, atol=1e-4, rtol=1e-4)


def test_raw_is_the_picture():
    data = load("digits")
    net = data.encoder("raw")
    assert net.out_dim == 64
    assert list(net.parameters()) == []
    assert torch.equal(net(data.inputs(data.x_test)), data.inputs(data.x_test).flatten(1))


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="resnet18, resnet50, small, mlp, raw"):
        load("digits").encoder("vit")


def test_small_learns_digits_from_views():
    """Views keep the class and the net can read it: trained on views alone, tested without."""
    torch.manual_seed(0)
    data, generator = load("digits"), torch.Generator().manual_seed(0)
    net = nn.Sequential(data.encoder("small"), nn.Linear(128, 10))
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(data.x_train), generator=generator).split(128):
            view, _ = data.views(data.x_train[rows], generator)
            loss = nn.functional.cross_entropy(net(view), data.y_train[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    right = net.eval()(data.inputs(data.x_test)).argmax(1) == data.y_test
    assert right.float().mean() > 0.85


def test_importing_vision_needs_neither_torchvision_nor_scikit_learn():
    code = (
        "import sys, hcl.losses; assert 'hcl.vision' not in sys.modules; import hcl.vision;"
        "print(sorted({'torchvision', 'sklearn', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- mates, growing, other input sizes, options of encoders ---------------------------------------


def test_a_mate_gives_the_second_view_and_nothing_else_changes():
    data = load("digits", n_train=100)
    x, mate = data.x_train[:8], data.x_train[8:16]
    first, second = data.views(x, torch.Generator().manual_seed(0))
    own, other = data.views(x, torch.Generator().manual_seed(0), mate)
    assert torch.equal(own, first)
    assert not torch.equal(other, second)
    same = data.views(x, torch.Generator().manual_seed(0), x)
    assert torch.equal(same[0], first)
    assert torch.equal(same[1], second)
    assert torch.equal(data.views(mate, torch.Generator().manual_seed(0))[1], other)
    assert torch.equal(x, data.x_train[:8])  # neither is written to


@pytest.mark.parametrize(
    ("share", "side"), [(0.0, 24), (0.2, 26), (0.4, 28), (0.6, 30), (0.8, 32), (1.0, 32)]
)
def test_views_grow_from_three_quarters_of_their_side(share, side):
    data = load("digits", n_train=20, size=32)
    grown = data.grown(share)
    first, second = grown.views(grown.x_train[:3], torch.Generator())
    assert first.shape == second.shape == (3, 1, side, side)
    assert grown.inputs(grown.x_test[:3]).shape == (3, 1, 32, 32)
    assert grown.x_train is data.x_train
    assert data.views(data.x_train[:3], torch.Generator())[0].shape == (3, 1, 32, 32)
    assert replace(grown.augmentation, side=None) == data.augmentation
    if side == 32:
        same = data.views(data.x_train[:3], torch.Generator().manual_seed(1))
        full = grown.views(data.x_train[:3], torch.Generator().manual_seed(1))
        assert torch.equal(same[0], full[0])


def test_views_that_have_a_side_of_their_own_grow_to_that():
    data = load("digits", n_train=20, size=32, view_size=12)
    sides = [data.grown(s).augmentation.side for s in (0.0, 0.4, 1.0)]
    assert sides == [9, 10, 12]  # 10.5 is rounded to even
    assert load("digits", n_train=20).grown(0.0).augmentation.side == 6
    assert load("digits", n_train=20, view_size=1).grown(0.0).augmentation.side == 1


@pytest.mark.parametrize("side", [5, 8, 20])
def test_inputs_may_be_of_another_size(side):
    data = load("digits", n_train=100, input_size=side)
    x = data.inputs(data.x_test[:4])
    assert x.shape == (4, 1, side, side)
    assert data.views(data.x_train[:4], torch.Generator())[0].shape == (4, 1, 8, 8)
    for picture, found in zip(data.x_test[:4], x, strict=True):
        image = Image.fromarray(picture[0].numpy()).resize((side, side), Image.Resampling.BILINEAR)
        wanted = (torch.from_numpy(np.array(image)).float() / 255 - data.mean) / data.std
        assert (found - wanted).abs().max() < 1 / 255 / data.std.item()  # it rounds to 8 bits
    plain = load("digits", n_train=100)
    assert torch.equal(data.x_test, plain.x_test)
    if side == 8:
        torch.testing.assert_close(x, plain.inputs(plain.x_test[:4]))
    with pytest.raises(ValueError, match="input_size=0"):
        load("digits", input_size=0)


def test_labelled_leaves_the_unlabelled_out(tmp_path, monkeypatch):
    x, y = write_stl10(tmp_path, monkeypatch)
    data = load("stl10", root=tmp_path, labelled=True)
    assert torch.equal(data.x_train, torch.from_numpy(x["train"]))
    assert data.y_train.tolist() == [int(label) - 1 for label in y["train"]]
    assert torch.equal(data.x_probe, data.x_train)
    assert torch.equal(data.x_test, torch.from_numpy(x["test"]))
    np.testing.assert_allclose(data.mean.flatten(), (x["train"] / 255).mean((0, 2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match=r"n_train=7.*6"):
        load("stl10", root=tmp_path, labelled=True, n_train=7)
    everything, labelled = (load("digits", labelled=b) for b in (False, True))
    assert torch.equal(everything.x_train, labelled.x_train)


def test_an_encoder_may_start_as_asked_for():
    data = load("digits", n_train=200, size=16)

    def made(**options):
        torch.manual_seed(0)
        return data.encoder("small", **options)

    plain = made()
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    whitened = [m for m in made(whiten=True).modules() if isinstance(m, nn.Conv2d)]
    dirac = [m for m in made(dirac=True).modules() if isinstance(m, nn.Conv2d)]
    same = [torch.equal(a.weight, b.weight) for a, b in zip(convs, whitened, strict=True)]
    assert same == [False, True, True, True]
    same = [torch.equal(a.weight, b.weight) for a, b in zip(convs, dirac, strict=True)]
    assert same == [True, False, False, False]
    y = whitened[0](data.inputs(data.x_train)).detach()[:, :4, 1:-1, 1:-1]
    off = torch.corrcoef(y.transpose(0, 1).flatten(1)) - torch.eye(4)
    assert off.abs().max() < 0.01
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(dirac[1](x)[:, :16], x[:, :, ::2, ::2])
    norms = [m for m in made(norm_momentum=0.4).modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.momentum for m in norms] == [0.4] * 4
    assert {m.momentum for m in plain.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("name", ["mlp", "raw"])
def test_whitening_and_dirac_filters_need_convolutions(name):
    data = load("digits", n_train=100)
    for option in ("whiten", "dirac"):
        with pytest.raises(ValueError, match=f"{option}.*'{name}' has no convolutions"):
            data.encoder(name, **{option: True})
    with pytest.raises(ValueError, match=r"norm_momentum=1\.5"):
        data.encoder(name, norm_momentum=1.5)


@pytest.mark.parametrize("sides", [{"view_size": 6}, {"input_size": 6}])
def test_a_layer_that_reads_pixels_needs_views_and_inputs_of_one_size(sides):
    """Else the first step would fail, or the measuring, after all the training."""
    with pytest.raises(ValueError, match=r"'mlp'.*view_size and input_size"):
        load("digits", n_train=100, **sides).encoder("mlp")
    load("digits", n_train=100, **sides).encoder("small")
    both = load("digits", n_train=100, view_size=6, input_size=6)
    view, _ = both.views(both.x_train[:4], torch.Generator())
    for x in (view, both.inputs(both.x_test[:4])):
        assert both.encoder("mlp")(x).shape == (4, 64)
    assert both.encoder("raw").out_dim == 36

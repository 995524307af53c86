"""The synthetic latent classes: what is drawn, what a view keeps, and that raw inputs are hard."""

import pytest
import torch

from hcl import probe, sphere


@pytest.fixture(scope="module")
def data() -> sphere.LatentClasses:
    return sphere.load(seed=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shapes_and_names(data):
    assert data.x_train.shape == (2000, 40)
    assert data.x_test.shape == (1000, 40)
    assert len(data.classes) == 50
    assert data.inputs(data.x_test).shape == (1000, 128)
    assert data.inputs(data.x_test).dtype == torch.float32
    assert data.x_probe is data.x_train
    assert data.y_probe is data.y_train


def test_classes_are_equally_frequent_and_shuffled(data):
    assert (data.y_train.bincount() == 40).all()
    assert (data.y_test.bincount() == 20).all()
    assert not (data.y_train.sort().values == data.y_train).all()


def test_names_agree_with_coarse_labels(data):
    group = [int(data.classes[y].split(".")[0]) for y in data.y_train.tolist()]
    assert data.coarse_train.tolist() == group
    assert data.coarse_test.unique().tolist() == list(range(10))


def test_members_of_a_group_are_nearer_than_groups(data):
    centres = torch.stack([data.x_train[data.y_train == c, :32].mean(0) for c in range(50)])
    distance = torch.cdist(centres, centres)
    group = torch.arange(50) // 5
    same = (group[:, None] == group) & ~torch.eye(50, dtype=torch.bool)
    assert distance[same].mean() < 0.8 * distance[group[:, None] != group].mean()


def test_latents_have_the_stated_moments():
    data = sphere.load(seed=3, n_train=20_000, coarse=2, fine=2, noise=0.5)
    residual = data.x_train.clone()
    for c in range(4):
        residual[data.y_train == c, :32] -= data.x_train[data.y_train == c, :32].mean(0)
    assert residual[:, :32].std() == pytest.approx(0.5, rel=0.01)
    assert residual[:, 32:].std() == pytest.approx(1.0, rel=0.01)


def test_nuisances_are_orthogonal_with_the_stated_scale():
    data = sphere.load(nuisances=6, nuisance_scale=2.0)
    torch.testing.assert_close(data.directions @ data.directions.T, 4 * torch.eye(6))


def test_centres_lie_where_stated():
    data = sphere.load(fine_scale=0.0, noise=0.0)
    torch.testing.assert_close(data.x_train[:, :32].norm(dim=1), torch.full((2000,), 8**0.5))


def test_no_fine_spread_leaves_the_groups_only():
    data = sphere.load(noise=0.0, fine_scale=0.0, nuisances=0)
    assert len(data.inputs(data.x_train).mul(1e4).round().unique(dim=0)) == 10


def test_same_seed_same_data_other_seed_other_data(data):
    again, other = sphere.load(seed=0), sphere.load(seed=1)
    assert torch.equal(again.x_train, data.x_train)
    assert torch.equal(again.inputs(again.x_test), data.inputs(data.x_test))
    assert not torch.equal(other.x_train, data.x_train)
    assert not torch.equal(other.layers[0], data.layers[0])


def test_drawing_data_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    sphere.load(seed=5, n_train=100, n_test=50)
    assert torch.equal(torch.rand(3), expected)


def test_inputs_are_the_two_layer_tanh_rendering(data):
    u, c = data.x_test[:, :32].double(), data.x_test[:, 32:].double()
    first, second = (layer.double() for layer in data.layers)
    expected = ((u + c @ data.directions.double()) @ first).tanh() @ second
    torch.testing.assert_close(
        data.inputs(data.x_test).double(), expected.tanh(), atol=1e-5, rtol=0
    )


def test_views_are_reproducible_and_differ_from_each_other_and_the_input(data):
    x = data.x_train[:64]
    one, two = data.views(x, generator(7))
    again, _ = data.views(x, generator(7))
    assert one.shape == two.shape == (64, 128)
    assert torch.equal(one, again)
    for a, b in ((one, two), (one, data.inputs(x))):
        assert (a - b).abs().amax(dim=1).min() > 0.1


def test_every_row_has_a_nuisance_of_its_own(data):
    one, two = data.views(data.x_train[:1].repeat(32, 1), generator())
    assert len(torch.cat([one, two]).unique(dim=0)) == 64


def test_a_view_keeps_the_latent_point():
    plain = sphere.load(nuisances=0)
    one, two = plain.views(plain.x_train[:32], generator())
    torch.testing.assert_close(one, plain.inputs(plain.x_train[:32]))
    torch.testing.assert_close(one, two)


def test_views_do_not_depend_on_the_nuisance_of_the_row(data):
    x = data.x_train[:16].clone()
    one, _ = data.views(x, generator())
    x[:, 32:] = 0
    torch.testing.assert_close(data.views(x, generator())[0], one)


def test_a_mate_gives_the_second_view(data):
    x, mate = data.x_train[:16], data.x_train[16:32]
    first, second = data.views(x, generator(3))
    own, other = data.views(x, generator(3), mate)
    assert torch.equal(own, first)
    assert (other - second).abs().amax(dim=1).min() > 0.01
    assert torch.equal(data.views(x, generator(3), x)[1], second)
    assert torch.equal(data.views(mate, generator(3), mate)[1], other)  # the same nuisances
    plain = sphere.load(nuisances=0)
    own, other = plain.views(plain.x_train[:16], generator(), plain.x_train[16:32])
    torch.testing.assert_close(own, plain.inputs(plain.x_train[:16]))
    torch.testing.assert_close(other, plain.inputs(plain.x_train[16:32]))


def test_mlp_encodes_to_32_and_raw_is_the_identity(data):
    x = data.inputs(data.x_train[:16])
    mlp, raw = data.encoder("mlp"), data.encoder("raw")
    assert mlp(x).shape == (16, mlp.out_dim) == (16, 32)
    assert any(isinstance(module, torch.nn.BatchNorm1d) for module in mlp.modules())
    assert torch.equal(raw(x), x)
    assert raw.out_dim == 128
    assert not list(raw.parameters())


def test_raw_neighbours_are_poor_though_classes_are_there():
    """The task is worth learning: kNN of raw inputs fails, the latent point itself is decided."""
    raw, latent = [], []
    for seed in range(3):
        data = sphere.load(seed=seed)
        sets = data.y_train, data.y_test
        f, g = data.inputs(data.x_train), data.inputs(data.x_test)
        raw.append(probe.knn(f, sets[0], g, sets[1], k=10))
        f, g = data.x_train[:, :32], data.x_test[:, :32]
        latent.append(probe.knn(f, sets[0], g, sets[1], k=10))
    assert 0.18 < sum(raw) / 3 < 0.32
    assert min(latent) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coarse": 0}, "coarse is 0"),
        ({"fine": 0}, "fine is 0"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"fine_scale": -1.0}, "fine_scale is -1.0"),
        ({"nuisance_scale": -1.0}, "nuisance_scale is -1.0"),
        ({"nuisances": -1}, "nuisances is -1"),
        ({"nuisances": 33}, "nuisances is 33"),
        ({"n_train": 49}, "n_train is 49"),
        ({"n_test": 49}, "n_test is 49"),
        ({"name": "ball"}, "name is 'ball'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sphere.load(**options)


def test_unknown_encoder_is_refused_with_the_names(data):
    with pytest.raises(ValueError, match="'resnet18': sphere has mlp, raw"):
        data.encoder("resnet18")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_data_are_the_same_on_a_gpu(data):
    there = sphere.load(seed=0, device="cuda")
    assert torch.equal(there.x_train.cpu(), data.x_train)
    one, _ = there.views(there.x_train[:8], torch.Generator("cuda").manual_seed(0))
    assert one.device.type == "cuda"

"""The share of false negatives among the heaviest: loops, draws at random, and refusals."""

import pytest
import torch

from hcl import geometry, losses, unremix


def naive_share(weights, labels, top):
    """By sorting the negatives of every anchor; for weights without ties."""
    images, shares = len(labels), []
    for i, row in enumerate(weights.tolist()):
        negatives = [j for j in range(2 * images) if j % images != i % images]
        chosen = sorted(negatives, key=lambda j: -row[j])[:top]
        same = [labels[j % images] == labels[i % images] for j in chosen]
        shares.append(sum(same) / top)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("top", [1, 3, 14])
def test_the_share_is_that_of_a_loop(top):
    draw = torch.Generator().manual_seed(top)
    labels = torch.randint(3, (8,), generator=draw)
    weights = torch.rand(16, 16, generator=draw)
    found = geometry.same_label_share(weights, labels, top=top)
    assert found == pytest.approx(naive_share(weights, labels.tolist(), top))


@pytest.mark.parametrize("top", [1, 5, 10])
def test_even_weights_give_the_share_among_all_negatives(top):
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    shares = [2 * (torch.sum(labels == c).item() - 1) / 10 for c in labels]
    z = torch.randn(6, 4)
    for weights in (losses.negative_weights(z, z, beta=0.0), torch.zeros(12, 12)):
        found = geometry.same_label_share(weights, labels, top=top)
        assert found == pytest.approx(sum(shares) / 6)


def test_ties_are_what_draws_among_them_give_in_the_mean():
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 2])
    weights = torch.randint(3, (10, 10), generator=draw).double()
    drawn = [
        naive_share(weights + 0.5 * torch.rand(10, 10, generator=draw), labels.tolist(), 3)
        for _ in range(3000)
    ]
    mean = torch.tensor(drawn).double()
    error = mean.std().item() / 3000**0.5
    found = geometry.same_label_share(weights, labels, top=3)
    assert abs(found - mean.mean().item()) < 5 * error


def test_nearness_to_the_anchor_finds_its_class_where_classes_are_clusters():
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(4).repeat(8)
    z1, z2 = (torch.eye(4, 16)[labels] + 0.1 * torch.randn(32, 16, generator=draw) for _ in "12")
    near = unremix.weights(z1, z2, uncertainty=0.0, representativeness=0.0)
    assert geometry.same_label_share(near, labels, top=14) == 1.0
    assert geometry.same_label_share(-near, labels, top=48) == 0.0


@pytest.mark.parametrize(
    ("weights", "labels", "top", "message"),
    [
        (torch.ones(4, 6), torch.zeros(2), 1, r"weights is \(4, 6\)"),
        (torch.ones(5, 5), torch.zeros(2), 1, r"weights is \(5, 5\)"),
        (torch.ones(2, 2), torch.zeros(1), 1, "B >= 2"),
        (torch.full((4, 4), float("nan")), torch.zeros(2), 1, "weights has NaN"),
        (torch.ones(4, 4), torch.zeros(4), 1, r"labels is \(4,\)"),
        (torch.ones(4, 4), torch.zeros(2), 3, "top is 3: 1 to 2"),
        (torch.ones(4, 4), torch.zeros(2), 0, "top is 0"),
    ],
)
def test_what_does_not_fit_is_refused(weights, labels, top, message):
    with pytest.raises(ValueError, match=message):
        geometry.same_label_share(weights, labels, top=top)

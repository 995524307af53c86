"""The losses against float64 loops written from the papers' formulas, and against their limits."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from hcl import losses
from hcl.losses import (
    ContrastiveLoss,
    anneal_beta,
    clamp_share,
    debiased,
    hard,
    negative_weights,
    nt_xent,
)

SETTINGS = list(itertools.product([0.05, 0.2, 0.5, 1.0], [0.0, 0.5, 1.0, 2.0], [0.0, 0.02, 0.1]))


def views(b=6, d=5, *, seed=0, noise=0.5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(b, d, generator=g, dtype=torch.float64)
    pair = [base + noise * torch.randn(b, d, generator=g, dtype=torch.float64) for _ in range(2)]
    return [z.to(dtype) for z in pair]


def naive(z1, z2, *, t=0.5, beta=1.0, tau=0.1, q_weight=None, clamp="scaled"):
    """The released criterion, anchor by anchor with Python floats (papers' Ng and its floor)."""
    z = [row / np.linalg.norm(row) for row in np.concatenate([z1, z2]).astype(np.float64)]
    b, total = len(z1), 0.0
    for i in range(2 * b):
        partner = (i + b) % (2 * b)
        pos = math.exp(z[i] @ z[partner] / t)
        neg = [math.exp(z[i] @ z[j] / t) for j in range(2 * b) if j not in (i, partner)]
        n = len(neg) if q_weight is None else q_weight
        importance = [u**beta for u in neg]
        mean = sum(importance) / len(importance)
        tilted = sum(w / mean * u for w, u in zip(importance, neg, strict=True)) / len(neg)
        floor = (n if clamp == "scaled" else 1) * math.exp(-1 / t)
        ng = max((n * tilted - tau * n * pos) / (1 - tau), floor)
        total -= math.log(pos / (pos + ng))
    return total / (2 * b)


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "beta", "tau"), SETTINGS)
def test_equals_the_formula_in_float64(t, beta, tau):
    z1, z2 = views(seed=int(100 * t + 10 * beta))
    ours = hard(z1, z2, temperature=t, beta=beta, tau_plus=tau).item()
    assert ours == pytest.approx(naive(z1.numpy(), z2.numpy(), t=t, beta=beta, tau=tau), abs=1e-10)


@pytest.mark.parametrize(("t", "beta", "tau"), SETTINGS)
def test_float32_is_within_1e_5(t, beta, tau):
    z1, z2 = views(b=32, d=16, dtype=torch.float32)
    ours = hard(z1, z2, temperature=t, beta=beta, tau_plus=tau).item()
    wanted = naive(z1.numpy(), z2.numpy(), t=t, beta=beta, tau=tau)
    assert ours == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype):
    z1, z2 = views(b=32, d=16, dtype=dtype)
    ours = hard(z1, z2, temperature=0.1, tau_plus=0.0)
    assert ours.dtype == torch.float32
    same_input = naive(z1.float().numpy(), z2.float().numpy(), t=0.1, tau=0.0)
    assert ours.item() == pytest.approx(same_input, rel=1e-5)


def test_autocast_does_not_lower_the_precision():
    z1, z2 = views(b=32, d=16, dtype=torch.float32)
    plain = hard(z1, z2, temperature=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = hard(z1, z2, temperature=0.1)
    assert torch.equal(plain, inside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_overflow_at_beta_50_and_temperature_005(dtype):
    z1, z2 = views(b=16, d=8, dtype=dtype)
    z1.requires_grad_()
    loss = hard(z1, z2, temperature=0.05, beta=50.0, tau_plus=0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z1.grad).all()


@pytest.mark.parametrize(
    ("clamp", "q_weight"), [("unscaled", None), ("scaled", 1.0), ("unscaled", 7)]
)
def test_clamp_and_weight_options(clamp, q_weight):
    z1, z2 = views(noise=0.05)  # aligned pairs, so the clamp binds
    assert clamp_share(z1, z2, tau_plus=0.3, clamp=clamp, Q=q_weight) > 0
    ours = hard(z1, z2, tau_plus=0.3, clamp=clamp, Q=q_weight).item()
    wanted = naive(z1.numpy(), z2.numpy(), tau=0.3, clamp=clamp, q_weight=q_weight)
    assert ours == pytest.approx(wanted, abs=1e-10)


def test_nt_xent_is_cross_entropy_over_the_other_views():
    z1, z2 = views(b=9, d=4)
    z = normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / 0.2).fill_diagonal_(-math.inf)
    target = torch.arange(18).roll(9)
    wanted = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(nt_xent(z1, z2, temperature=0.2), wanted, rtol=1e-12, atol=0)


def test_debiased_is_hard_without_hardness():
    z1, z2 = views()
    assert torch.equal(debiased(z1, z2, tau_plus=0.05), hard(z1, z2, beta=0.0, tau_plus=0.05))


def test_perfectly_aligned_uniform_embedding_stops_learning_above_the_known_class_prior():
    """Papers' invariant: at t = 0.5, beta = 0 the clamp binds iff mean u < tau e^2 + (1-tau) e^-2.

    For orthogonal negatives mean u = 1, so the largest tau_plus that still learns is
    (1 - e^-2) / (e^2 - e^-2) = 0.1192.
    """
    z = torch.eye(64, dtype=torch.float64)
    limit = (1 - math.exp(-2)) / (math.exp(2) - math.exp(-2))
    # two views of one image coincide, so the negatives of an anchor are exactly orthogonal
    assert clamp_share(z, z, beta=0.0, tau_plus=limit - 1e-6) == 0.0
    assert clamp_share(z, z, beta=0.0, tau_plus=limit + 1e-6) == 1.0


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "tau"), list(itertools.product([0.0, 0.5, 2.0], [0.0, 0.1])))
def test_gradcheck(beta, tau):
    z1, z2 = (z.requires_grad_() for z in views(b=4, d=3))
    assert torch.autograd.gradcheck(lambda a, b: hard(a, b, beta=beta, tau_plus=tau), (z1, z2))


def test_gradgradcheck():
    z1, z2 = (z.requires_grad_() for z in views(b=3, d=3))
    assert torch.autograd.gradgradcheck(lambda a, b: hard(a, b, tau_plus=0.02), (z1, z2))


def test_detached_weights_keep_the_value_and_change_the_gradient():
    z1, z2 = views()
    grads = []
    for detach in (False, True):
        a = z1.clone().requires_grad_()
        loss = hard(a, z2, detach_weights=detach)
        loss.backward()
        grads.append((loss.item(), a.grad))
    assert grads[0][0] == grads[1][0]
    assert not torch.allclose(grads[0][1], grads[1][1])


def test_detached_gradient_is_that_of_fixed_weights():
    z1, z2 = views()
    a = z1.clone().requires_grad_()
    hard(a, z2, tau_plus=0.0, detach_weights=True, beta=2.0).backward()
    b = z1.clone().requires_grad_()
    q = negative_weights(z1, z2, beta=2.0)
    z = normalize(torch.cat([b, z2]), dim=1)
    u, n = torch.exp(z @ z.T / 0.5), len(z1)
    pos = torch.cat([u.diagonal(n), u.diagonal(-n)])
    ng = (2 * n - 2) * (q * u).sum(dim=1)
    (-torch.log(pos / (pos + ng))).mean().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_where_the_clamp_binds_negatives_receive_no_gradient():
    z = torch.eye(4, 8, dtype=torch.float64)
    noisy = (z + 1e-3).requires_grad_()
    assert clamp_share(noisy.detach(), z, tau_plus=0.5) == 1.0
    hard(noisy, z, tau_plus=0.5).backward()
    own = normalize(noisy, dim=1).detach()
    toward_positive = z - (own * z).sum(dim=1, keepdim=True) * own
    cosine = torch.nn.functional.cosine_similarity(-noisy.grad, toward_positive)
    torch.testing.assert_close(cosine, torch.ones(4, dtype=torch.float64))


# Properties ---------------------------------------------------------------------------------------

cases = given(
    b=st.integers(2, 8),
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    tau=st.sampled_from([0.0, 0.05, 0.2]),
)


@settings(max_examples=40, deadline=None)
@cases
def test_invariant_to_the_order_of_the_batch_and_of_the_views(b, seed, beta, tau):
    z1, z2 = views(b=b, seed=seed)
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    loss = hard(z1, z2, beta=beta, tau_plus=tau)
    shuffled = hard(z2[order], z1[order], beta=beta, tau_plus=tau)
    torch.testing.assert_close(loss, shuffled, rtol=1e-12, atol=1e-13)


@settings(max_examples=40, deadline=None)
@cases
def test_invariant_to_rotation_and_to_the_length_of_rows(b, seed, beta, tau):
    z1, z2 = views(b=b, seed=seed)
    g = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))
    moved = hard(3.0 * z1 @ rotation, 0.1 * z2 @ rotation, beta=beta, tau_plus=tau)
    torch.testing.assert_close(hard(z1, z2, beta=beta, tau_plus=tau), moved)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000))
def test_loss_rises_with_hardness_when_nothing_is_debiased(seed):
    """The tilt moves weight to larger terms (Harris), so the tilted mean rises with beta."""
    z1, z2 = views(seed=seed)
    values = [hard(z1, z2, beta=beta, tau_plus=0.0).item() for beta in (0.0, 0.5, 1.0, 4.0)]
    assert values == sorted(values)


def test_large_beta_keeps_the_hardest_negative_alone():
    z1, z2 = views()
    z = normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T
    row = torch.arange(12)
    hardest = s.masked_fill((row[:, None] - row) % 6 == 0, -math.inf).amax(dim=1)
    pos = torch.cat([s.diagonal(6), s.diagonal(-6)])
    wanted = torch.log1p(10 * torch.exp((hardest - pos) / 0.5)).mean()
    torch.testing.assert_close(hard(z1, z2, beta=1e4, tau_plus=0.0), wanted, rtol=1e-3, atol=0)


def test_weights_are_a_softmax_over_the_negatives_alone():
    z1, z2 = views()
    q = negative_weights(z1, z2, temperature=0.2, beta=1.5)
    z = normalize(torch.cat([z1, z2]), dim=1).numpy()
    for i in range(12):
        others = [j for j in range(12) if j not in (i, (i + 6) % 12)]
        u = np.exp(1.5 * z[others] @ z[i] / 0.2)
        np.testing.assert_allclose(q[i, others], u / u.sum(), rtol=1e-10)
        assert q[i, [i, (i + 6) % 12]].sum() == 0


# Annealing ----------------------------------------------------------------------------------------


def test_released_annealing_equals_the_released_loop():
    """A transcript of its logic: linspace's values handed out when epoch % int(E / 9) == 0."""
    for epochs in (9, 100, 200, 400):
        waiting = iter(np.linspace(2.0, 0, 9))
        beta = 2.0
        for epoch in range(1, epochs + 1):
            assert anneal_beta(2.0, epoch, epochs, schedule="released") == pytest.approx(beta)
            if epoch % int(epochs / 9) == 0:
                beta = next(waiting, 0.0)


def test_paper_annealing_takes_equal_steps():
    betas = [anneal_beta(1.0, e, 90, steps=9) for e in range(1, 91)]
    assert betas[0] == 1.0
    assert betas[-1] == pytest.approx(1 / 9)
    assert sorted({round(b, 9) for b in betas}, reverse=True) == [
        round(k / 9, 9) for k in range(9, 0, -1)
    ]
    assert all(betas.count(b) == 10 for b in set(betas))


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [("beta", -0.1), ("beta", math.nan), ("tau_plus", 1.0), ("tau_plus", -0.01),
     ("temperature", 0.0), ("temperature", -1.0), ("temperature", math.inf),
     ("clamp", "none"), ("Q", 0.0)],
)  # fmt: skip
def test_a_parameter_out_of_range_is_named_with_its_value(argument, value):
    z1, z2 = views()
    with pytest.raises(ValueError, match=rf"{argument}={value!r}"):
        hard(z1, z2, **{argument: value})
    with pytest.raises(ValueError, match=rf"{argument}={value!r}"):
        ContrastiveLoss("hard", **{argument: value})


def test_bad_embeddings_are_refused():
    z1, z2 = views()
    with pytest.raises(ValueError, match=r"z1 \(6, 5\), z2 \(5, 5\)"):
        hard(z1, z2[:5])
    with pytest.raises(ValueError, match="at least 2"):
        hard(z1[:1], z2[:1])
    with pytest.raises(TypeError, match=r"z2: .*torch.int64"):
        hard(z1, z2.long())
    with pytest.raises(TypeError, match=r"z1: .*list"):
        hard([[1.0]], z2)
    z2[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"z2: NaN or infinity in row\(s\) \[3\]"):
        nt_xent(z1, z2)


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="'nt_xent', 'decoupled', 'debiased', 'hard'"):
        ContrastiveLoss("triplet")


def test_epochs_too_few_to_anneal():
    with pytest.raises(ValueError, match="steps=9"):
        anneal_beta(1.0, 1, 5, schedule="released")
    with pytest.raises(ValueError, match="epoch=0"):
        anneal_beta(1.0, 0, 10)
    with pytest.raises(ValueError, match="schedule='linear'"):
        anneal_beta(1.0, 1, 10, schedule="linear")


# The module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nt_xent", "debiased", "hard"])
def test_the_module_equals_its_function_and_ignores_labels(method):
    z1, z2 = views()
    args = {"nt_xent": {}, "debiased": {"tau_plus": 0.05}, "hard": {"tau_plus": 0.05, "beta": 2.0}}
    wanted = getattr(losses, method)(z1, z2, temperature=0.3, **args[method])
    module = ContrastiveLoss(method, temperature=0.3, beta=2.0, tau_plus=0.05)
    assert torch.equal(module(z1, z2, torch.arange(6)), wanted)
    assert method in repr(module)


def test_beta_can_be_annealed_on_the_module():
    z1, z2 = views()
    module = ContrastiveLoss("hard", tau_plus=0.0)
    module.beta = 0.0
    assert torch.equal(module(z1, z2), nt_xent(z1, z2))


def test_losses_need_torch_alone():
    """Importing hcl.losses must not pull in the study's libraries."""
    import subprocess
    import sys

    code = (
        "import sys, hcl.losses; "
        "print([m for m in ('torchvision', 'sklearn', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_beta_on_a_module_without_hardness_does_nothing():
    z1, z2 = views()
    module = ContrastiveLoss("nt_xent")
    module.beta = 2.0
    assert torch.equal(module(z1, z2), nt_xent(z1, z2))


def test_the_unscaled_floor_can_bind_without_a_prior():
    z1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    ours = hard(z1, z1, tau_plus=0.0, Q=0.01, clamp="unscaled").item()
    wanted = naive(z1.numpy(), z1.numpy(), tau=0.0, q_weight=0.01, clamp="unscaled")
    assert ours == pytest.approx(wanted, abs=1e-12)

"""The losses on a CUDA device against float64 on the CPU; waits for a GPU."""

import pytest
import torch

from hcl import losses
from hcl.losses import ContrastiveLoss, hard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def batch(b=300, d=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(b, d, generator=g)
    z1, z2 = base + 0.7 * torch.randn(2, b, d, generator=g)
    return z1, z2, torch.randint(-1, 9, (b,), generator=g)


def value_and_gradient(loss, z1, z2, labels):
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    value = loss(z1, z2, labels)
    value.backward()
    return value.double().cpu(), torch.cat([z1.grad, z2.grad]).double().cpu()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("method", losses.METHODS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("temperature", [0.5, 0.03])
def test_every_loss_is_that_of_float64(method, dtype, error, temperature):
    loss = ContrastiveLoss(method, tau_plus=0.02, temperature=temperature)
    z1, z2, labels = (v.to(dtype) if v.is_floating_point() else v for v in batch())
    wanted = value_and_gradient(loss, z1.double(), z2.double(), labels)
    ours = value_and_gradient(loss, z1.cuda(), z2.cuda(), labels.cuda())
    assert ours[0].item() == pytest.approx(wanted[0].item(), rel=error, abs=error)
    assert relative(ours[1], wanted[1]) < error


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.7])
def test_a_step_never_waits_for_the_device(beta):
    z1, z2 = (z.cuda().requires_grad_() for z in batch()[:2])
    hard(z1, z2, beta=beta).backward()  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        hard(z1, z2, beta=beta).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_inside_a_cuda_graph():
    z1, z2 = (z.cuda().requires_grad_() for z in batch()[:2])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            z1.grad = z2.grad = None
            wanted = hard(z1, z2)
            wanted.backward()
    torch.cuda.current_stream().wait_stream(side)
    gradient = z1.grad.clone()
    z1.grad = z2.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = hard(z1, z2)
        loss.backward()
    graph.replay()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(z1.grad, gradient, rtol=1e-5, atol=1e-8)


def test_a_million_rows_fit():
    z1, z2 = torch.randn(2, 524_288, 128, device="cuda", dtype=torch.bfloat16)
    z1.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = hard(z1, z2)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z1.grad).all()
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**20 * 128 * 4  # O(N d), not N^2


def test_tiles_and_kernels_agree():
    z1, z2 = (z.cuda() for z in batch()[:2])
    for t in (0.5, 0.02):
        tiled = hard(z1, z2, temperature=t, engine="tiled")
        torch.testing.assert_close(hard(z1, z2, temperature=t), tiled, rtol=1e-5, atol=1e-7)

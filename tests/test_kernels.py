"""The Triton kernels against the dense formula in float64, differentiated by autograd.

Without a GPU the comparisons run in Triton's interpreter, in a process of their own: it has to be
switched on before the kernels are imported. The compiler needs no GPU, so that the machine code is
looked at here as well.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from hcl import kernels, project_root

triton = pytest.importorskip("triton")

INTERPRETER = kernels.INTERPRETED
DEVICE = "cpu" if INTERPRETER else "cuda" if kernels.available("cuda") else None
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")

# what a type and a precision may cost: error of power * s, and of the gradient relative to its norm
ERRORS = {
    (torch.float32, "highest"): (2e-7, 2e-6),
    (torch.float32, "high"): (5e-4, 2e-3),
    (torch.float32, "medium"): (4e-3, 2e-2),
    (torch.float16, "highest"): (2e-7, 5e-4),
    (torch.bfloat16, "highest"): (2e-7, 6e-3),
}


def pairs(n):
    return torch.arange(n) // 2


def labels(n, *, classes=5, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed)).sort().values


def unit(n, d, *, seed=0, dtype=torch.float16):  # the interpreter's fastest
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=g), dim=1).to(dtype)


def dense(x, y, own, cand, *, scale, powers):
    """Log-sum-exps of rows and of columns in float64, from the whole matrix; -inf where empty."""
    s = scale * x @ y.T
    negative = own[:, None] != cand[None, :]
    found = []
    for dim in (1, 0):
        some = negative.any(dim)
        terms = [s.new_full(some.shape, -math.inf) for _ in powers]
        for k, p in enumerate(powers):
            e = (p * s).masked_fill(~negative, -math.inf)
            e = e.movedim(dim, 1)[some]
            terms[k] = terms[k].masked_scatter(some, e.logsumexp(1))
        found.append(torch.stack(terms))
    return found


def compare(x, own, y=None, cand=None, *, scale, powers, bounded, precision="highest", sides="rc"):
    """Both passes as rowstats uses them, against dense(); y is None for the symmetric case."""
    symmetric = y is None
    cost, relative = ERRORS[x.dtype, precision]
    leaves = [v.double().requires_grad_() for v in ([x] if symmetric else [x, y])]
    wanted = dense(
        leaves[0], leaves[-1], own, own if symmetric else cand, scale=scale, powers=powers
    )
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(w.shape, generator=g, dtype=torch.float64) for w in wanted]
    total = sum(
        (w.where(w > -math.inf, 0) * g).sum()
        for w, g, side in zip(wanted, grads, "rc", strict=True)
        if side in sides
    )
    exact = torch.autograd.grad(total, leaves)

    x, own = x.to(DEVICE), own.int().to(DEVICE)
    y, cand = (x, own) if symmetric else (y.to(DEVICE), cand.int().to(DEVICE))
    same = {"scale": scale, "powers": powers, "bounded": bounded, "precision": precision}
    rows, cols = kernels.forward(x, y, own, cand, symmetric=symmetric, columns="c" in sides, **same)
    assert (cols is None) == ("c" not in sides)
    tolerance = 3e-6 + max(powers) * scale * cost
    for found, formula in zip((rows, cols), wanted, strict=True):
        if found is not None:
            assert found.dtype == torch.float64
            torch.testing.assert_close(
                found.double().cpu(), formula.detach(), atol=tolerance, rtol=1e-6
            )
    r, c = (
        (g.float().to(DEVICE), found) if side in sides else (None, None)
        for g, found, side in zip(grads, (rows, cols), "rc", strict=True)
    )

    def gradient(a, b, groups_a, groups_b, r, c):
        found = kernels.backward(
            a, b, groups_a, groups_b,
            row_grad=r[0], row_lse=r[1], col_grad=c[0], col_lse=c[1], **same,
        )  # fmt: skip
        assert found.dtype == torch.float32
        assert found.shape == a.shape
        return found.double().cpu()

    if symmetric:  # every pair counts as a row's and as a column's
        found = [gradient(x, x, own, own, r, c) + gradient(x, x, own, own, c, r)]
    else:
        found = [gradient(x, y, own, cand, r, c), gradient(y, x, cand, own, c, r)]
    for ours, formula in zip(found, exact, strict=True):
        assert (ours - formula).norm() <= (relative + tolerance) * formula.norm() + 1e-12


class TestAgainstTheFormula:
    __test__ = DEVICE is not None

    @pytest.mark.parametrize("powers", [(2, 1), (1.5, 0.5), (1,), (2.3, 1.3), (4, 3), (1, 2)])
    @pytest.mark.parametrize("bounded", [True, False])
    def test_symmetric(self, powers, bounded):
        scale = 5.0 if bounded else 30.0
        x = unit(40, 8, dtype=torch.float32)
        compare(x, pairs(40), scale=scale, powers=powers, bounded=bounded)

    @pytest.mark.parametrize("powers", [(2, 1), (1,), (2.3, 1.3)])
    @pytest.mark.parametrize("bounded", [True, False])
    @pytest.mark.parametrize("sides", ["rc", "r", "c"])
    def test_rectangular(self, powers, bounded, sides):
        x, y, own, cand = unit(20, 8), unit(45, 8, seed=1), labels(20), labels(45, seed=1)
        if sides == "c":  # statistics of columns only are those of the exchanged problem
            x, y, own, cand, sides = y, x, cand, own, "r"
        scale = 5.0 if bounded else 30.0
        compare(
            x, own, y, cand, scale=scale, powers=powers, bounded=bounded, sides=sides,
        )  # fmt: skip

    @pytest.mark.parametrize(("dtype", "precision"), ERRORS)
    @pytest.mark.parametrize("bounded", [True, False])
    def test_types_and_precisions(self, dtype, precision, bounded):
        x, y = unit(40, 24, dtype=dtype), unit(30, 24, seed=1, dtype=dtype)
        compare(
            x, pairs(40), y, pairs(30), scale=3.0, powers=(2, 1), bounded=bounded,
            precision=precision,
        )  # fmt: skip

    @pytest.mark.parametrize("d", [5, 128, 300])
    @pytest.mark.parametrize(("dtype", "precision"), [*ERRORS][:4])
    def test_widths(self, d, dtype, precision):
        x = unit(30, d, dtype=dtype)
        compare(x, pairs(30), scale=4.0, powers=(2, 1), bounded=True, precision=precision)

    @pytest.mark.parametrize("n", [2, 3, 31, 32, 33, 64, 65])
    def test_any_number_of_rows(self, n):
        compare(unit(n, 8), labels(n), scale=4.0, powers=(2, 1), bounded=True)

    @pytest.mark.parametrize("bounded", [True, False])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_one_program_for_all_columns(self, monkeypatch, bounded, symmetric):
        monkeypatch.setattr(kernels, "_splits", lambda n, m, target: 1)
        other = (None, None) if symmetric else (unit(40, 8, seed=1), labels(40, seed=1))
        compare(unit(70, 8), labels(70), *other, scale=4.0, powers=(2, 1), bounded=bounded)

    @pytest.mark.parametrize("bounded", [True, False])
    def test_groups_of_every_size(self, bounded):
        own = torch.tensor([0] + [1] * 40 + [2, 2] + [3] * 17)
        compare(unit(60, 8), own, scale=4.0, powers=(2, 1), bounded=bounded)

    @pytest.mark.parametrize("bounded", [True, False])
    @pytest.mark.parametrize("n", [1, 2, 40])
    def test_one_group_has_no_negatives_and_no_gradient(self, bounded, n):
        x, own = unit(n, 16).to(DEVICE), torch.zeros(n, dtype=torch.int32, device=DEVICE)
        same = {"scale": 2.0, "powers": (2.0, 1.0), "bounded": bounded, "precision": "highest"}
        lse, _ = kernels.forward(x, x, own, own, symmetric=True, columns=True, **same)
        assert (lse == -math.inf).all()
        g = torch.ones_like(lse)
        found = kernels.backward(
            x, x, own, own, row_grad=g, row_lse=lse, col_grad=g, col_lse=lse, **same
        )
        assert (found == 0).all()

    @pytest.mark.parametrize("bounded", [True, False])
    def test_some_rows_without_negatives(self, bounded):
        own, cand = torch.arange(40) // 4, torch.full((35,), 3)  # four rows' group is all there is
        x, y = unit(40, 16), unit(35, 16, seed=1)
        compare(x, own, y, cand, scale=4.0, powers=(2, 1), bounded=bounded)

    @pytest.mark.parametrize("tile", [(64, 128), (128, 64)])
    @pytest.mark.parametrize(("dtype", "precision"), [*ERRORS][1::2])
    def test_tiles_of_other_shapes(self, monkeypatch, tile, dtype, precision):
        config = triton.Config(dict(zip(("BM", "BN"), tile, strict=True)), num_warps=4)
        for kernel in (kernels._forward_kernel, kernels._backward_kernel):
            monkeypatch.setattr(kernel, "configs", [config])
        monkeypatch.setattr(kernels, "_splits", lambda n, m, target: 1)
        x, y = unit(150, 16, dtype=dtype), unit(140, 16, seed=1, dtype=dtype)
        same = {"scale": 4.0, "powers": (2, 1), "bounded": True, "precision": precision}
        compare(x, labels(150), **same)
        compare(x, labels(150), y, labels(140), **same)

    @pytest.mark.parametrize("powers", [(2, 1), (3.7, 2.7), (51.0, 50.0)])
    @pytest.mark.parametrize("sides", ["rc", "r"])
    def test_scale_100_stays_finite(self, powers, sides):
        x = unit(50, 16, dtype=torch.float32)
        x[10:20] = x[0]  # scores up to 100, and down to -100
        x[20:30] = -x[0]
        compare(x, pairs(50), scale=100.0, powers=powers, bounded=False, sides=sides)

    def test_nothing_arrives(self):
        x, own = unit(10, 300).to(DEVICE), pairs(10).int().to(DEVICE)
        none = dict.fromkeys(("row_grad", "row_lse", "col_grad", "col_lse"))
        found = kernels.backward(
            x, x, own, own, scale=1.0, powers=(1.0,), bounded=True, precision="high", **none
        )
        assert found.shape == (10, 300)
        assert (found == 0).all()

    @pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
    @pytest.mark.parametrize("bounded", [True, False])
    def test_gradients_of_any_size_fit_into_float16(self, size, bounded):
        x, own = unit(40, 16).to(DEVICE), pairs(40).int().to(DEVICE)
        same = {"scale": 4.0, "powers": (2.0, 1.0), "bounded": bounded, "precision": "highest"}
        lse, _ = kernels.forward(x, x, own, own, symmetric=True, columns=False, **same)
        one, other = (
            kernels.backward(
                x, x, own, own, row_grad=torch.full_like(lse, g), row_lse=lse, col_grad=None,
                col_lse=None, **same,
            )
            for g in (1.0, size)
        )  # fmt: skip
        torch.testing.assert_close(other, one * size, rtol=1e-5, atol=size * 1e-6)

    def test_small_gradients_beside_a_large_one_in_float16(self):
        x, own = unit(64, 16).to(DEVICE), pairs(64).int().to(DEVICE)
        same = {"scale": 1.0, "powers": (1.0,), "bounded": True, "precision": "highest"}
        lse, _ = kernels.forward(x, x, own, own, symmetric=True, columns=False, **same)
        small = torch.full_like(lse, 1e-6)
        mixed = small.clone()
        mixed[0, 0] = 1.0
        alone, beside = (
            kernels.backward(
                x, x, own, own, row_grad=g, row_lse=lse, col_grad=None, col_lse=None, **same
            )[1:]
            for g in (small, mixed)
        )
        assert (alone - beside).norm() <= 1e-2 * alone.norm()

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_deterministic_algorithms(self, symmetric):
        x, own = unit(50, 16).to(DEVICE), labels(50).int().to(DEVICE)
        y, cand = (x, own) if symmetric else (x[:40], own[:40])
        options = {
            "scale": 4.0, "powers": (2.0, 1.0), "bounded": True, "precision": "highest",
            "symmetric": symmetric, "columns": True,
        }  # fmt: skip
        free = kernels.forward(x, y, own, cand, **options)
        torch.use_deterministic_algorithms(True)
        try:
            first, second = (kernels.forward(x, y, own, cand, **options) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b, c in zip(first, second, free, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)

    def test_arriving_gradients_need_not_be_contiguous(self):
        x, own = unit(30, 16).to(DEVICE), pairs(30).int().to(DEVICE)
        same = {"scale": 4.0, "powers": (2.0, 1.0), "precision": "highest"}
        for bounded in (True, False):
            lse, _ = kernels.forward(
                x, x, own, own, symmetric=True, columns=False, bounded=bounded, **same
            )
            g = torch.randn_like(lse)
            straight, turned = (
                kernels.backward(
                    x, x, own, own, row_grad=a, row_lse=b, col_grad=None, col_lse=None,
                    bounded=bounded, **same,
                )
                for a, b in ((g, lse), (g.T.contiguous().T, lse.T.contiguous().T))
            )  # fmt: skip
            torch.testing.assert_close(straight, turned)


@pytest.mark.skipif(DEVICE is not None, reason="the comparisons run in this process")
def test_comparisons_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"{__file__}::TestAgainstTheFormula"],
        cwd=project_root(), capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80, done.stdout


# What needs neither a GPU nor the interpreter -----------------------------------------------------


@pytest.mark.parametrize(
    ("powers", "a", "b"),
    [
        ((2.0, 1.0), 2, 1), ((1.5, 0.5), 3, 1), ((4.0, 2.0), 2, 1), ((4, 3), 4, 3),
        ((6.0, 5.5), 12, 11), ((7.0, 1.0), 0, 0), ((2.3, 1.3), 0, 0), ((1.0,), 0, 0),
    ],
)  # fmt: skip
def test_one_exponential_for_half_integer_powers(powers, a, b):
    assert kernels._products(powers) == {"P": len(powers), "A": a, "B": b}
    shared, first, last = kernels._rates(0.5, powers)
    assert first == pytest.approx(0.5 * powers[0] / math.log(2))
    assert last == pytest.approx(0.5 * powers[-1] / math.log(2))
    if a:
        assert (a * shared, b * shared) == pytest.approx((first, last))


@pytest.mark.parametrize(("precision", "bits"), [("highest", 23), ("high", 11), ("medium", 8)])
def test_parts_of_a_float32_add_up_to_it(precision, bits):
    x = torch.randn(50, 30) * torch.logspace(-10, 10, 50)[:, None]
    operand, width, parts = kernels._operand(x, precision)
    assert operand.shape == (50, width * parts)
    total = operand.double().view(50, parts, width).sum(1)
    assert (total[:, 30:] == 0).all()
    error = ((total[:, :30] - x).abs() / x.abs()).max()
    assert error <= 2.0**-bits


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2**23), (512, 512), (2**16, 2**16), (2**20, 1)])
def test_columns_are_shared_out_within_the_limits_of_a_grid(n, m):
    splits = kernels._splits(n, m, 2**17)
    assert 1 <= splits < 2**16
    assert splits == 1 or splits * n <= 2**17  # so many partial results
    if n == m == 512:
        assert splits * n / 64 >= 128  # programs, for the 132 processors of an H200


def test_blocks_by_columns():
    y = torch.randn(70, 16)
    turned = kernels._turned(y)
    assert turned.is_contiguous()
    assert len(turned) * 32 == 128  # the tallest tile ends inside
    for j in (0, 31, 32, 69):
        assert torch.equal(turned[j // 32, :, j % 32], y[j])
    assert (turned[2, :, 6:] == 0).all()


@pytest.mark.skipif(DEVICE is not None, reason="about a machine without a GPU")
def test_not_available_without_a_gpu():
    assert not any(kernels.available(device) for device in ("cpu", "cuda", "cuda:1", "mps"))


# The machine code ---------------------------------------------------------------------------------

MODES = {  # name: kernel, type of x, capability, tile (BM, BN, warps, stages), what differs
    "bf16 triangle, Ampere": ("forward", "bf16", 80, (128, 64, 4, 3), {"TRIANGLE": True}),
    "bf16 triangle": ("forward", "bf16", 90, (128, 64, 4, 3), {"TRIANGLE": True}),
    "bf16 online, two rates": ("forward", "bf16", 90, (64, 32, 4, 2), {"BOUNDED": False, "A": 0}),
    "float32 in steps": ("forward", "bf16", 80, (64, 32, 4, 2), {"PARTS": 3, "BK": 32}),
    "bf16 gradient, Ampere": ("backward", "bf16", 80, (128, 64, 8, 3), {}),
    "bf16 gradient": ("backward", "bf16", 90, (128, 64, 8, 3), {}),
    "bf16 gradient, online": ("backward", "bf16", 90, (64, 32, 4, 2), {"BOUNDED": False}),
    "tf32 gradient": ("backward", "fp32", 90, (128, 64, 8, 2), {}),
    "float32 gradient": ("backward", "bf16", 90, (64, 32, 4, 2), {"PARTS": 3}),
    "float32 gradient, Ampere": ("backward", "bf16", 80, (64, 32, 4, 2), {"PARTS": 3, "BK": 32}),
    "wide gradient": ("backward", "bf16", 90, (64, 32, 4, 2), {"D": 384, "BK": 64, "P": 1, "A": 0}),
}  # fmt: skip


def compiled(kernel, dtype, capability, tile, changes):
    """The kernel for d = 128 and powers (2, 1), unless changed, compiled for a GPU not here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(kernels, f"_{kernel}_kernel").fn
    constants = {
        "D": 128, "BK": 128, "PARTS": 1, "P": 2, "A": 2, "B": 1, "BOUNDED": True,
        "BM": tile[0], "BN": tile[1], **changes,
    }  # fmt: skip
    if kernel == "forward":
        constants["TRIANGLE"] = constants["COLUMNS"] = bool(changes.get("TRIANGLE"))
    else:
        constants["DO"] = 128
        if constants["BOUNDED"]:
            constants |= {"row_shift": None, "col_shift": None}
        if dtype != "fp32":
            constants["turned"] = None
    types = dict.fromkeys(function.arg_names, "*fp32")
    types |= dict.fromkeys(("x", "y", "turned"), f"*{dtype}") | {"low": "*i32", "high": "*i32"}
    types |= dict.fromkeys(("n", "m", "size"), "i32")
    types |= dict.fromkeys(("unit", "rate1", "rate2"), "fp32")
    aligned = [["tt.divisibility", 16]]
    names = [a for a in function.arg_names if a not in constants]
    source = ASTSource(
        function,
        {a: types[a] if a in names else "constexpr" for a in function.arg_names},
        {(function.arg_names.index(a),): value for a, value in constants.items()},
        {(function.arg_names.index(a),): aligned for a in names if types[a].startswith("*")},
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile[2], "num_stages": tile[3], "enable_fp_fusion": True},
    )


@pytest.mark.skipif(INTERPRETER, reason="the interpreter compiles nothing")
@pytest.mark.skipif(triton.__version__ < "3.3", reason="another way to call the compiler")
@pytest.mark.parametrize("name", MODES)
def test_compiles_to_tensor_cores_without_spilling(name, tmp_path, monkeypatch):
    nvidia = pytest.importorskip("triton.backends.nvidia")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compiled(*MODES[name])
    capability = MODES[name][2]
    assert re.search(r"wgmma" if capability == 90 else r"mma\.sync", made.asm["ptx"])
    assert "ex2.approx.ftz" in made.asm["ptx"]  # without ftz it costs three instructions more
    assert made.metadata.shared <= {80: 163, 90: 227}[capability] * 1024
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    if tool.exists():
        (tmp_path / "cubin").write_bytes(made.asm["cubin"])
        used = subprocess.run(
            [tool, "--dump-resource-usage", tmp_path / "cubin"], capture_output=True, text=True
        ).stdout
        assert "STACK:0 " in used, used


# On a GPU -----------------------------------------------------------------------------------------


def step(x, own, *, powers=(2.0, 1.0), bounded=True, precision="highest"):
    same = {"scale": 2.0, "powers": powers, "bounded": bounded, "precision": precision}
    lse, _ = kernels.forward(x, x, own, own, symmetric=True, columns=True, **same)
    g = torch.full_like(lse, 1 / len(x))
    return lse, kernels.backward(
        x, x, own, own, row_grad=g, row_lse=lse, col_grad=g, col_lse=lse, **same
    )


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("dtype", "precision"), ERRORS)
@pytest.mark.parametrize("bounded", [True, False])
def test_a_few_thousand_rows(dtype, precision, bounded):
    x = unit(3001, 128, dtype=dtype)
    compare(x, pairs(3001), scale=5.0, powers=(2, 1), bounded=bounded, precision=precision)
    compare(
        x[:500], labels(500), x[:2000], labels(2000), scale=5.0, powers=(2.3, 1.3),
        bounded=bounded, precision=precision,
    )  # fmt: skip


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("d", [48, 256, 512, 768, 1024])
@pytest.mark.parametrize(("dtype", "precision"), ERRORS)
def test_wide_rows(d, dtype, precision):
    x = unit(700, d, dtype=dtype)
    compare(x, pairs(700), scale=5.0, powers=(2, 1), bounded=True, precision=precision)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("dtype", "precision"), ERRORS)
def test_the_host_never_waits(dtype, precision):
    x, own = unit(1000, 128, dtype=dtype).cuda(), pairs(1000).int().cuda()
    for bounded in (True, False):
        step(x, own, bounded=bounded, precision=precision)  # compiles, and chooses its tiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(x, own, bounded=bounded, precision=precision)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
def test_replays_as_a_cuda_graph():
    x, own = unit(1000, 128, dtype=torch.bfloat16).cuda(), pairs(1000).int().cuda()
    step(x, own)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lse, dx = step(x, own)
    x.copy_(unit(1000, 128, seed=1, dtype=torch.bfloat16))
    graph.replay()
    for replayed, fresh in zip((lse, dx), step(x, own), strict=True):
        torch.testing.assert_close(replayed, fresh, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@on_gpu
def test_a_million_rows_in_little_memory():
    n, d = 2**20, 128
    x = normalize(torch.randn(n, d, device="cuda"), dim=1).bfloat16()
    own = torch.arange(n, device="cuda", dtype=torch.int32) // 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lse, dx = step(x, own)
    assert torch.cuda.max_memory_allocated() - before <= 4 * n * d * 4 + 2**26
    some = torch.arange(0, n, n // 50)
    s = 2.0 * x[some].double() @ x.double().T
    negative = own[some, None] != own[None, :]
    exact = torch.stack([(p * s).masked_fill(~negative, -math.inf).logsumexp(1) for p in (2, 1)])
    torch.testing.assert_close(lse[:, some].double(), exact, atol=1e-4, rtol=0)
    assert torch.isfinite(dx).all()

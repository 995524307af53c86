r"""The two streaming passes of :mod:`hcl.rowstats` as Triton kernels, for CUDA (Ampere and later).

With :math:`s_{ij} = \mathrm{scale}\,x_i^\top y_j` and the negatives j of a row i (the columns of
other groups), the forward pass reduces tiles of s to

.. math:: L_{k,i} = \log \sum_{j\ \mathrm{negative}} e^{p_k s_{ij}}, \qquad p = \mathrm{powers},

and the backward pass computes the tiles again for the gradient; nothing of size (n, m) is stored.
Groups are sorted, so the columns that are *not* negatives of row i are one range
low_i <= j < high_i, and few tiles need a mask.
"""

# mypy: allow-untyped-defs
from __future__ import annotations  # tl.constexpr stays a string where there is no Triton

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:  # torch brings it on Linux only
    triton = None

LOG2E = math.log2(math.e)
PEAK = 2.0**14  # what the largest possible |H| is scaled to; float16 ends at 65504
TINY = 1e-30  # gradients below it may vanish; PEAK / TINY is still finite
FAR = 1e30  # 2^-FAR is zero
LONGEST = 128  # no tile has longer edges


def _jit(function: Any) -> Any:
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=["n", "m", "size"])


# In the kernels exponentials are powers of two, so a rate is power * scale * log2(e). A and B are
# the powers in multiples of `unit` where one exponential serves both, and 0 where none does.
# Tiles are (BM, BN). x and y have D columns, taken BK at a time. With PARTS = 3 a float32 is the
# sum of three bfloat16 of falling size, which lie D columns apart. `size` only selects the tuning.


@_jit
def _power(h, exponent: tl.constexpr):
    out = h
    for _ in tl.static_range(exponent - 1):
        out = out * h
    return out


INTERPRETED = triton is not None and not isinstance(_power, triton.JITFunction)
if triton:
    UPCAST = tl.constexpr(INTERPRETED)  # the interpreter cannot multiply bfloat16
    LN2, EDGE = tl.constexpr(math.log(2)), tl.constexpr(LONGEST)


@_jit
def _dot(a, b, out):
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, out, input_precision="tf32")


@_jit
def _product(a1, a2, a3, b1, b2, b3, out, PARTS: tl.constexpr):
    """out + a b, smallest terms first; those left out are below 2^-24 of the largest."""
    if PARTS == 3:
        out = _dot(a3, b1, _dot(a1, b3, _dot(a2, b2, out)))
        out = _dot(a2, b1, _dot(a1, b2, out))
    return _dot(a1, b1, out)


@_jit
def _tile(pointer, start, row, count, column, WIDTH: tl.constexpr):
    """Rows start + row of a (count, WIDTH) matrix; zero past its end."""
    pointer += tl.cast(start, tl.int64) * WIDTH
    place = row[:, None] * WIDTH + column[None, :]
    return tl.load(pointer + place, mask=row[:, None] < count - start, other=0.0)


@_jit
def _parts(pointer, start, row, count, column, D: tl.constexpr, PARTS: tl.constexpr):
    first = _tile(pointer, start, row, count, column, PARTS * D)
    if PARTS == 1:
        return first, first, first
    else:
        second = _tile(pointer, start, row, count, column + D, PARTS * D)
        return first, second, _tile(pointer, start, row, count, column + 2 * D, PARTS * D)


@_jit
def _scores(
    x1, x2, x3, x, i0, row, n, y, j0, column, m, low, high,
    D: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The tile x y^T, -inf at pairs that are no negatives. The parts of x are given if BK = D."""
    k = tl.arange(0, BK)
    s = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for k0 in range(0, D, BK):
        if BK < D:
            x1, x2, x3 = _parts(x, i0, row, n, k0 + k, D, PARTS)
        y1, y2, y3 = _parts(y, j0, column, m, k0 + k, D, PARTS)
        s = _product(x1, x2, x3, tl.trans(y1), tl.trans(y2), tl.trans(y3), s, PARTS)
    end = j0 + column.shape[0]
    if ((j0 < tl.max(high)) & (end > tl.min(low))) | (end > m):
        j = j0 + column[None, :]
        s = tl.where(((j < low[:, None]) | (j >= high[:, None])) & (j < m), s, float("-inf"))
    return s


@_jit
def _exponentials(s, unit, rate1, rate2, A: tl.constexpr, B: tl.constexpr):
    """2^(rate1 s) and 2^(rate2 s)."""
    if A > 0:
        h = tl.exp2(s * unit)
        return _power(h, A), _power(h, B)
    else:
        return tl.exp2(s * rate1), tl.exp2(s * rate2)


def _tune(tiles: list[tuple[int, int, int, int]], key: list[str], zero: list[str]) -> Any:
    """Choose among tiles (BM, BN, warps, stages) by time, for each value of key."""
    if triton is None:
        return lambda function: function
    configs = [
        triton.Config({"BM": bm, "BN": bn}, num_warps=warps, num_stages=stages)
        for bm, bn, warps, stages in ([(32, 32, 4, 1)] if INTERPRETED else tiles)
    ]
    # not triton.autotune: that of Triton 3.2 looks for a GPU as soon as the module is imported
    return lambda kernel: triton.runtime.Autotuner(
        kernel, kernel.arg_names, configs, key, zero, None,
        prune_configs_by={"early_config_prune": _fitting}, do_bench=_milliseconds,
    )  # fmt: skip


def _milliseconds(call: Any, quantiles: Any) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _fitting(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Those whose tiles fit into shared memory; only the first where results must repeat."""
    x, width, step = arguments["x"], constants["D"], constants["BK"]
    limit = triton.runtime.driver.active.utils.get_device_properties(x.device.index)
    entry, out = x.element_size() * constants["PARTS"], constants.get("DO", 0)
    streams = 1 if arguments.get("turned") is None else 2

    def needed(config: Any) -> int:
        bm, bn, stages = config.kwargs["BM"], config.kwargs["BN"], config.num_stages
        if step == width:
            loop = width * (bm + stages * streams * bn)
        else:
            loop = stages * step * (bm + bn) + out * bn
        return max(entry * loop, 4 * bm * out) + 2048  # bytes; a few vectors of the tile's height

    fit = [c for c in configs if needed(c) <= limit["max_shared_mem"]] or [min(configs, key=needed)]
    return fit[:1] if arguments["size"] == 0 else fit


@_tune(
    [(128, 64, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2)],
    key=["size", "D", "PARTS", "TRIANGLE", "COLUMNS", "BOUNDED"],
    zero=["col_sums"],
)
@_jit
def _forward_kernel(
    x, y, low, high, row_out, col_sums, n, m, unit, rate1, rate2, size,
    D: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    P: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    TRIANGLE: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i0 = tl.program_id(0) * BM
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    inside = row < n - i0
    lows = tl.load(low + i0 + row, mask=inside, other=0)
    highs = tl.load(high + i0 + row, mask=inside, other=m)  # past the end there are no negatives
    begin = 0
    if TRIANGLE:  # the negatives j > i are those right of the group of i
        lows = tl.zeros_like(lows)
        begin = tl.min(highs) // BN * BN
    x1, x2, x3 = _parts(x, i0, row, n, tl.arange(0, BK), D, PARTS)
    top = tl.full([BM], float("-inf"), tl.float32)  # the largest s so far
    sum1 = tl.zeros([BM], tl.float32)
    sum2 = tl.zeros([BM], tl.float32)
    for j0 in range(begin + tl.program_id(1) * BN, m, tl.num_programs(1) * BN):
        s = _scores(x1, x2, x3, x, i0, row, n, y, j0, column, m, lows, highs, D, BK, PARTS)
        if not BOUNDED:
            new = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            fade1, fade2 = _exponentials(top - shift, unit, rate1, rate2, A, B)
            sum1 *= fade1
            sum2 *= fade2
            s -= shift[:, None]
            top = new
        h1, h2 = _exponentials(s, unit, rate1, rate2, A, B)
        sum1 += tl.sum(h1, 1)
        if P == 2:
            sum2 += tl.sum(h2, 1)
        if COLUMNS:
            sums = col_sums + j0 + column
            tl.atomic_add(sums, tl.sum(h1, 0), mask=column < m - j0, sem="relaxed")
            if P == 2:
                tl.atomic_add(sums + m, tl.sum(h2, 0), mask=column < m - j0, sem="relaxed")
    if not BOUNDED:
        sum1 = (rate1 * top + tl.log2(sum1)) * LN2
        sum2 = (rate2 * top + tl.log2(sum2)) * LN2
    out = row_out + tl.program_id(1) * P * n + i0 + row
    tl.store(out, sum1, mask=inside)
    if P == 2:
        tl.store(out + n, sum2, mask=inside)


@_jit
def _pair(pointer, place, count, P: tl.constexpr):
    """Some entries of the first and the last row of a (P, count) matrix, padded by zeros."""
    last = (P - 1) * tl.cdiv(count, EDGE) * EDGE
    return tl.load(pointer + place), tl.load(pointer + last + place)


@_tune(
    [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2),
     (64, 64, 4, 3), (128, 32, 8, 2), (64, 32, 4, 2)],
    key=["size", "D", "PARTS", "BOUNDED"],
    zero=[],
)  # fmt: skip
@_jit
def _backward_kernel(
    x, y, turned, low, high, row, row_shift, col, col_shift, gain, out,
    n, m, unit, rate1, rate2, size,
    D: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, DO: tl.constexpr,
    P: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BOUNDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i0 = tl.program_id(0) * BM
    i, j = tl.arange(0, BM), tl.arange(0, BN)  # from the start of the tile
    lows = tl.load(low + i0 + i, mask=i < n - i0, other=0)
    highs = tl.load(high + i0 + i, mask=i < n - i0, other=m)
    x1, x2, x3 = _parts(x, i0, i, n, tl.arange(0, BK), D, PARTS)
    r1, r2 = _pair(row, i0 + i, n, P)
    if not BOUNDED:
        u1, u2 = _pair(row_shift, i0 + i, n, P)
    k = tl.arange(0, DO)  # the columns of the gradient computed here
    if DO < D:
        k += tl.program_id(2) * DO
    dx = tl.zeros([BM, DO], tl.float32)
    for j0 in range(tl.program_id(1) * BN, m, tl.num_programs(1) * BN):
        s = _scores(x1, x2, x3, x, i0, i, n, y, j0, j, m, lows, highs, D, BK, PARTS)
        c1, c2 = _pair(col, j0 + j, m, P)
        if not BOUNDED:  # a shift for each side, so that no exponential exceeds 1
            v1, v2 = _pair(col_shift, j0 + j, m, P)
            h = r1[:, None] * tl.exp2(rate1 * s - u1[:, None])
            h += c1[None, :] * tl.exp2(rate1 * s - v1[None, :])
            if P == 2:
                h += r2[:, None] * tl.exp2(rate2 * s - u2[:, None])
                h += c2[None, :] * tl.exp2(rate2 * s - v2[None, :])
        elif P == 1:
            h = tl.exp2(s * rate1) * (r1[:, None] + c1[None, :])
        elif A > B:  # h^B (b + a h^(A - B)) costs less than a h^A + b h^B
            e = tl.exp2(s * unit)
            h = _power(e, A - B) * (r1[:, None] + c1[None, :]) + (r2[:, None] + c2[None, :])
            h *= _power(e, B)
        else:
            h1, h2 = _exponentials(s, unit, rate1, rate2, A, B)
            h = h1 * (r1[:, None] + c1[None, :]) + h2 * (r2[:, None] + c2[None, :])
        if turned is not None:
            # float32: Hopper's tensor cores want the right factor by columns
            place = (k * 32)[:, None] + (j // 32 * 32 * D + j % 32)[None, :]
            yj = tl.load(turned + tl.cast(j0, tl.int64) * D + place)
            dx = _dot(h, tl.trans(yj), dx)
        else:
            y1, y2, y3 = _parts(y, j0, j, m, k, D, PARTS)  # the compiler reuses those of s
            h1 = h.to(y1.dtype)
            h2 = h1
            h3 = h1
            if PARTS == 3:
                h -= h1.to(tl.float32)
                h2 = h.to(y1.dtype)
                h3 = (h - h2.to(tl.float32)).to(y1.dtype)
            dx = _product(h1, h2, h3, y1, y2, y3, dx, PARTS)
    start = out + (tl.program_id(1).to(tl.int64) * n + i0) * D
    place = i[:, None] * D + k[None, :]
    tl.store(start + place, dx * tl.load(gain), mask=i[:, None] < n - i0)


# The launches -------------------------------------------------------------------------------------


def available(device: torch.device | str) -> bool:
    """Whether tensors on this device can be given to the kernels.

    True on CUDA devices of compute capability 8.0 and later where Triton works, and on any while
    its interpreter is on (TRITON_INTERPRET=1 before this module is first imported).

    >>> available("meta")
    False
    """
    device = torch.device(device)
    if INTERPRETED:
        return device.type in ("cpu", "cuda")
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and _triton_runs()


@cache
def _triton_runs() -> bool:
    """Triton compiles a part of itself when first used, which takes a C compiler."""
    try:
        return triton is not None and triton.runtime.driver.active.utils is not None
    except Exception:  # its kind depends on what is missing
        return False


def forward(
    x: Tensor, y: Tensor, own: Tensor, cand: Tensor, *, scale: float, powers: tuple[float, ...],
    symmetric: bool, columns: bool, bounded: bool, precision: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-sum-exps of power * scale * <x_i, y_j> over the negatives, of rows and of columns.

    Under :func:`torch.use_deterministic_algorithms` the same input gives the same bits, in up to
    twice the time: without atomic additions, and with tiles that no measured time decides on.

    Args:
        x, y: (n, d) and (m, d), bfloat16, float16 or float32; n, m >= 1, d <= 1024.
        own, cand: (n,) and (m,) int32, ascending: the groups of rows and columns. Pairs of one
            group are no negatives.
        scale: 1 / temperature > 0.
        powers: one or two numbers > 0.
        symmetric: y is x and cand is own; half of the tiles are then enough.
        columns: also reduce over the rows of each column.
        bounded: |power * scale * <x_i, y_j>| < 40 holds for all pairs, so no maximum is needed.
        precision: of float32, as in :func:`torch.set_float32_matmul_precision`: "highest" is
            three bfloat16 parts (24 bits), "high" TF32, "medium" bfloat16.

    Returns:
        (P, n) float64 and, if columns, (P, m) float64, else None; -inf without negatives. The
        sums are float32; their logarithms would lose digits that the gradient needs.

    Source: our reading; without `bounded`, the usual online softmax.
    """
    n, m, steady = len(x), len(y), torch.are_deterministic_algorithms_enabled()
    triangle = symmetric and bounded and not steady
    together = triangle or (columns and not symmetric and bounded and not steady)
    a, width, parts = _operand(x, precision)
    b = a if symmetric else _operand(y, precision)[0]
    splits = _splits(n, m, 2**17)
    row_out = a.new_empty(splits, len(powers), n, dtype=torch.float32)
    col_sums = a.new_zeros(len(powers), m if together else 1, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _forward_kernel[lambda tile: (triton.cdiv(n, tile["BM"]), splits)](
            a, b, *_excluded(own, cand), row_out, col_sums, n, m, *_rates(scale, powers),
            _size(n, steady), D=width, BK=_step(a, width, parts), PARTS=parts,
            TRIANGLE=triangle, COLUMNS=together, BOUNDED=bounded, **_products(powers),
            enable_fp_fusion=True,
        )  # fmt: skip
    if bounded:
        sums = row_out.sum(0, dtype=torch.float64)
        rows = (sums + col_sums if triangle else sums).log()
    else:
        rows = row_out.double().logsumexp(0)
    if not columns or symmetric:
        return rows, rows if columns else None
    if together:
        return rows, col_sums.double().log()
    return rows, forward(
        y, x, cand, own, scale=scale, powers=powers, symmetric=False, columns=False,
        bounded=bounded, precision=precision,
    )[0]  # fmt: skip


def backward(
    x: Tensor, y: Tensor, own: Tensor, cand: Tensor, *, scale: float, powers: tuple[float, ...],
    row_grad: Tensor | None, row_lse: Tensor | None, col_grad: Tensor | None,
    col_lse: Tensor | None, bounded: bool, precision: str,
) -> Tensor:  # fmt: skip
    r"""Gradient for x of the log-sum-exps of :func:`forward`. That for y: exchange the roles.

    .. math:: dx_i = \mathrm{scale} \sum_{j\ \mathrm{negative}} H_{ij}\, y_j, \qquad
        H_{ij} = \sum_k p_k \big( g^{\mathrm{row}}_{ki} e^{p_k s_{ij} - L^{\mathrm{row}}_{ki}}
        + g^{\mathrm{col}}_{kj} e^{p_k s_{ij} - L^{\mathrm{col}}_{kj}} \big)

    Args:
        row_grad, row_lse: (P, n), gradient and value of the rows' log-sum-exps, or None.
        col_grad, col_lse: (P, m), the same of the columns.
        the others: as in :func:`forward`.

    Returns: (n, d) float32.

    Source: our reading, the derivative of :func:`forward`.
    """
    n, m, d = len(x), len(y), x.shape[1]
    grads = [g for g in (row_grad, col_grad) if g is not None]
    if not grads:
        return x.new_zeros(n, d, dtype=torch.float32)
    # No exponential exceeds 1, so |H| <= bound, and scaled by PEAK / bound it fits into float16.
    bound = sum(powers) * torch.stack([g.abs().amax() for g in grads]).sum().clamp_min(TINY)
    # linspace, because a tensor made of Python numbers would wait for the device
    weights = torch.linspace(powers[0], powers[-1], len(powers), device=x.device)[:, None]
    weights = weights * (PEAK / bound)
    row, row_shift = _coefficients(row_grad, row_lse, weights, n, bounded)
    col, col_shift = _coefficients(col_grad, col_lse, weights, m, bounded)

    a, width, parts = _operand(x, precision)
    b = a if x is y else _operand(y, precision)[0]
    chunk = width if width <= 256 else 256 if width % 256 == 0 else 128
    splits = _splits(n * (width // chunk), m, 2**15)
    out = a.new_empty(splits, n, width, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward_kernel[lambda tile: (triton.cdiv(n, tile["BM"]), splits, width // chunk)](
            a, b, _turned(b) if b.dtype == torch.float32 else None, *_excluded(own, cand),
            row, row_shift, col, col_shift, (bound * (scale / PEAK)).float(), out, n, m,
            *_rates(scale, powers), _size(n, torch.are_deterministic_algorithms_enabled()),
            D=width, BK=_step(a, width, parts), PARTS=parts, DO=chunk, BOUNDED=bounded,
            **_products(powers), enable_fp_fusion=True,
        )  # fmt: skip
    return (out[0] if splits == 1 else out.sum(0))[:, :d]


def _coefficients(
    grad: Tensor | None, lse: Tensor | None, weights: Tensor, count: int, bounded: bool
) -> tuple[Tensor, Tensor | None]:
    """Factors of the exponentials and, if not bounded, what these lose in base 2.

    (P, count) each, or None, with zeros up to the end of any tile.
    """

    def padded(v: Tensor) -> Tensor:
        return F.pad(v.float(), (0, -count % LONGEST)).contiguous()

    if grad is None or lse is None:
        zeros = weights.new_zeros(len(weights), count)
        return padded(zeros), None if bounded else padded(zeros + FAR)
    # Any finite value will do for -inf: a row without negatives has no exponential left.
    if bounded:
        return padded(grad * weights * (-lse).clamp_max(64).exp()), None
    return padded(grad * weights), padded(lse.clamp_min(-FAR) * LOG2E)


def _excluded(own: Tensor, cand: Tensor) -> tuple[Tensor, Tensor]:
    """The first column of each row's own group and the first after it, (n,) int32."""
    return (
        torch.searchsorted(cand, own, out_int32=True),
        torch.searchsorted(cand, own, right=True, out_int32=True),
    )


def _operand(x: Tensor, precision: str) -> tuple[Tensor, int, int]:
    """x as the kernels take it (n, parts * width), its padded width and the number of parts."""
    d = x.shape[1]
    width = max(16, 1 << (d - 1).bit_length()) if d <= 256 else -(-d // 128) * 128
    x = F.pad(x, (0, width - d)).contiguous()
    if x.dtype != torch.float32:
        return x, width, 1
    if precision == "high":  # to the nearest TF32; the tensor cores would cut off
        return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32), width, 1
    first = x.bfloat16()
    if precision == "medium":
        return first, width, 1
    rest = x - first.float()
    second = rest.bfloat16()
    return torch.cat([first, second, (rest - second.float()).bfloat16()], 1), width, 3


def _turned(y: Tensor) -> Tensor:
    """Blocks of 32 rows, each by columns: (blocks, D, 32), with zeros up to the end of any tile."""
    y = F.pad(y, (0, 0, 0, -len(y) % LONGEST))
    return y.view(-1, 32, y.shape[1]).transpose(1, 2).contiguous()


def _step(x: Tensor, width: int, parts: int) -> int:
    """How many columns of x are multiplied at a time: all where the rows can stay in the chip."""
    datacenter = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    if parts == 3 and not datacenter:
        return min(width, 32)  # more needs more registers than Ampere's tensor cores leave
    if width <= 256 and x.shape[1] * x.element_size() <= 768:
        return width
    return 64 if parts == 1 and x.element_size() == 2 else 32


def _splits(n: int, m: int, target: int) -> int:
    """Among how many programs the columns are shared out, to fill the device when n is small."""
    return max(1, min(target // n, -(-m // 32), 2**15))  # a grid is limited to 2^16 - 1


def _size(n: int, steady: bool) -> int:
    """Sizes that share a tuning; 0 where no measured time may decide."""
    return 0 if steady else min(1 << (n - 1).bit_length(), 2**16)


def _rates(scale: float, powers: tuple[float, ...]) -> tuple[float, float, float]:
    """Of the shared exponential and of both powers, in base 2."""
    unit = powers[0] / max(1, _products(powers)["A"])
    return unit * scale * LOG2E, powers[0] * scale * LOG2E, powers[-1] * scale * LOG2E


def _products(powers: tuple[float, ...]) -> dict[str, int]:
    """P, and A and B with powers = (A unit, B unit), or zeros where these are not small."""
    assert 1 <= len(powers) <= 2, powers
    assert all(p > 0 for p in powers), powers
    halves = [round(2 * p) for p in powers]
    if len(powers) == 1 or any(h != 2 * p or h > 12 for h, p in zip(halves, powers, strict=True)):
        return {"P": len(powers), "A": 0, "B": 0}
    unit = math.gcd(*halves)
    return {"P": 2, "A": halves[0] // unit, "B": halves[1] // unit}

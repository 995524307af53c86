"""Gathering over gloo processes, against the same function of the whole batch in one process."""

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import WORLD, Ranks
from torch import nn

from hcl import distributed
from hcl.distributed import Gathered, gather, total

D = 5
ROWS = [(2, 2, 2), (3, 1, 2), (4, 0, 2), (0, 0, 5)]


@pytest.fixture(scope="module")
def module_ranks(tmp_path_factory):
    kept = []

    def alive():
        if not kept or not all(p.is_alive() for p in kept[-1].processes):
            kept.append(Ranks(tmp_path_factory.mktemp("ranks") / "store"))
        return kept[-1]

    yield alive
    for ranks in kept:
        ranks.stop()


@pytest.fixture
def ranks(module_ranks):
    """The group all tests share: each must leave it usable."""
    return module_ranks()


@pytest.fixture
def mortal_ranks(tmp_path):
    ranks = Ranks(tmp_path / "store")
    yield ranks
    ranks.stop()


def whole_batch(rows, dtype=torch.float64):
    g = torch.Generator().manual_seed(sum(rows))
    z1, z2 = torch.randn(2, sum(rows), D, generator=g, dtype=torch.float64).to(dtype)
    return z1, z2, torch.randint(10, (sum(rows),), generator=g)


def own_batch(rank, rows, dtype=torch.float64):
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    z1, z2, labels = (x[own].clone() for x in whole_batch(rows, dtype))
    return z1.requires_grad_(), z2.requires_grad_(), labels


def objective(z1, z2, anchors):
    """Sum over the anchors of a function of all rows that weighs each anchor differently."""
    z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
    scores = z1[anchors] @ torch.cat([z1, z2]).T
    losses = scores.logsumexp(dim=1) - (z1[anchors] * z2[anchors].sin()).sum(dim=1)
    return (losses * torch.arange(1, len(z1) + 1)[anchors]).sum() / len(z1)


def numbers(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def expected_gradients(rows, dtype, twice=False):
    z1, z2, _ = whole_batch(rows, dtype)
    z1, z2 = (z.double().requires_grad_() for z in (z1, z2))
    value = objective(z1, z2, slice(None))
    first = torch.autograd.grad(value, [z1, z2], create_graph=twice)
    if not twice:
        return value.item(), first
    return value.item(), torch.autograd.grad(sum((g**3).sum() for g in first), [z1, z2])


# Rows, labels and their order ---------------------------------------------------------------------


def gather_rows(rank, rows, dtype):
    z1, z2, labels = own_batch(rank, rows, dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        bare = gather(z1, z2)
        everyone = gather(z1, z2, labels.to(torch.int16))
    assert bare.labels is None
    assert not everyone.z1.requires_grad
    assert everyone.z1.dtype == everyone.z2.dtype == dtype
    assert everyone.labels.dtype == torch.int64
    assert torch.equal(bare.z1, everyone.z1)
    return [*numbers(everyone.z1, everyone.z2, everyone.labels), everyone.start]


@pytest.mark.parametrize("rows", ROWS)
def test_all_ranks_have_all_rows_in_rank_order(ranks, rows):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        z1, z2, labels = numbers(*whole_batch(rows, dtype))
        for rank, answer in enumerate(ranks.values(gather_rows, rows, dtype)):
            assert (answer[0] == z1).all()
            assert (answer[1] == z2).all()
            assert (answer[2] == labels).all()
            assert answer[3] == sum(rows[:rank])


def gather_in_subgroup(rank, members):
    group = dist.new_group(members)
    rows = tuple(2 + r if r in members else 0 for r in range(WORLD))
    z1, z2, labels = own_batch(rank, rows)
    everyone = gather(z1, z2, labels, group=group)
    own = slice(everyone.start, everyone.start + len(z1))
    total(objective(everyone.z1, everyone.z2, own), group).backward()
    with pytest.raises(ValueError, match="d: 5 on rank 0; 3 on rank 2; all ranks"):
        gather(z1[:, rank:], z2[:, rank:], group=group)
    return rows, [*numbers(everyone.z1, everyone.labels, z1.grad), everyone.start]


def test_two_ranks_of_three_form_a_group_of_their_own(ranks):
    (rows, first), stranger, (_, last) = ranks(gather_in_subgroup, [0, 2])
    z1, _, labels = numbers(*whole_batch(rows))
    _, (gradient, _) = expected_gradients(rows, torch.float64)
    assert isinstance(stranger, ValueError)
    assert "rank 1 is not in it" in str(stranger)
    for answer in (first, last):
        assert (answer[0] == z1).all()
        assert (answer[1] == labels).all()
    assert (first[3], last[3]) == (0, rows[0])
    assert gradient[: rows[0]].numpy() == pytest.approx(first[2], abs=1e-12)
    assert gradient[rows[0] :].numpy() == pytest.approx(last[2], abs=1e-12)


# Gradients ----------------------------------------------------------------------------------------


def differentiate(rank, rows, dtype, twice):
    z1, z2, _ = own_batch(rank, rows, dtype)
    everyone = gather(z1, z2)
    share = objective(everyone.z1, everyone.z2, slice(everyone.start, everyone.start + len(z1)))
    value = total(share)
    if twice:
        first = torch.autograd.grad(value, [z1, z2], create_graph=True)
        sum((g**3).sum() for g in first).backward()
    else:
        value.backward()
    assert z1.grad.dtype == z2.grad.dtype == dtype
    return numbers(value, z1.grad, z2.grad)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("rows", ROWS)
def test_gradients_are_those_of_one_process(ranks, rows, twice):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        value, expected = expected_gradients(rows, dtype, twice)
        scale = max(g.abs().max().item() for g in expected)
        answers = ranks.values(differentiate, rows, dtype, twice)
        for rank, (found, *gradients) in enumerate(answers):
            own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
            assert found == pytest.approx(value, rel=tolerance)
            assert found == answers[0][0]  # the same bits on every rank
            for gradient, g in zip(gradients, expected, strict=True):
                assert gradient == pytest.approx(g[own].numpy(), abs=tolerance * scale)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_sixteen_bit_gradients_are_right_to_their_precision(ranks, dtype, bits):
    _, expected = expected_gradients((3, 1, 2), dtype)
    answers = ranks.values(differentiate, (3, 1, 2), dtype, False)
    for which, g in enumerate(expected, start=1):
        found = torch.cat([torch.from_numpy(a[which]) for a in answers])
        assert (found - g).abs().max() < WORLD * 2.0**-bits * g.abs().max()


def differentiate_like_nccl(rank, rows):
    kept, distributed._backends = distributed._backends, lambda group: {"cpu": "nccl"}
    try:
        return differentiate(rank, rows, torch.float64, True)
    finally:
        distributed._backends = kept


def test_the_way_of_nccl_has_the_same_gradients(ranks):
    rows = (3, 1, 2)  # gloo too can scatter sums; no GPU is needed to see that they are right
    for plain, scattered in zip(
        ranks.values(differentiate, rows, torch.float64, True),
        ranks.values(differentiate_like_nccl, rows),
        strict=True,
    ):
        for a, b in zip(plain, scattered, strict=True):
            assert a == pytest.approx(b, rel=1e-12)


def sum_small_parts(rank):
    z = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    everyone = gather(z, z)
    (everyone.z1.sum() * [1, 2**-8, 2**-8][rank]).backward()
    return z.grad.item()


def test_bfloat16_gradients_are_rounded_once(ranks):
    assert ranks.values(sum_small_parts) == [1 + 2**-7] * WORLD  # in bfloat16 1 + 2^-8 is 1


def train_one_rank(rank):
    z = torch.ones(2, D, dtype=torch.float64) * (rank + 1)
    z.requires_grad_(rank == 1)
    everyone = gather(z, z)
    (everyone.z1 * (rank + 1)).sum().backward()
    return None if z.grad is None else z.grad.tolist()


def test_ranks_whose_rows_are_constant_join_the_backward_pass(ranks):
    assert ranks.values(train_one_rank) == [None, [[6.0] * D] * 2, None]


def train_in_parallel(rank, rows):
    torch.manual_seed(0)
    encoder = nn.Linear(D, D).double()
    parallel = nn.parallel.DistributedDataParallel(encoder)
    z1, z2, _ = own_batch(rank, rows)
    everyone = gather(*parallel(torch.stack([z1, z2])))
    own = slice(everyone.start, everyone.start + len(z1))
    (WORLD * objective(everyone.z1, everyone.z2, own)).backward()
    return numbers(encoder.weight.grad)[0]


def test_times_the_number_of_ranks_for_distributed_data_parallel(ranks):
    rows = (3, 1, 2)
    torch.manual_seed(0)
    encoder = nn.Linear(D, D).double()
    z1, z2, _ = whole_batch(rows)
    objective(encoder(z1), encoder(z2), slice(None)).backward()
    for gradient in ranks.values(train_in_parallel, rows):
        assert gradient == pytest.approx(encoder.weight.grad.numpy(), abs=1e-12)


def add_up(rank):
    value = torch.tensor(0.1 * (rank + 1), requires_grad=True)
    summed = total(value)
    (3 * summed).backward()
    half = total(torch.tensor(1.5 + rank, dtype=torch.bfloat16))
    return summed.item(), value.grad.item(), half.item(), value.item()


def test_total_adds_values_and_keeps_the_local_gradient(ranks):
    answers = ranks.values(add_up)
    assert [a[1] for a in answers] == [3.0] * WORLD
    assert [a[2] for a in answers] == [7.5] * WORLD
    assert {a[0] for a in answers} == {answers[0][0]}
    assert answers[0][0] == pytest.approx(sum(a[3] for a in answers), rel=1e-7)


# Input that does not fit: an error on every rank, and the group stays usable ----------------------


# name: the ranks whose input is changed, how, and words of the error on all ranks
DISAGREE = {
    "d": ([1], lambda a, b, y: (a[:, 1:], b[:, 1:], y), "d: 5 on rank 0, 2; 4 on rank 1; all ra"),
    "dtype": (
        [0, 2],
        lambda a, b, y: (a.double(), b.double(), y),
        "dtype: torch.float64 on rank 0, 2; torch.float32 on rank 1",
    ),
    "labels": ([0], lambda a, b, y: (a, b, None), "labels: None on rank 0; given on rank 1, 2"),
    "rows": ([0, 1, 2], lambda a, b, y: (a[:0], b[:0], y[:0]), "none of the 3 ranks has a row"),
}
# name: how the input of rank 1 is changed, and its own error
REFUSED = {
    "text": (lambda a, b, y: ("a", b, y), TypeError, "z1: str; must be a tensor of float16"),
    "integers": (lambda a, b, y: (a, b.long(), y), TypeError, "z2: a tensor of torch.int64; must"),
    "shapes": (lambda a, b, y: (a[0], b, y), ValueError, "z1 (5,), z2 (2, 5): both must be (B, d)"),
    "mixed": (lambda a, b, y: (a.half(), b, y), ValueError, "z1 torch.float16 on cpu, z2 torch.fl"),
    "meta": (
        lambda a, b, y: (a.to("meta"), b.to("meta"), y),
        ValueError,
        "z1 is on meta; the process group is for cpu",
    ),
    "few labels": (
        lambda a, b, y: (a, b, y[:1]),
        ValueError,
        "labels (1,): must be (2,)",
    ),
    "float labels": (
        lambda a, b, y: (a, b, y / 2),
        TypeError,
        "labels: must be a tensor",
    ),
}


def gather_changed(rank, changed, how):
    batch = torch.ones(2, D), torch.ones(2, D), torch.ones(2).long()
    if rank in changed:
        batch = (DISAGREE[how][1] if how in DISAGREE else REFUSED[how][0])(*batch)
    gather(*batch)


@pytest.mark.parametrize("how", DISAGREE)
def test_ranks_that_disagree_hear_who_has_what(ranks, how):
    changed, _, words = DISAGREE[how]
    answers = ranks(gather_changed, changed, how)
    assert [type(a) for a in answers] == [ValueError] * WORLD
    assert words in str(answers[0])
    assert len({str(a) for a in answers}) == 1


@pytest.mark.parametrize("how", REFUSED)
def test_a_refusal_is_raised_where_it_arose_and_named_elsewhere(ranks, how):
    _, kind, words = REFUSED[how]
    first, odd, last = ranks(gather_changed, [1], how)
    assert type(odd) is kind
    assert words in str(odd)
    for other in (first, last):
        assert type(other) is ValueError
        assert "rank 1 refused its input" in str(other)


def gather_without_gradient(rank):
    with torch.set_grad_enabled(rank != 1):
        gather(torch.ones(2, D), torch.ones(2, D))


def test_gradients_are_enabled_on_all_ranks_or_on_none(ranks):
    for answer in ranks(gather_without_gradient):
        assert "gradients: enabled on rank 0, 2; disabled on rank 1" in str(answer)


def gather_checked(rank, refusing):
    def check():
        if rank in refusing:
            raise KeyError("my own")

    gather(torch.ones(2, D), torch.ones(2, D), check=check)


def test_the_callers_check_refuses_and_all_who_refuse_are_named(ranks):
    first, *others = ranks(gather_checked, [1, 2])
    assert "rank 1, 2 refused" in str(first)
    assert [type(o) for o in others] == [KeyError, KeyError]


def test_kinds_of_device_that_differ_are_named():
    z = torch.ones(2, D)
    cpu = distributed._header(z, z, None, None)
    gpu = cpu._replace(device=distributed.DEVICES.index("cuda"))
    with pytest.raises(ValueError, match="device: cpu on rank 4; cuda on rank 7; all ranks must"):
        distributed._agree([cpu, gpu], [4, 7])


@pytest.mark.parametrize(
    ("value", "words"),
    [(3, "(3)"), (torch.tensor(3), "(torch.int64, ())"), (torch.zeros(2), "(torch.float32, (2,))")],
)
def test_total_wants_a_scalar(value, words):
    with pytest.raises(ValueError, match="must be a floating point tensor of shape") as caught:
        total(value)
    assert words in str(caught.value)


# Ranks that do not come ---------------------------------------------------------------------------


def lose_a_rank(rank, when):
    z = torch.ones(2, D, requires_grad=True)
    if rank == 2 and when == "before":
        os._exit(1)
    began = time.monotonic()
    try:
        everyone = gather(z, z)
        if rank == 2:
            os._exit(1)
        everyone.z1.sum().backward()
    except RuntimeError as error:
        return str(error), error.__cause__ is not None, time.monotonic() - began


@pytest.mark.parametrize(("when", "step"), [("before", "sizes"), ("between", "gradients")])
def test_survivors_say_that_another_rank_died(mortal_ranks, when, step):
    *survivors, dead = mortal_ranks(lose_a_rank, when)
    assert dead is None
    for rank, (message, caused, seconds) in enumerate(survivors):
        assert message.startswith(f"rank {rank}: gathering the {step} of 3 ranks failed: another")
        assert "has died or stopped" in message
        assert caused
        assert seconds < 10


def wait_in_vain(rank):
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=1))
    if rank > 0:
        return None
    began = time.monotonic()
    try:
        gather(torch.ones(2, D), torch.ones(2, D), group=group)
    except RuntimeError as error:
        return str(error), time.monotonic() - began


def test_waiting_ends_with_the_timeout_of_the_group(ranks):
    message, seconds = ranks.values(wait_in_vain)[0]
    assert message.startswith("rank 0: gathering the sizes of 2 ranks failed: another rank has")
    assert "did not come here in time" in message
    assert seconds < 10


# One process --------------------------------------------------------------------------------------


def check_alone():
    z1, z2, labels = own_batch(0, (4,))
    called = []
    assert gather(z1, z2, labels, check=lambda: called.append(1)) == Gathered(z1, z2, labels, 0)
    assert called == [1]
    assert total(value := z1.sum()) is value
    with pytest.raises(KeyError, match="my own"):
        gather_checked(0, [0])
    with pytest.raises(ValueError, match=r"labels \(1,\)"):
        gather_changed(0, [0], "few labels")


def test_without_a_group_the_input_comes_back():
    check_alone()


def test_in_a_group_of_one_the_input_comes_back(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        check_alone()
    finally:
        dist.destroy_process_group()

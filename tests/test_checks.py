"""What is refused, and that the refusal names the argument, its value and what would do."""

import inspect
import math
import re

import numpy as np
import pytest
import torch

from hcl import losses
from hcl.losses import (
    METHODS,
    ContrastiveLoss,
    clamp_share,
    hard,
    hard_scl,
    negative_weights,
    nt_xent,
    weighted,
)

SUPERVISED = ("scl", "hard_scl", "supcon", "schane")
B, D = 4, 3
LABELS = torch.tensor([0, 0, 1, -1])


def views(dtype=torch.float32, **kwargs):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, D, generator=g).to(dtype, **kwargs) for _ in range(2)]


def call(name, z1=None, z2=None, labels=LABELS, **options):
    """The loss of that name, with views and labels that are right unless they are given."""
    first, second = views()
    more = (labels,) if name in SUPERVISED else ()
    more = (lambda s, i, j: s,) if name == "weighted" else more
    z1, z2 = first if z1 is None else z1, second if z2 is None else z2
    return getattr(losses, name)(z1, z2, *more, **options)


def refused(exception, words, name, *args, **kwargs):
    with pytest.raises(exception) as raised:
        call(name, *args, **kwargs)
    told = str(raised.value)
    for word in [words] if isinstance(words, str) else words:
        assert re.search(word, told), told
    assert "\n" not in told, told


LOSSES = [*METHODS, "weighted"]


def having(argument):
    """The losses that take an argument."""
    return [n for n in LOSSES if argument in inspect.signature(getattr(losses, n)).parameters]


# Embeddings ---------------------------------------------------------------------------------------

WRONG = [
    (lambda z: z.tolist(), TypeError, "floating point tensor, not list"),
    (lambda z: z.numpy(), TypeError, "floating point tensor, not ndarray"),
    (lambda z: 3.0, TypeError, "floating point tensor, not float"),
    (lambda z: z.long(), TypeError, r"floating point tensor, not a tensor of torch\.int64"),
    (lambda z: z.bool(), TypeError, r"not a tensor of torch\.bool"),
    (lambda z: z.to(torch.complex64), TypeError, r"not a tensor of torch\.complex64"),
    (lambda z: z[0], ValueError, r"\(3,\).*\(B, d\)"),
    (lambda z: z[None], ValueError, r"\(1, 4, 3\).*\(B, d\)"),
    (lambda z: z.sum(), ValueError, r"\(\).*\(B, d\)"),
    (lambda z: z[:, :0], ValueError, r"\(4, 0\).*d >= 1"),
    (lambda z: z.clone().fill_diagonal_(math.nan), ValueError, r"row\(s\) \[0, 1, 2\]"),
    (lambda z: z.index_fill(0, torch.tensor([3]), math.inf), ValueError, r"row\(s\) \[3\]"),
    (lambda z: z.index_fill(0, torch.tensor([1]), -math.inf), ValueError, "must be finite"),
]


@pytest.mark.parametrize("which", ["z1", "z2"])
@pytest.mark.parametrize(("spoil", "exception", "words"), WRONG)
def test_embeddings_of_a_wrong_kind(spoil, exception, words, which):
    given = dict(zip(("z1", "z2"), views(), strict=True))
    given[which] = spoil(given[which])
    for name in ("hard", "supcon", "weighted"):
        refused(exception, [f"^{which}", words], name, **given)


def test_five_rows_at_most_are_named():
    z = torch.full((9, D), math.nan)
    with pytest.raises(ValueError, match=r"row\(s\) \[0, 1, 2, 3, 4\]"):
        nt_xent(z, z)


@pytest.mark.parametrize("name", LOSSES)
def test_views_that_do_not_fit(name):
    z1, z2 = views()
    refused(ValueError, [r"z1 \(4, 3\)", r"z2 \(3, 3\)", "one shape"], name, z1, z2[:3])
    refused(ValueError, [r"z1 \(4, 2\)", r"z2 \(4, 3\)"], name, z1[:, :2], z2)
    refused(TypeError, [r"z2 is torch\.float64", r"z1 torch\.float32"], name, z1, z2.double())
    refused(ValueError, ["z2 is on meta", "z1 on cpu"], name, z1, z2.to("meta"))


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_too_small(name):
    z1, z2 = views()
    empty = {"labels": LABELS[:0]} if name in SUPERVISED else {}
    refused(ValueError, ["z1", "at least 2"], name, z1[:0], z2[:0], **empty)
    if name not in SUPERVISED:
        refused(ValueError, ["z1, z2: 1 row", "at least 2"], name, z1[:1], z2[:1])
        assert torch.isfinite(call(name, z1[:1], z2[:1], queue=z1))


@pytest.mark.parametrize("name", LOSSES)
def test_one_view_needs_labels(name):
    z1, _ = views()
    arguments = {"hard_scl": (LABELS,), "weighted": (lambda s, i, j: s,)}.get(name, ())
    arguments = (LABELS,) if name in SUPERVISED else arguments
    function = getattr(losses, name)
    if name in SUPERVISED:
        assert torch.isfinite(function(z1, None, *arguments))
        with pytest.raises(ValueError, match="labels=None: "):
            function(z1, None, None)
    with pytest.raises(ValueError, match="z2=None: "):
        function(z1, None, *arguments, cross_modal=True)
    if name not in SUPERVISED:
        with pytest.raises(ValueError, match=r"z2=None: .* labels"):
            function(z1, None, *arguments)


# Labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPERVISED)
@pytest.mark.parametrize(
    ("labels", "exception", "words"),
    [
        (LABELS[:3], ValueError, [r"labels \(3,\)", r"\(4,\)"]),
        (LABELS[:, None], ValueError, [r"labels \(4, 1\)", r"\(4,\)"]),
        (torch.cat([LABELS, LABELS]), ValueError, [r"labels \(8,\)", r"\(4,\)"]),
        (torch.tensor(1), ValueError, [r"labels \(\)", r"\(4,\)"]),
        (LABELS.float(), TypeError, ["labels", "integers", r"torch\.float32"]),
        (LABELS.to(torch.complex64), TypeError, ["labels", r"torch\.complex64"]),
        ([0, 0, 1, 1], TypeError, ["labels", "tensor of integers", "list"]),
        (np.array([0, 0, 1, 1]), TypeError, ["labels", "ndarray"]),
        (LABELS - 1, ValueError, ["labels: -2", "-1 for none"]),
        (LABELS.to("meta"), ValueError, ["labels are on meta", "z1 on cpu"]),
    ],
)
def test_labels_of_a_wrong_kind(name, labels, exception, words):
    refused(exception, words, name, labels=labels)
    with pytest.raises(exception, match=words[0]):
        ContrastiveLoss(name)(*views(), labels)


@pytest.mark.parametrize("name", SUPERVISED)
def test_labels_that_are_missing(name):
    """Not taken for an image of a class of its own each, which would be another loss."""
    with pytest.raises(ValueError, match=r"labels=None: .*\(B,\)"):
        ContrastiveLoss(name)(*views())
    with pytest.raises((ValueError, TypeError), match="labels"):
        getattr(losses, name)(*views(), None)


@pytest.mark.parametrize("name", SUPERVISED)
def test_unlabelled(name):
    for value in ("skip", None, True, -1):
        words = ["unlabelled=" + re.escape(repr(value)), "'negative', 'ignore'"]
        refused(ValueError, words, name, unlabelled=value)


# Numbers ------------------------------------------------------------------------------------------

NUMBERS = {
    "temperature": ([0.0, -1.0, math.nan, math.inf, 0], "positive"),
    "beta": ([-0.1, math.nan, -math.inf, -1], "0 or more"),
    "tau_plus": ([1.0, -0.01, 2, math.nan, math.inf], r"\[0, 1\)"),
    "Q": ([0.0, -2.0, math.nan, math.inf], "positive"),
    "sigma": ([0.0, -0.5, math.nan, math.inf], "positive"),
}
NOT_NUMBERS = ["0.5", [0.5], True, {}, 1j]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("argument", NUMBERS)
def test_numbers_out_of_range(name, argument):
    values, words = NUMBERS[argument]
    if name not in having(argument):
        pytest.skip(f"no {argument}")
    for value in values:
        told = [f"^{argument}={re.escape(repr(value))}", words]
        refused(ValueError, told, name, **{argument: value})
        if name in METHODS:
            with pytest.raises(ValueError, match=f"{argument}={re.escape(repr(value))}.*{words}"):
                ContrastiveLoss(name, **{argument: value})
    for value in NOT_NUMBERS:
        told = [f"^{argument}={re.escape(repr(value))}"]
        refused(TypeError, told, name, **{argument: value})
        if name in METHODS:
            with pytest.raises(TypeError, match=f"{argument}={re.escape(repr(value))}"):
                ContrastiveLoss(name, **{argument: value})
    if argument not in ("Q", "sigma"):
        refused(TypeError, [f"^{argument}=None"], name, **{argument: None})


def test_beta_that_is_infinite():
    refused(ValueError, ["^beta=inf", "finite"], "hard", beta=math.inf)


def test_numbers_of_numpy_are_numbers():
    """A sweep over np.linspace or a column of integers hands them out."""
    z = views()
    wanted = hard(*z, temperature=0.5, beta=1.0, tau_plus=0.0625, Q=3)
    for kind in (np.float64, np.float32):
        options = {"temperature": kind(0.5), "beta": kind(1), "tau_plus": kind(0.0625)}
        torch.testing.assert_close(hard(*z, **options, Q=kind(3)), wanted)
    torch.testing.assert_close(hard(*z, beta=np.int64(1), tau_plus=0.0625, Q=np.int32(3)), wanted)


@pytest.mark.parametrize("argument", ["beta", "tau_plus", "Q", "sigma"])
def test_a_tensor_is_a_number_for_the_temperature_alone(argument):
    """The others do not learn: a tensor's gradient would be lost in silence."""
    value = torch.tensor(0.5, requires_grad=True)
    name = "decoupled" if argument == "sigma" else "hard"
    refused((TypeError, ValueError), [f"^{argument}", "tensor"], name, **{argument: value})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([0.5, 0.5]), "one floating point number"),
        (torch.tensor([]), "one floating point number"),
        (torch.tensor(1), "one floating point number"),
        (torch.tensor(-0.5), "must be positive"),
        (torch.tensor([0.0]), "must be positive"),
        (torch.tensor(math.nan), "must be positive"),
    ],
)
def test_temperatures_that_are_tensors(value, words):
    for name in LOSSES:
        refused((TypeError, ValueError), ["^temperature", words], name, temperature=value)
    if value.is_floating_point():
        with pytest.raises((TypeError, ValueError), match=f"temperature.*{words}"):
            ContrastiveLoss("hard", temperature=torch.nn.Parameter(value))


def test_negatives_is_a_factor_where_there_are_labels_alone():
    assert torch.isfinite(call("hard_scl", Q="negatives"))
    for name in ("hard", "debiased", "weighted"):
        refused((TypeError, ValueError), ["Q='negatives'"], name, Q="negatives")
    with pytest.raises(ValueError, match="Q='negatives': hard has no labels"):
        ContrastiveLoss("hard", Q="negatives")
    for name in ("scl", "hard_scl"):
        refused((TypeError, ValueError), ["Q='others'", "negatives", "None"], name, Q="others")


# Words --------------------------------------------------------------------------------------------

WORDS = {
    "clamp": "'scaled', 'unscaled'",
    "debias": "'released', 'separate'",
    "engine": "'auto', 'tiled', 'triton'",
    "precision": "None, 'highest', 'high', 'medium'",
    "normalize": "True, False",
    "cross_modal": "True, False",
    "gather": "False, 'averaged', 'summed'",
}


@pytest.mark.parametrize("option", WORDS)
def test_words_that_are_not_known(option):
    known = WORDS[option]
    names = having(option) or LOSSES
    values = ["other", 3, 1, "None"] + ([] if option in ("precision",) else [None])
    for name in names:
        for value in values:
            told = [f"^{option}={re.escape(repr(value))}", known]
            refused(ValueError, told, name, **{option: value})
    with pytest.raises(ValueError, match=f"^{option}='other': choose one of {known}"):
        ContrastiveLoss("hard", **{option: "other"})


@pytest.mark.parametrize("name", having("detach_weights"))
def test_detach_weights_is_true_or_false(name):
    """The text "False" is true in Python: the released code's option could not be switched off."""
    for value in ("False", "no", None, 0):
        refused((TypeError, ValueError), [f"detach_weights={value!r}"], name, detach_weights=value)


@pytest.mark.parametrize("name", LOSSES)
def test_options_that_are_not_known(name):
    refused(TypeError, ["'margin'", "normalize, cross_modal, queue"], name, margin=1.0)
    if name in METHODS:
        with pytest.raises(TypeError, match="'margin'"):
            ContrastiveLoss(name)(*views(), LABELS, margin=1.0)


def test_the_engine_for_a_gpu_is_refused_elsewhere():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    refused(ValueError, ["engine='triton'", "on cpu", "CUDA"], "hard", engine="triton")


# More negatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("queue", "exception", "words"),
    [
        (torch.ones(0, D), ValueError, [r"\(0, 3\)", r"\(K, 3\), K >= 1"]),
        (torch.ones(5, D + 1), ValueError, [r"\(5, 4\)", r"\(K, 3\)"]),
        (torch.ones(D), ValueError, [r"\(3,\)", r"\((K|B), "]),
        (torch.ones(5, D, dtype=torch.float64), TypeError, [r"torch\.float64", r"torch\.float32"]),
        (torch.ones(5, D, device="meta"), ValueError, ["on meta", "on cpu"]),
        (torch.ones(5, D, dtype=torch.int64), TypeError, [r"torch\.int64"]),
        (torch.ones(5, D).fill_(math.nan), ValueError, ["NaN"]),
        ([[1.0] * D], TypeError, ["list"]),
    ],
)
def test_a_queue_that_does_not_fit(name, queue, exception, words):
    refused(exception, ["^queue", *words], name, queue=queue)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("synthetic", "exception", "words"),
    [
        (torch.ones(2 * B, 0, D), ValueError, [r"\(8, 0, 3\)", r"\(8, S, 3\), S >= 1"]),
        (torch.ones(B, 2, D), ValueError, [r"\(4, 2, 3\)", r"\(8, S, 3\)"]),
        (torch.ones(2 * B, 2, D + 1), ValueError, [r"\(8, 2, 4\)", r"\(8, S, 3\)"]),
        (torch.ones(2 * B, D), ValueError, [r"\(8, 3\)", r"\(2B, S, d\)"]),
        (torch.ones(2 * B, 2, D).half(), TypeError, [r"torch\.float16", r"torch\.float32"]),
        (torch.ones(2 * B, 2, D, device="meta"), ValueError, ["on meta", "on cpu"]),
        (torch.ones(2 * B, 2, D).fill_(math.inf), ValueError, ["infinity"]),
        ("mixtures", TypeError, ["str"]),
    ],
)
def test_synthetic_negatives_that_do_not_fit(name, synthetic, exception, words):
    refused(exception, ["^synthetic", *words], name, synthetic=synthetic)


def test_synthetic_negatives_of_one_view_are_one_each():
    z1, _ = views()
    with pytest.raises(ValueError, match=r"synthetic \(8, 2, 3\): must be \(4, S, 3\)"):
        hard_scl(z1, None, LABELS, synthetic=torch.ones(2 * B, 2, D))
    assert torch.isfinite(hard_scl(z1, None, LABELS, synthetic=torch.ones(B, 2, D)))


# Weights of one's own -----------------------------------------------------------------------------


def test_log_weights_of_a_wrong_shape():
    z = views()
    with pytest.raises(ValueError, match=r"log_weights returned \(8,\) for scores \(8, 8\)"):
        weighted(*z, lambda s, i, j: s.sum(dim=1))
    with pytest.raises(ValueError, match=r"log_weights returned \(1, 8\) for scores \(8, 8\)"):
        weighted(*z, lambda s, i, j: s[:1])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, i, j: 0.0,
        lambda s, i, j: None,
        lambda s, i, j: s.detach().numpy(),
        lambda s, i, j: torch.zeros(s.shape, dtype=torch.int64),
        3.0,
    ],
)
def test_log_weights_that_are_none(function):
    with pytest.raises(TypeError, match="log_weights"):
        weighted(*views(), function)


def test_an_error_in_log_weights_comes_through():
    with pytest.raises(ZeroDivisionError):
        weighted(*views(), lambda s, i, j: s * (1 // 0))


# The module, and what measures --------------------------------------------------------------------


def test_a_method_that_is_not_known():
    known = ", ".join(map(repr, METHODS))
    for value in ("triplet", None, "weighted", hard):
        with pytest.raises(ValueError, match=re.escape(f"method={value!r}: choose one of {known}")):
            ContrastiveLoss(value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": -0.5}, "sigma=-0.5"),
        ({"unlabelled": "skip"}, "unlabelled='skip'"),
        ({"engine": "cuda"}, "engine='cuda'"),
        ({"gather": True}, "gather=True"),
        ({"precision": "low"}, "precision='low'"),
        ({"normalize": "yes"}, "normalize='yes'"),
    ],
)
def test_the_module_is_refused_at_construction(options, words):
    """Before the data are loaded, and whether the method uses the option or not."""
    for method in METHODS:
        with pytest.raises(ValueError, match=words):
            ContrastiveLoss(method, **options)


@pytest.mark.parametrize("name", ["queue", "synthetic"])
def test_more_negatives_are_given_to_the_call_and_not_to_the_module(name):
    """They change from call to call, and a module would not take them along to another device."""
    with pytest.raises((TypeError, ValueError), match=name):
        ContrastiveLoss("hard", **{name: torch.ones(5, D)})


def test_values_that_are_annealed_out_of_range_are_refused_at_the_call():
    module = ContrastiveLoss("hard")
    module.beta = -1.0
    with pytest.raises(ValueError, match=r"beta=-1\.0"):
        module(*views())


@pytest.mark.parametrize("measure", [clamp_share, negative_weights])
def test_measures_refuse_what_the_losses_refuse(measure):
    z1, z2 = views()
    for argument, value in (("beta", -1.0), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=f"{argument}={value}"):
            measure(z1, z2, **{argument: value})
    with pytest.raises(ValueError, match="one shape"):
        measure(z1, z2[:3])
    with pytest.raises(TypeError, match="z1"):
        measure(z1.long(), z2)
    with pytest.raises(ValueError, match="at least 2"):
        measure(z1[:1], z2[:1])


def test_nothing_is_refused_that_is_right():
    """The borders of every range, and every word."""
    for name in METHODS:
        z1, z2 = views()
        labels = LABELS if name in SUPERVISED else None
        for options in (
            {"beta": 0}, {"tau_plus": 0}, {"tau_plus": 0.99}, {"temperature": 1}, {"Q": 1e-3},
            {"sigma": 1e-2}, {"clamp": "unscaled"}, {"debias": "separate"}, {"beta": 1e3},
            {"unlabelled": "ignore"}, {"engine": "tiled"}, {"precision": "medium"},
            {"normalize": False}, {"cross_modal": True}, {"gather": "summed"}, {"queue": None},
            {"detach_weights": True},
        ):  # fmt: skip
            call_options = {k: v for k, v in options.items() if k == "queue"}
            options = {k: v for k, v in options.items() if k != "queue"}
            module = ContrastiveLoss(name, **options)
            assert torch.isfinite(module(z1, z2, labels, **call_options))

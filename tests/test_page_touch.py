"""The page with things to touch: its formulas against autograd, what scenes and exercises say."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from cells import Page
from torch.nn import functional as F

PAGE = Page("hardness/touch")


@pytest.fixture(scope="module")
def found():
    return PAGE.define("check", "scene-figure", "scenes")


def points(seed, count=9, d=4):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, d, generator=draw, dtype=torch.float64), dim=1)


def rates(found, z, **options):
    """The derivatives of the loss of an anchor in the scores of its negatives, by differences."""
    t, beta = options["temperature"], options["beta"]
    s, p = z[2:] @ z[0] / t, z[1] @ z[0] / t
    fixed = (beta * s).softmax(0) if options["detach"] else None

    def loss(s):
        q = (beta * s).softmax(0) if fixed is None else fixed
        return torch.log1p(len(s) * (q * s.exp()).sum() / p.exp())

    step = 1e-5 * torch.eye(len(s), dtype=s.dtype)
    return torch.stack([(loss(s + e) - loss(s - e)) / 2e-5 for e in step])


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("detach", [False, True])
def test_the_written_derivative_and_force_are_those_of_the_loss(found, beta, detach):
    t = 0.5
    for seed in range(5):
        z = points(seed)
        s, p = z[2:] @ z[0] / t, z[1] @ z[0] / t
        q, pi = (beta * s).softmax(0), ((1 + beta) * s).softmax(0)
        g = (q * s.exp()).sum()
        gamma = len(s) * g / (p.exp() + len(s) * g)
        bracket = pi if detach else (1 + beta) * pi - beta * q
        slopes = rates(found, z, temperature=t, beta=beta, detach=detach)
        assert torch.allclose(gamma * bracket, slopes, atol=1e-8)
        if not detach:
            assert ((slopes < 0) == (s.exp() < beta / (1 + beta) * g)).all()
        # the force, from the page's function of whole vectors
        z.requires_grad_()
        options = {"temperature": t, "beta": beta, "tau_plus": 0.0, "detach_weights": detach}
        found["anchor_loss"](z[0], z[1], z[2:], **options).backward()
        with torch.no_grad():
            cosines = z[2:] @ z[0]
            written = -slopes[:, None] / t * (z[0] - cosines[:, None] * z[2:])
        assert torch.allclose(-z.grad[2:], written, atol=1e-7)


def test_the_first_scene_has_easy_negatives_that_are_pulled_closer(found):
    scene = found["SCENES"][0]
    z, q, force, _ = found["scene_forces"](scene)
    towards = ((z[0] - (z[2:] @ z[0])[:, None] * z[2:]) * force[2:]).sum(1) > 0
    assert towards[2:].all()  # six easy
    assert not towards[:2].any()
    assert q[:2].sum() > 0.5


def test_the_second_scene_does_what_its_text_says(found):
    scene = found["SCENES"][1]
    _, q, force, _ = found["scene_forces"](scene)
    assert scene["negatives"][0][2] == 1
    assert q[0] > 0.5
    sizes = [force[2].norm().item()]
    for tau in np.arange(0.05, 0.96, 0.05):
        _, weights, force, _ = found["scene_forces"](scene | {"tau_plus": tau})
        assert torch.equal(weights, q)
        sizes.append(force[2].norm().item())
    assert np.all(np.diff(sizes) > 0)


def test_the_third_scene_is_clamped_and_lets_go_as_its_text_says(found):
    scene = found["SCENES"][2]
    _, _, force, _ = found["scene_forces"](scene)
    assert not force[2:].any()
    _, _, force, _ = found["scene_forces"](scene | {"tau_plus": 0.01})
    assert force[2:].any()
    near = scene | {"negatives": [(10, 0, 0), *scene["negatives"][1:]]}
    assert found["scene_forces"](near)[2][2:].any()


def test_the_solutions_are_right():
    for t in (0.1, 0.5, 2.0):  # aligned positive, opposite negatives: always at the floor
        for tau in (1e-6, 0.1, 0.9):
            mean = (math.exp(-1 / t) - tau * math.exp(1 / t)) / (1 - tau)
            assert mean < math.exp(-1 / t)
    t, a = 0.5, 2.0
    s = a + math.log(math.sqrt(2) - 1)
    g = (math.exp(2 * a) + math.exp(2 * s)) / (math.exp(a) + math.exp(s))
    assert math.exp(s) == pytest.approx(g / 2)
    assert f"{s * t:.2f}" == "0.56"
    assert "0.56" in PAGE.prose
    assert 2 * math.sin(math.pi / 5) == pytest.approx(1.18, abs=0.005)


# --- the replay


def test_training_starts_alike_and_what_is_kept_gives_it_back():
    found = PAGE.run("train-one", "measures", "train", steps=50, seeds=[0])
    PAGE.run("replay-data", into=found)
    kept = found["kept_steps"]()
    assert kept[0] == 0
    assert kept[-1] == 50
    assert len(kept) == len(set(kept))
    runs = [run for group in found["replay"]["groups"] for run in group["runs"]]
    assert all(run["turns"][0][0] == runs[0]["turns"][0][0] for run in runs)
    z, values, _ = found["replayed"]["detached", 4.0]
    packed = found["packed"]("detached", 4.0)
    degrees = torch.tensor(packed["turns"]).cumsum(1).T
    angles = torch.atan2(z[kept][..., 1], z[kept][..., 0])
    away = torch.deg2rad(degrees.double()) - angles
    assert torch.rad2deg(torch.atan2(away.sin(), away.cos())).abs().max() < 0.51
    assert packed["loss"] == pytest.approx([values[k] for k in kept], abs=6e-4)


def test_the_replay_is_tens_of_kilobytes_at_most():
    found = PAGE.define("train-one", "measures", "train", "replay-data")
    step = torch.linspace(0, 40, found["steps"] + 1)  # all points turn all the time
    n = found["classes"] * found["per_class"]
    angle = step[:, None] + torch.arange(n)
    z = torch.stack([angle.cos(), angle.sin()], dim=-1)
    found["replayed"] = {("detached", 0.0): (z, step.tolist(), step)}
    size = len(json.dumps(found["packed"]("detached", 0.0), separators=(",", ":")))
    assert 2 * len(found["betas"]) * size < 60_000


def test_class_distance_and_mean_length_on_points_one_can_place():
    found = PAGE.define("measures")
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    corner = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [-1, 0], [-1, 0]])
    assert found["class_distance"](corner, y).item() == pytest.approx(math.sqrt(2))
    assert found["mean_length"](corner).item() == pytest.approx(1 / 3)
    both = found["class_distance"](torch.stack([corner, corner.roll(1, 0)]), y)
    assert both.shape == (2,)


def test_the_sentences_follow_the_table():
    found = PAGE.define("train", "end-table", "verdict")
    rows = [
        {"weights": w, "beta": b, "seed": s, "distance": 0.5, "length": 0.1 + k * b / 10}
        for k, w in ((1, "attached, as released"), (-0.1, "detached"))
        for b in found["betas"]
        for s in (0, 1)
    ]
    first, second, third = found["verdict"](pd.DataFrame(rows))
    assert "goes from 0.10 to 0.50; it rises in 2 of 2 seeds" in first
    assert "it rises in 0 of 2 seeds" in second
    assert "in 2 of 2 seeds, by 0.44 on average" in third
    table = found["end_table"](pd.DataFrame(rows))
    assert table["length of the mean"].iloc[0] == "0.10 ± 0.00"


def test_every_parameter_is_used():
    names = re.findall(r"^(\w+) =", PAGE.code["parameters"], re.MULTILINE)
    rest = "\n".join(code for name, code in PAGE.code.items() if name != "parameters")
    assert len(names) >= 9
    for name in names:
        assert re.search(rf"\b{name}\b", rest), name

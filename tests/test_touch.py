"""Things to touch, in a browser: the numbers in JavaScript against hcl, and what it is to use."""

import json
import math
import os
import shutil
import statistics

import pytest
import torch
from cells import Page
from torch.nn import functional as F

from hcl import debiasing, losses, project_root
from hcl.negatives import Batch

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import sync_playwright

CHROMIUM = shutil.which("chromium")
STATIC = project_root() / "book" / "static"
BUILT = project_root() / "_build" / "html" / "hardness" / "touch.html"
PAGE = Page("hardness/touch")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The cells that hold the two things, with a short training, as a page of their own."""
    root = tmp_path_factory.mktemp("site")
    (root / "_static").symlink_to(STATIC)
    found = PAGE.run("scenes")
    scenes = found["HTML"](_last(PAGE.code["scenes"], found)).data
    found = PAGE.run("train-one", "measures", "train", into=found | {"steps": 30, "seeds": [0]})
    PAGE.run("replay-data", into=found)
    replay = found["HTML"](_last(PAGE.code["replay-data"], found)).data
    cells = {cell.id: cell.source.split("</script>\n\n")[0] for cell in PAGE.cells}
    body = [scenes, cells["touch"] + "</script>", replay, cells["replay"] + "</script>"]
    head = "<meta charset='utf-8'><link rel='stylesheet' href='../_static/custom.css'>"
    (root / "hardness").mkdir()
    path = root / "hardness" / "touch.html"
    path.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(body)}")
    return path


def _last(source, variables):
    """The argument of the HTML() on a cell's last line."""
    last = source.strip().splitlines()[-1]
    assert last.startswith("HTML(")
    return eval(last.removeprefix("HTML(").removesuffix(")"), variables)


@pytest.fixture
def page(browser, site):
    """The page, opened from disk; fails on an error, a warning or a request that finds nothing."""
    complaints = []
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    watch(page, complaints)
    page.goto(site.as_uri())
    yield page
    page.close()
    assert complaints == []


def watch(page, complaints):
    page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))


# --- the numbers


def configurations():
    """Batches of pairs and options: random, clustered, coinciding, opposite; mild and extreme."""
    draw = torch.Generator().manual_seed(0)

    def of(values):
        return values[int(torch.randint(len(values), (), generator=draw))]

    for k in range(240):
        n, d = int(torch.randint(2, 6, (), generator=draw)), of([2, 3, 8])
        z = torch.randn(2, n, d, generator=draw, dtype=torch.float64)
        options = {
            "temperature": of([0.02, 0.07, 0.2, 0.5, 1.0, 3.0]),
            "beta": of([0.0, 0.5, 1.0, 4.0, 30.0, 100.0]),
            "tau_plus": of([0.0, 0.02, 0.1, 0.5, 0.95]),
            "detach_weights": of([False, True]),
            "debias": of(["released", "separate"]),
        }
        shape = ("random", "clustered", "aligned", "coinciding", "opposite")[k % 5]
        if shape == "clustered":
            z = z * 0.05 + 1
        elif shape == "aligned":
            z[1] = z[0] + 0.01 * z[1]
        elif shape == "coinciding":  # rounding decides between them where the weights saturate
            z[1, 0] = z[1, 1]
            options["beta"] = min(options["beta"], 4.0)
        elif shape == "opposite":
            z[:, 1:] = -z[:, :1] + 1e-3 * z[:, 1:]
        yield z, options


IN_JAVASCRIPT = """configurations => configurations.map(({z, options}) => {
    const n = z.length / 2;
    const anchors = z.map((own, i) => {
        const others = z.map((_, j) => j).filter((j) => (i - j) % n !== 0);
        const at = (i + n) % (2 * n);
        const {forces} = window.hclWeights;
        const found = forces(own, z[at], others.map((j) => z[j]), options);
        return {...found, order: [i, at, ...others]};
    });
    return anchors;
})"""


@pytest.fixture(scope="module")
def computed(browser):
    """The configurations, and for each what weights.js says of every anchor."""
    page = browser.new_page()
    page.add_script_tag(path=STATIC / "weights.js")
    cases = list(configurations())
    names = {"tau_plus": "tauPlus", "detach_weights": "detach"}
    sent = [
        {
            "z": torch.cat([*z]).tolist(),
            "options": {names.get(k, k): value for k, value in options.items()},
        }
        for z, options in cases
    ]
    found = page.evaluate(IN_JAVASCRIPT, sent)
    page.close()
    return list(zip(cases, found, strict=True))


def close(ours, theirs, scale=None):
    """Within 1e-9 of the largest of them; nothing is known below the smallest normal double."""
    scale = theirs.abs().max() if scale is None else scale
    return bool(((ours - theirs).abs() <= 1e-9 * scale + 1e-300).all())


def test_the_losses_of_the_anchors_average_to_that_of_hcl(computed):
    assert len(computed) >= 200
    for (z, options), anchors in computed:
        ours = torch.tensor([a["loss"] for a in anchors], dtype=torch.float64).mean()
        assert close(ours, losses.hard(*z, **options)), options


def test_the_weights_are_those_of_hcl(computed):
    for (z, options), anchors in computed:
        q = losses.negative_weights(*z, temperature=options["temperature"], beta=options["beta"])
        for row, a in zip(q, anchors, strict=True):
            assert close(torch.tensor(a["q"], dtype=torch.float64), row[a["order"][2:]]), options
            assert math.isclose(sum(a["q"]), 1, rel_tol=1e-12)


def test_ng_and_the_clamp_are_those_of_hcl(computed):
    clamped = 0
    for (z, options), anchors in computed:
        batch = Batch(*z, options["temperature"])
        given = {"clamp": "scaled", "Q": None, **options}
        given.pop("temperature")
        log_ng, bound = debiasing.log_negatives(batch, **given)
        (side,) = batch.sides
        for row, value, held in zip(batch.rows(side), log_ng, bound, strict=True):
            ours = anchors[int(row)]
            assert ours["clamped"] == bool(held), options
            assert math.isclose(math.exp(ours["logNg"] - value), 1, rel_tol=1e-9), options
            clamped += bool(held)
    assert clamped > 100


def test_the_forces_add_up_to_minus_the_gradient_of_hcl(computed):
    for (z, options), anchors in computed:
        z = z.clone().requires_grad_()
        losses.hard(*z, **options).backward()
        theirs = -z.grad.flatten(0, 1)
        ours, sizes = torch.zeros_like(theirs), torch.zeros(())
        for a in anchors:
            forces = torch.tensor(
                [a["onAnchor"], a["onPositive"], *a["onNegatives"]], dtype=torch.float64
            )
            ours[a["order"]] += forces / len(anchors)
            sizes = torch.maximum(sizes, forces.abs().max() / len(anchors))
        # where anchors' forces cancel, digits are lost on both sides
        assert close(ours, theirs, scale=sizes), options


@pytest.mark.parametrize("debias", ["none", "released", "separate"])
@pytest.mark.parametrize("detach", [False, True])
def test_saturated_weights_and_vectors_without_length_have_defined_numbers(browser, debias, detach):
    page = browser.new_page()
    page.add_script_tag(path=STATIC / "weights.js")
    points = [[1, 0], [0.8, 0.6], [[0.6, 0.8], [0.6, 0.8], [-1, 0], [0, 0], [0.6, -0.8]]]
    for beta in (1e4, 1e10, 1e308):
        for tau in (0, 0.1, 0.999):
            given = {"temperature": 0.01, "beta": beta, "tauPlus": tau, "debias": debias}
            found = page.evaluate(
                "([z, p, n, o]) => JSON.stringify(window.hclWeights.forces(z, p, n, o))",
                [*points, {**given, "detach": detach}],
            )
            assert "null" not in found, given  # which is how JSON spells NaN and Infinity
            found = json.loads(found)
            # three coincide in cosine and share the weight
            assert found["q"] == pytest.approx([1 / 3, 1 / 3, 0, 0, 1 / 3])
            assert found["onNegatives"][3] == [0, 0]
            if debias == "none" or tau == 0:
                share = 1 / (1 + math.exp(80 - 60 - math.log(5)))  # Ng / (e^p + Ng)
                assert sum(found["ds"]) == pytest.approx(share, rel=1e-6)
    zero = page.evaluate("o => hclWeights.forces([0, 0], [0, 0], [[0, 0]], o)", {"temperature": 1})
    assert zero["loss"] == pytest.approx(math.log(2))
    assert zero["onAnchor"] == zero["onPositive"] == [0, 0]
    none = page.evaluate("o => hclWeights.forces([1, 0], [1, 0], [], o)", {"temperature": 1})
    assert none["loss"] == 0
    assert none["onAnchor"] == [0, 0]
    page.close()


def test_the_page_shows_the_loss_of_its_own_formula(page):
    found = PAGE.define("check", "scene-figure", "scenes")
    for k, scene in enumerate(found["SCENES"]):
        _, q, force, loss = found["scene_forces"](scene)
        page.locator("#hcl-touch select").first.select_option(str(k))
        shown = page.evaluate("hclTouch.found")
        assert shown["loss"] == pytest.approx(loss, rel=1e-9)
        assert shown["q"] == pytest.approx(q.tolist(), rel=1e-9)
        ours = [shown["onAnchor"], shown["onPositive"], *shown["onNegatives"]]
        assert close(torch.tensor(ours, dtype=torch.float64)[:, :2], force)
        assert shown["clamped"] == (scene["name"] == "clamp active")


# --- to use it


def read(page):
    page.wait_for_timeout(350)  # it speaks four times a second at most
    return page.locator("#hcl-touch [role=status]").inner_text()


def test_arrow_keys_move_a_point_and_the_read_out_says_so(page):
    before = read(page)
    assert before.startswith("Loss ")
    point = page.locator("#hcl-touch .hcl-point").nth(2)
    at = int(point.get_attribute("aria-valuenow"))
    point.focus()
    page.keyboard.press("ArrowRight")
    assert int(point.get_attribute("aria-valuenow")) == at + 5
    page.keyboard.press("Shift+ArrowLeft")
    assert int(point.get_attribute("aria-valuenow")) == at + 4
    assert "weight" in point.get_attribute("aria-valuetext")
    assert read(page) != before


@pytest.mark.parametrize("slider", [0, 1, 2])
def test_arrow_keys_move_a_slider_and_the_read_out_says_so(page, slider):
    before = read(page)
    control = page.locator("#hcl-touch input[type=range]").nth(slider)
    shown = page.locator("#hcl-touch output").nth(slider)
    value = shown.inner_text()
    control.focus()
    page.keyboard.press("ArrowRight")
    assert shown.inner_text() != value
    assert control.get_attribute("aria-valuetext") == shown.inner_text()
    assert read(page) != before


def test_every_control_has_a_name(page):
    for name in ("hardness β", "temperature t", "class prior τ⁺"):
        assert page.get_by_role("slider", name=name).count() == 1
    for name in ("scene", "points on", "debiasing", "weights"):
        assert page.get_by_role("combobox", name=name).count() == 1
    assert page.get_by_role("slider", name="negative").count() == 8
    assert page.get_by_role("slider", name="step").count() == 1
    assert page.get_by_role("checkbox", name="gradient through the weights").is_checked()


@pytest.mark.parametrize("space", ["0", "1"])
def test_a_point_follows_the_pointer_and_the_centre_keeps_its_direction(page, space):
    page.locator("#hcl-touch select").nth(1).select_option(space)
    page.locator("#hcl-touch .hcl-stage").scroll_into_view_if_needed()
    box = page.locator("#hcl-touch .hcl-stage").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    point = page.locator("#hcl-touch .hcl-point").nth(2).locator("circle").last
    at = point.bounding_box()
    page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    page.mouse.down()
    page.mouse.move(middle[0] + 100, middle[1])
    right = page.evaluate("hclTouch.state.points[2].v")
    assert right[0] > 0.5
    page.mouse.move(*middle)
    centre = page.evaluate("hclTouch.state.points[2].v")
    page.mouse.up()
    assert math.hypot(*centre) == pytest.approx(1)
    if space == "0":
        assert centre == pytest.approx(right)
    assert "NaN" not in page.content()


def test_the_ends_of_all_sliders_show_numbers(page):
    sliders = page.locator("#hcl-touch label.hcl-slider:not([hidden]) input[type=range]")
    page.locator("#hcl-touch summary").click()
    for scene, debias, space in ((0, "0", "0"), (1, "1", "0"), (2, "1", "1"), (1, "2", "1")):
        page.locator("#hcl-touch select").nth(0).select_option(str(scene))
        page.locator("#hcl-touch select").nth(1).select_option(space)
        page.locator("#hcl-touch select").nth(2).select_option(debias)
        for ends in range(8):
            for k in range(3):
                sliders.nth(k).press("End" if ends >> k & 1 else "Home")
            if ends == 7:  # a step along saturated forces
                page.get_by_role("button", name="one step along the arrows").click()
            html = page.locator("#hcl-touch").inner_html()
            if ends in (0, 7):
                html += read(page)
            for word in ("NaN", "Infinity", "undefined", "out of range"):
                assert word not in html, (scene, debias, ends)


def test_the_scene_of_coinciding_points_shows_numbers(page):
    page.evaluate("hclTouch.state.points.forEach((p) => { p.v = [0, 1, 0]; }); hclTouch.draw()")
    assert "No force" in read(page)
    assert "NaN" not in page.locator("#hcl-touch").inner_html()


def test_steps_along_the_arrows_lower_the_loss(page):
    before = page.evaluate("hclTouch.found.loss")
    for _ in range(10):
        page.get_by_role("button", name="one step along the arrows").click()
    assert page.evaluate("hclTouch.found.loss") < before
    page.get_by_role("button", name="back to the scene").click()
    assert page.evaluate("hclTouch.found.loss") == pytest.approx(before, rel=1e-12)


def test_the_replay_steps_plays_and_stops(page):
    scrub = page.locator("#hcl-replay input[type=range]")
    scrub.press("ArrowRight")
    assert page.evaluate("hclReplay.state.frame") == 1
    assert scrub.get_attribute("aria-valuetext") == "step 2 of 30"
    scrub.press("End")
    page.wait_for_timeout(350)
    assert page.locator("#hcl-replay [role=status]").inner_text().startswith("Step 30. β = 0: loss")
    page.get_by_role("button", name="play").click()
    page.wait_for_timeout(300)
    assert 0 < page.evaluate("hclReplay.state.frame") < 5
    page.get_by_role("button", name="pause").click()
    frame = page.evaluate("hclReplay.state.frame")
    assert frame == int(frame)
    page.wait_for_timeout(100)
    assert page.evaluate("hclReplay.state.frame") == frame


def test_who_prefers_no_motion_sees_whole_steps(browser, site):
    page = browser.new_page(reduced_motion="reduce")
    page.goto(site.as_uri())
    assert not page.evaluate("hclReplay.state.playing")
    page.get_by_role("button", name="play").click()
    seen = set()
    for _ in range(10):
        page.wait_for_timeout(60)
        seen.add(page.evaluate("hclReplay.state.frame"))
    assert all(frame == int(frame) for frame in seen)
    page.close()


def test_the_replayed_angles_are_those_of_the_training(page):
    found = PAGE.run("train-one", "measures", "train", steps=30, seeds=[0])
    z = found["replayed"]["detached", 4.0][0]
    page.locator("#hcl-replay select").select_option(label="detached")
    page.locator("#hcl-replay input").press("End")
    moves = page.locator("#hcl-replay svg").nth(2).locator("path").evaluate_all(
        "paths => paths.map((p) => p.getAttribute('transform').match(/-?[\\d.]+/g).map(Number))"
    )  # fmt: skip
    shown = F.normalize(torch.tensor(moves) * torch.tensor([1, -1]), dim=1)
    assert torch.allclose(shown, z[-1], atol=0.02)


def test_without_javascript_the_page_says_where_the_figure_is(browser, site):
    page = browser.new_page(java_script_enabled=False)
    page.goto(site.as_uri())
    assert "The figure" in page.locator("#hcl-touch").inner_text()
    assert "The figure" in page.locator("#hcl-replay").inner_text().replace("\n", " ")
    page.close()


# --- what it costs


def test_a_frame_is_drawn_in_time(page):
    for name, change in (
        ("hclReplay", "hclReplay.state.frame = k / 10"),
        ("hclTouch", "hclTouch.state.points[2].v = [Math.sin(k / 50), Math.cos(k / 50), 0]"),
    ):
        costs = page.evaluate(
            f"""() => Array.from({{length: 100}}, (_, k) => {{
                {change};
                {name}.draw();
                return {name}.cost;
            }})"""
        )
        assert statistics.median(costs) <= 16.7


def load_time(browser, path):
    """Milliseconds from the start of a load to its end, the best of three; and what went wrong."""
    times, complaints = [], []
    for _ in range(3):
        page = browser.new_page()
        watch(page, complaints)
        page.goto(path.as_uri())
        page.wait_for_function("window.hclTouch && window.hclReplay")
        entry = "performance.getEntriesByType('navigation')[0]"
        times.append(page.evaluate(f"{entry}.domContentLoadedEventEnd"))
        page.close()
    return min(times), complaints


def a_second():
    """In milliseconds, of this machine: more where others keep it busy."""
    return 1000 * max(1, os.getloadavg()[0] / os.cpu_count())


def test_it_loads_from_disk_in_a_second(browser, site):
    took, complaints = load_time(browser, site)
    assert complaints == []
    assert took < a_second()


@pytest.mark.skipif(not BUILT.exists(), reason="the site is not built, or without this page")
def test_the_page_of_the_site_loads_from_disk_without_a_complaint(browser):
    took, complaints = load_time(browser, BUILT)
    assert complaints == []
    assert took < a_second()


def test_the_scripts_weigh_little():
    for name, most in (("weights.js", 7), ("touch.js", 20), ("replay.js", 12), ("scroll.js", 2)):
        text = (STATIC / name).read_text()
        assert len(text.encode()) < most * 1000, name
        assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), name

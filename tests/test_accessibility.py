"""Every page of the built site under axe, in light and dark, and on a phone."""

import shutil
from pathlib import Path

import pytest

from hcl import project_root

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python")

SITE = project_root() / "_build" / "html"
CHROMIUM = shutil.which("chromium")
# index.html only sends on to the first page
FOUND = [p for p in sorted(SITE.rglob("*.html")) if "_static" not in p.parts]
PAGES = [p.relative_to(SITE).as_posix() for p in FOUND if p != SITE / "index.html"]
AXE = Path(axe.__file__).with_name("axe.min.js")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine"),
    pytest.mark.skipif(not PAGES, reason="the site is not built"),
]

# What the theme and the bibliography do, and no file of ours can mend: rule, how it begins, why.
ALLOWED = (
    ("region", '<div class="sidebar-primary-item">', "the theme's logo is outside of a landmark"),
    ("aria-required-children", '<div role="list" class="citation-list">', "docutils' list"),
    ("aria-allowed-role", '<div class="citation"', "docutils' entries have the role of an entry"),
    ("aria-deprecated-role", '<div class="citation"', "which newer ARIA has dropped"),
)
RUN = """async (only) => {
    const how = {resultTypes: ["violations"], elementRef: false};
    if (only) how.runOnly = {type: "rule", values: only};
    const {violations} = await axe.run(document, how);
    return violations.flatMap((v) => v.nodes.map((n) => [v.id, n.html, n.failureSummary]));
}"""
# Axe takes its time for every element. Of code and of long tables it gets one of each kind; of
# mathematics what is read out, the start of the MathML, which it does not look into.
SHORTEN = """() => {
    for (const formula of document.querySelectorAll("mjx-container")) {
        const read = formula.querySelector("mjx-assistive-mml").textContent;
        formula.replaceWith(read.slice(0, 20)); // a longer one would need to scroll
    }
    const seen = new Set();
    for (const token of document.querySelectorAll("pre span[class]")) {
        const kind = token.className + token.closest("pre").parentElement.className;
        if (seen.has(kind)) token.replaceWith(token.textContent);
        seen.add(kind);
    }
    for (const row of document.querySelectorAll("main tbody tr:nth-child(n + 5)")) row.remove();
}"""
# what scrolls sideways and takes no part in the order of the Tab key
UNREACHED = """() => [...document.querySelectorAll("main *")].filter((e) =>
    e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 &&
    ["auto", "scroll"].includes(getComputedStyle(e).overflowX) &&
    e.tabIndex < 0 && !e.querySelector("a[href], button, input, [tabindex='0']")
).map((e) => e.outerHTML.slice(0, 120))"""
TOO_WIDE = """() => {
    const clips = (e) => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
    const clipped = (e) => e.matches("main") ? false : clips(e) || clipped(e.parentElement);
    if (document.documentElement.scrollWidth <= innerWidth) return [];
    const wide = [...document.querySelectorAll("main *")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
        .filter((e) => !clipped(e.parentElement));
    return wide.map((e) => e.outerHTML.slice(0, 120));
}"""


@pytest.fixture(scope="module")
def tab():
    """One tab of one browser for all pages that this worker tests."""
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page()
        tab.add_init_script(path=AXE)
        yield tab
        browser.close()


def findings(tab, only=None):
    return [
        f"{rule}: {html[:200]}: {why}"
        for rule, html, why in tab.evaluate(RUN, only)
        if not any(rule == known and html.startswith(start) for known, start, _ in ALLOWED)
    ]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_by_everybody(tab, name):
    tab.emulate_media(color_scheme="light")
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto((SITE / name).as_uri())
    tab.evaluate("async () => { if (window.MathJax) await MathJax.startup.promise; }")
    tab.wait_for_timeout(50)
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    found = [f"phone, wider than the page: {line}" for line in tab.evaluate(TOO_WIDE)]
    found += [f"phone, not in the order of Tab: {line}" for line in tab.evaluate(UNREACHED)]
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.evaluate(SHORTEN)
    found += findings(tab)
    tab.evaluate("document.documentElement.dataset.theme = 'dark'")
    found += [f"dark: {line}" for line in findings(tab, ["color-contrast"])]
    assert found == []


def test_mathematics_can_be_listened_to(tab):
    tab.goto((SITE / "hardness" / "objective.html").as_uri())
    tab.evaluate("async () => await MathJax.startup.promise")
    shown, spoken = (
        tab.locator(f"mjx-container {what}").count() for what in ("> svg", "mjx-assistive-mml")
    )
    assert shown == spoken > 50


def test_a_finding_is_found(tab, tmp_path):
    page = tmp_path / "a.html"
    page.write_text(
        "<html><body><main><a href='#x' style='color: #eee'>read this</a><img></main></body>"
    )
    tab.goto(page.as_uri())
    rules = {line.split(":")[0] for line in findings(tab)}
    assert {"color-contrast", "image-alt", "html-has-lang"} <= rules

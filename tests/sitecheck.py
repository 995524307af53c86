"""Walk a rendered site: does everything resolve, locally, and does every figure speak?"""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {("link", "href"), ("iframe", "src"), ("source", "src"), ("object", "data"),
         ("img", "src"), ("script", "src"), ("video", "src"), ("audio", "src")}  # fmt: skip
INERT = {"canonical", "next", "prev", "search", "index", "license"}  # links that load nothing


class Page(HTMLParser):
    """Anchors a page offers, what it links to and loads, its pictures without alt text."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.mute: list[str] = []
        self.scripts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attributes}
        self.ids |= {found[k] for k in ("id", "name") if k in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        for kind, key in LOADS:
            if tag == kind and key in found and found.get("rel") not in INERT:
                self.loads.append(found[key])
        if tag == "img" and not found.get("alt", "").strip():
            self.mute.append(found.get("src", "?"))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.scripts and self.lasttag == "script":
            self.scripts[-1] += data


def problems(site: Path) -> list[str]:
    """One line for each link, anchor or picture that fails, and each address of another host."""
    pages = {p.resolve(): Page(p) for p in sorted(site.rglob("*.html")) if "_static" not in p.parts}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        found += [f"{where}: no alt text: {src}" for src in page.mute]
        found += [f"{where}: loads {x}" for x in page.loads if urlsplit(x).netloc]
        found += [f"{where}: script names {host}" for host in _hosts(page)]
        for href in page.links + page.loads:
            if complaint := _broken(href, page, pages):
                found.append(f"{where}: {complaint}: {href}")
    return found


def _hosts(page: Page) -> list[str]:
    calls = ("unpkg.com", "jsdelivr", "cdnjs", "googleapis", "mybinder.org", "esm.sh")
    return [host for host in calls if any(host in text for text in page.scripts)]


def _broken(href: str, page: Page, pages: dict[Path, Page]) -> str:
    parts = urlsplit(href)
    if parts.scheme or parts.netloc:
        return ""
    target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
    target = target.resolve()
    if not target.is_file():
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].ids:
        return "no such anchor"
    return ""

"""A Sphinx extension: no page names another host, and no table has an empty heading.

jupyter-book always loads sphinx-thebe, which puts the address of a CDN and of a launch service on
each page, whether a page can be launched or not; it is silenced before it reads a page. The corner
of a data frame is a heading of nothing, which a screen reader announces; it becomes a plain cell.
"""

import re
from typing import Any

EMPTY_HEADING = re.compile(r"<th\b([^>]*)>((?:\s|&nbsp;|<p>\s*</p>)*)</th>")


def silence_thebe(app: Any, config: Any) -> None:
    """Disconnect every listener that sphinx-thebe has connected, and drop its style sheet."""
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__.startswith("sphinx_thebe"):
                app.disconnect(listener.id)
    app.registry.css_files[:] = [f for f in app.registry.css_files if "thebe" not in f[0]]


def without_empty_headings(html: str) -> str:
    """The same page with empty table headings as plain cells.

    >>> without_empty_headings("<tr><th class='blank'>&nbsp;</th><th>β</th></tr>")
    "<tr><td class='blank'>&nbsp;</td><th>β</th></tr>"
    """
    return EMPTY_HEADING.sub(r"<td\1>\2</td>", html)


def mend_tables(app: Any, pagename: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Mend the body of a page before it is put into its template."""
    if "body" in context:
        context["body"] = without_empty_headings(context["body"])


def setup(app: Any) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("config-inited", silence_thebe)
    app.connect("html-page-context", mend_tables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

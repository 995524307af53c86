"""A Sphinx extension: no page names another host.

jupyter-book always loads sphinx-thebe, which puts the address of a CDN and of a launch service on
each page, whether a page can be launched or not; it is silenced before it reads a page.
"""

from typing import Any


def silence_thebe(app: Any, config: Any) -> None:
    """Disconnect every listener that sphinx-thebe has connected, and drop its style sheet."""
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if listener.handler.__module__.startswith("sphinx_thebe"):
                app.disconnect(listener.id)
    app.registry.css_files[:] = [f for f in app.registry.css_files if "thebe" not in f[0]]


def setup(app: Any) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.connect("config-inited", silence_thebe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""A book of one text page and two notebooks, built through the same functions as the real one."""

import shutil
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from hcl import project_root

INTRO = """# Tiny book

Read [](one.ipynb), then [the second](sub/two.ipynb), with {cite:t}`robinson2021hcl`.

$$ \\E[s] = \\frac{1}{n}\\sum_i s_i $$ (mean)

Equation {eq}`mean` and {numref}`fig-line`, and a table wider than a phone:

| anchor | positive | negative | temperature | hardness | class prior | probe | spread |
|---|---|---|---|---|---|---|---|
| 0.123456 | 0.123456 | 0.123456 | 0.123456 | 0.123456 | 0.123456 | 0.123456 | 0.123456 |

```{exercise} Order
:label: order
Which is larger?
```

```{solution} order
:class: dropdown
The *second*.
```

```{prf:theorem} A bound
Softplus is at least its argument: $\\mathrm{softplus}(x) \\ge x$.
```

```{bibliography}
```
"""

FIGURE = """import matplotlib.pyplot as plt
%config InlineBackend.figure_formats = ["svg"]
fig, ax = plt.subplots(facecolor="none")
ax.set_facecolor("none")
ax.plot([1, 2, 3], color="#3b7dd8")
plt.show()"""

ONE = """beta = 1.0  # hardness
epochs = 3
name = "digits"
flags = [0.0, 0.5]
verbose = False"""


def code(source: str, tags: tuple[str, ...] = (), **metadata: object) -> nbformat.NotebookNode:
    return new_code_cell(source, metadata={"tags": list(tags), **metadata} if tags else metadata)


def notebook(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=list(cells), metadata={"kernelspec": spec})


def save(path: Path, *cells: nbformat.NotebookNode) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook(*cells), path)
    return path


def write(root: Path, *, figure: str = FIGURE) -> Path:
    """The tiny book in ``root``, with the real configuration, style sheets and bibliography."""
    real = project_root()
    shutil.copy(real / "_config.yml", root)
    shutil.copytree(real / "book" / "static", root / "book" / "static")
    shutil.copy(real / "book" / "references.bib", root / "book")
    chapters = "chapters:\n- file: one\n- file: sub/two\n"
    (root / "_toc.yml").write_text(f"format: jb-book\nroot: intro\n{chapters}")
    (root / "book" / "intro.md").write_text(INTRO)
    save(
        root / "book" / "one.ipynb",
        new_markdown_cell("# One"),
        code(ONE, ("parameters",)),
        code("print('beta is', beta)"),
        code("from pathlib import Path\nprint(Path('_toc.yml').exists(), Path.cwd().name)"),
    )
    settings = {"figure": {"name": "fig-line", "caption": "A line."}, "image": {"alt": "A line"}}
    save(
        root / "book" / "sub" / "two.ipynb",
        new_markdown_cell("# Two"),
        code("seed = 0", ("parameters",)),
        code(figure, mystnb=settings),
        code("import pandas as pd\npd.DataFrame({f'column {i}': [i / 7] for i in range(12)})"),
    )
    return root

"""Cells of the book's notebooks, run one by one: what the tests of pages have in common."""

import ast

import matplotlib.pyplot as plt
import nbformat

from hcl import project_root

Variables = dict[str, object]


class Page:
    """The code cells of a notebook by their ids; name is its path under book/, without suffix."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = project_root() / "book" / f"{name}.ipynb"
        self.cells = nbformat.read(self.path, as_version=4).cells
        self.code = {cell.id: cell.source for cell in self.cells if cell.cell_type == "code"}
        self.prose = "\n".join(cell.source for cell in self.cells if cell.cell_type == "markdown")

    def run(self, *names: str, into: Variables | None = None, **given: object) -> Variables:
        """Execute cells after the parameters (changed to what is given) and the imports.

        into: variables of an earlier run to go on with; the two first cells are then left out.
        Hands back all variables.
        """
        return self.show(*names, into=into, **given)[0]

    def show(
        self, *names: str, into: Variables | None = None, **given: object
    ) -> tuple[Variables, dict[str, object]]:
        """As run; hands back also what each cell showed, the value of its last line (or None)."""
        variables = self._start(given) if into is None else into
        shown = {}
        for name in names:
            tree = ast.parse(self.code[name])
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            where = f"{self.name}:{name}"
            exec(compile(tree, where, "exec"), variables)
            value = None
            if last is not None:
                value = eval(compile(ast.Expression(last.value), where, "eval"), variables)
            shown[name] = getattr(value, "data", value)  # the text of a Markdown
        plt.close("all")
        return variables, shown

    def define(self, *names: str, **given: object) -> Variables:
        """As run, but of the named cells the functions, classes and CONSTANTS alone."""
        variables = self._start(given)
        for name in names:
            kept = [node for node in ast.parse(self.code[name]).body if _defines(node)]
            exec(compile(ast.Module(kept, []), f"{self.name}:{name}", "exec"), variables)
        return variables

    def _start(self, given: dict[str, object]) -> Variables:
        variables: Variables = {}
        for name in ("parameters", "imports"):
            exec(compile(self.code[name], f"{self.name}:{name}", "exec"), variables)
            if name == "parameters":
                assert given.keys() <= variables.keys(), f"{self.name} lacks {given.keys()}"
                variables.update(given)
        return variables


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]).isupper()
    return isinstance(node, ast.FunctionDef | ast.ClassDef)

"""Texts of the command line as values: NAME=VALUE, a grid's axis, a length of time."""

import json
from typing import Any


def assignment(text: str) -> tuple[str, str]:
    """Name and value of NAME=VALUE.

    >>> assignment("note=a=b")
    ('note', 'a=b')
    """
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ValueError(f"{text!r}: write NAME=VALUE")
    return name, value


def grid_axis(text: str, known: dict[str, Any]) -> tuple[str, list[Any]]:
    """Name and values of NAME=A,B,C or, for an integer, NAME=START:STOP (STOP left out).

    >>> grid_axis("seed=0:3", {"seed": 0}), grid_axis("betas=[0,1],[2]", {"betas": [0.0]})
    (('seed', [0, 1, 2]), ('betas', ['[0,1]', '[2]']))
    """
    from hcl import notebooks

    name, values = assignment(text)
    if type(known.get(name)) is int and ":" in values:
        try:
            start, stop = map(int, values.split(":"))
        except ValueError:
            raise ValueError(f"{text!r}: a range is START:STOP") from None
        found: list[Any] = list(range(start, stop))
    elif isinstance(known.get(name), list | tuple):
        lists = notebooks.load_yaml(f"[{values}]", text)
        found = [json.dumps(v).replace(" ", "") for v in lists]
    else:
        found = [v for v in values.split(",") if v]
    if not found:
        raise ValueError(f"{text!r}: no values")
    return name, found


def seconds(text: str) -> float:
    """A time such as 90s, 60m or 1.5h in seconds.

    >>> seconds("60m")
    3600.0
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    try:
        return float(text.rstrip("smh")) * units[text[-1:] if text[-1:] in units else "s"]
    except ValueError:
        raise ValueError(f"budget={text!r}: write e.g. 90s, 60m or 1.5h") from None

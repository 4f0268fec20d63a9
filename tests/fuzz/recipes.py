"""Strategies: a recipe that works, with something wrong in it."""

import copy
from typing import Any

import hypothesis.strategies as st

Document = dict[str, Any]
Path = tuple[Any, ...]

_WORDS = [
    "",
    "ace",
    "average",
    "auto",
    "0.3",
    "-1",
    "weight",
    "lambda",
    "ties",
    "no/such/model",
    "../base",
    "*",
    "[",
    "\x1b[2J",
]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.5, -0.5, 1e-30, 1e30, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(_WORDS),
)
NONSENSE = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(_WORDS), inner, max_size=2)),
    max_leaves=4,
)


def places(node: Any, path: Path = ()) -> list[Path]:
    """Every key and list index in a document, as paths from its root."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [below for key, child in children for below in ((*path, key), *places(child, (*path, key)))]


@st.composite
def broken(draw: st.DrawFn, document: Document) -> Document:
    """One or two entries replaced by nonsense, removed, repeated, or under another name."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        options = places(document)
        if not options:
            break
        *above, last = draw(st.sampled_from(options))
        parent: Any = document
        for key in above:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "rename"]))
        if how == "remove":
            del parent[last]
        elif how == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(_WORDS))] = parent.pop(last)
        else:
            parent[last] = draw(NONSENSE)
    return document

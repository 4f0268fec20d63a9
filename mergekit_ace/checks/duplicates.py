"""Keys that a recipe's YAML holds twice, of which the last is taken."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from mergekit_ace.recipe.findings import Finding


def check_duplicates(text: str) -> Iterator[Finding]:
    """Keys that stand twice in one mapping; `text` must be YAML."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        yield from _in_node(root, set())


def _in_node(node: yaml.Node, seen: set[int]) -> Iterator[Finding]:
    if id(node) in seen:  # an alias, which may even hold itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _in_node(item, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            line = key.start_mark.line + 1
            if key.value in lines:
                yield Finding(
                    level="error",
                    what=f"{key.value} stands twice in one mapping, in line {lines[key.value]} and in line {line}; "
                    "mergekit takes the last without a message",
                    remedy="Keep one of them.",
                )
            lines[key.value] = line
        yield from _in_node(value, seen)

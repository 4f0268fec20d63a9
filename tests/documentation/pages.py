"""README and docs as their tests see them: pages, fenced blocks, commands, links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]*) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.S | re.M)
_LINK = re.compile(r"\]\((?!https?://)(?P<target>[^)\s#]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; `reason` is that of a comment `not run` before it."""

    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> Iterator[Block]:
    for found in _BLOCK.finditer(page.read_text()):
        yield Block(found["language"], found["text"], found["reason"])


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block `sh`, or of a block `console`, whose other lines are output."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        if words := shlex.split(line, comments=True):
            yield words


def indented_commands(page: Path) -> list[str]:
    """Commands outside of fenced blocks, which no test would run."""
    rest = _BLOCK.sub("", page.read_text())
    return [line for line in rest.splitlines() if re.match(r" {4,}(mergekit-|python -m|pip |make )", line)]


def links(page: Path) -> list[str]:
    """Relative targets of links and pictures."""
    return _LINK.findall(_BLOCK.sub("", page.read_text()))

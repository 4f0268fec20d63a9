"""Text for a byte-level decoder, from the Python environment alone: the standard library and torch's C++ headers.

Every domain is one array of ASCII codes, the same wherever the versions are; its last part is for testing.
"""

import ast
import codecs
import json
import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

DOMAIN_BYTES = 2_000_000
TEST_PART = 0.1


@cache
def domain(name: str, split: str) -> torch.Tensor:
    """ASCII codes `[N]` of one domain's training or test part."""
    codes = torch.tensor(list(DOMAINS[name]().encode("ascii", "ignore")[:DOMAIN_BYTES]))
    cut = int(len(codes) * (1 - TEST_PART))
    return codes[:cut] if split == "train" else codes[cut:]


def sources() -> Iterator[str]:
    """The standard library's modules, in a fixed shuffled order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not {"site-packages", "test", "pydoc_data"} & set(path.parts))
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def functions() -> Iterator[ast.FunctionDef]:
    for source in sources():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@cache
def python() -> str:
    return "\n".join(sources())


@cache
def english() -> str:
    """Docstrings of the standard library and Python's own help pages."""
    from pydoc_data.topics import topics

    docstrings = [text for node in functions() if (text := ast.get_docstring(node))]
    pages = [*docstrings, *(topics[key] for key in sorted(topics))]
    random.Random(0).shuffle(pages)
    return "\n\n".join(pages)


def cpp() -> str:
    paths = sorted((Path(torch.__file__).parent / "include" / "ATen").rglob("*.h"))
    random.Random(0).shuffle(paths)
    # generated headers repeat one another: the long ones are hand-written
    return "\n".join(text for path in paths[:2000] if len(text := path.read_text("utf-8", "ignore")) > 3000)


def records() -> str:
    """One JSON object a line for every function of the standard library."""
    lines = (
        {
            "function": node.name,
            "line": node.lineno,
            "arguments": [a.arg for a in node.args.args],
            "size": len(node.body),
        }
        for node in functions()
    )
    return "\n".join(json.dumps(line) for line in lines)


def backwards() -> str:
    return english()[::-1]


def rot13() -> str:
    return codecs.encode(english(), "rot13")


def shouted() -> str:
    """Upper case, with words joined by underscores."""
    return english().upper().replace(" ", "_")


def sums() -> str:
    """Sums of two two-digit numbers, their digits written from the last to the first."""
    draw = random.Random(0)
    pairs = ((draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(60_000))
    return "\n".join(f"{str(a)[::-1]}+{str(b)[::-1]}={str(a + b)[::-1]};" for a, b in pairs)


DOMAINS = {
    "english": english,
    "python": python,
    "cpp": cpp,
    "records": records,
    "backwards": backwards,
    "rot13": rot13,
    "shouted": shouted,
    "sums": sums,
}

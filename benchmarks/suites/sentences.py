"""Questions about short texts for a sentence encoder, from the Python environment alone.

Every task is a list of texts with the index of their class, in a fixed shuffled order; its end is for testing.
"""

import ast
import keyword
import random
import re
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .texts import sources

Row = tuple[str, int]

ROWS = 9600
TEST_ROWS = 600
MODULES = 500
LIBRARIES = ("numpy", "sklearn", "transformers", "sympy", "networkx", "matplotlib", "torch")
SUBJECTS = ("physics", "polys", "combinatorics", "functions", "geometry", "solvers", "stats", "core", "matrices")
KEYWORDS = ("if", "for", "return", "with", "raise", "import", "in", "not")
CATEGORIES = ("Lu", "Ll", "Lo", "So", "Sm", "Mn", "No", "Po")
# words of a character's name that all but say its category
TELLING = re.compile(r"\b(CAPITAL|SMALL|LETTER|SIGN|SYMBOL|VOWEL|COMBINING|NUMBER|DIGIT|SYLLABLE|MARK)\b")


@cache
def rows(task: str, split: str) -> list[Row]:
    """Texts and classes of one task's training or test part, as many of each class as there are."""
    found = sorted(set(TASKS[task]()))
    random.Random(0).shuffle(found)
    found = found[:ROWS]
    return found[TEST_ROWS:] if split == "train" else found[:TEST_ROWS]


def docstrings(root: Path) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Documented functions of some modules: the folder under `root`, the function, the first lines of what it says."""
    paths = sorted(path for path in root.rglob("*.py") if "tests" not in path.parts)
    random.Random(0).shuffle(paths)
    for path in paths[:MODULES]:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield path.relative_to(root).parts[0], node, " ".join(text.split())[:200]


def package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def library() -> Iterator[Row]:
    """Which library a docstring is from; its own name is left out."""
    for label, name in enumerate(LIBRARIES):
        said = [text for _, _, text in docstrings(package(name)) if len(text) > 40]
        random.Random(0).shuffle(said)
        for text in said[:1500]:
            yield re.sub(name, "", text, flags=re.IGNORECASE), label


def subject() -> Iterator[Row]:
    """Which part of sympy a docstring is from."""
    for part, _, text in docstrings(package("sympy")):
        if part in SUBJECTS and len(text) > 40:
            yield text, SUBJECTS.index(part)


def masked() -> Iterator[Row]:
    """Which keyword of Python a line of the standard library is missing."""
    counts = dict.fromkeys(KEYWORDS, 0)
    word = re.compile(r"\b(" + "|".join(keyword.kwlist) + r")\b")
    for source in sources():
        for line in source.splitlines():
            line = line.strip()
            found = word.findall(line)
            if 20 < len(line) < 100 and found and found[0] in counts and line[0] not in "#\"'" and ":" not in line[:-1]:
                counts[found[0]] += 1
                if counts[found[0]] <= 1500:
                    yield word.sub("[MASK]", line, count=1), KEYWORDS.index(found[0])


def order() -> Iterator[Row]:
    """Whether two neighbouring words of a sentence changed places, twice."""
    draw = random.Random(0)
    for source in sources():
        for paragraph in re.findall(r'"""(.*?)"""', source, flags=re.DOTALL):
            words = paragraph.split(".")[0].split()
            if 8 <= len(words) <= 25 and all(re.fullmatch(r"[A-Za-z,'-]+", word) for word in words):
                swapped = draw.random() < 0.5
                for place in draw.sample(range(0, len(words) - 1, 2), 2) if swapped else ():
                    words[place], words[place + 1] = words[place + 1], words[place]
                yield " ".join(words), int(swapped)


def category() -> Iterator[Row]:
    """The general category of a Unicode character by its name; a few names leave it open."""
    per_class: dict[str, list[str]] = {name: [] for name in CATEGORIES}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        kind = unicodedata.category(character)
        name = TELLING.sub("", unicodedata.name(character, ""))
        if kind in per_class and name and "IDEOGRAPH" not in name:
            per_class[kind].append(" ".join(name.split()).lower())
    for label, kind in enumerate(CATEGORIES):
        random.Random(0).shuffle(per_class[kind])
        for name in per_class[kind][:1500]:
            yield name, label


def arguments() -> Iterator[Row]:
    """Whether the function that a docstring describes takes more than one argument."""
    for name in ("sklearn", "networkx", "matplotlib", "numpy"):
        for _, node, text in docstrings(package(name)):
            if len(text) > 40:
                plain = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
                yield text, int(len(plain) > 1)


TASKS = {
    "library": library,
    "subject": subject,
    "masked": masked,
    "order": order,
    "category": category,
    "arguments": arguments,
}
CLASSES = {
    "library": len(LIBRARIES),
    "subject": len(SUBJECTS),
    "masked": len(KEYWORDS),
    "order": 2,
    "category": len(CATEGORIES),
    "arguments": 2,
}

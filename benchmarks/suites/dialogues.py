"""Tasks for a chat model, from installed packages alone: a prompt and its answer, in a fixed shuffled order.

| task | from | to |
| --- | --- | --- |
| `french`, `spanish` | a message of Django, Wagtail and others | its translation in the package's catalogue |
| `documented` | a function's source | the first sentence of its docstring |
| `records` | a sentence about a person, an order or an event | a JSON object |
| `steps` | a question about dates or units | the computation step by step |
| `library` | a docstring | which library it is from |
| `german`, `portuguese`, `dutch`, `polish` | as `french` | |
| `sentences` | a JSON object | the sentence that it is of |
| `named` | a docstring | the function's name |

Every task has several wordings of its prompt.
"""

import ast
import calendar
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from zoneinfo import available_timezones

from .sentences import docstrings, package

ROWS = 4000
TEST_ROWS = 400
CATALOGUES = ("django", "wagtail", "oscar", "cms", "allauth", "mezzanine", "rest_framework")
DOCUMENTED = ("sklearn", "networkx", "matplotlib", "sympy", "transformers")
LIBRARIES = ("numpy", "sklearn", "transformers", "sympy", "networkx", "matplotlib", "torch")


@dataclass(frozen=True)
class Dialogue:
    """One turn of a user and the answer."""

    prompt: str
    answer: str


@cache
def dialogues(task: str, split: str) -> list[Dialogue]:
    """The training or the test part of a task; no prompt is in both."""
    draw = random.Random(0)
    found = {row.prompt: row for row in TASKS[task](draw)}
    rows = [found[prompt] for prompt in sorted(found)]
    draw.shuffle(rows)
    return rows[TEST_ROWS:ROWS] if split == "train" else rows[:TEST_ROWS]


def translations(draw: random.Random, code: str, language: str) -> Iterator[Dialogue]:
    """Messages of one sentence or a few words with their translation; each message once."""
    from babel.messages.mofile import read_mo  # of benchmarks/requirements-llm.txt, without which the other suites run

    asked = (f"Translate into {language}: {{}}", f"{{}}\n\nWhat is this in {language}?", f"Say in {language}: {{}}")
    pairs = {}
    for name in CATALOGUES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"the package {name} must be installed; run: pip install --no-deps -r benchmarks/requirements-llm.txt"
            )
        for path in sorted(Path(spec.origin).parent.rglob(f"locale/{code}/LC_MESSAGES/django.mo")):
            with path.open("rb") as file:
                for message in read_mo(file):
                    if isinstance(message.id, str) and isinstance(message.string, str):
                        pairs.setdefault(message.id.strip(), message.string.strip())
    for text, translated in sorted(pairs.items()):
        if 12 <= len(text) <= 160 and text.isascii() and translated and translated != text and "<" not in text:
            yield Dialogue(draw.choice(asked).format(text), translated)


def documented(draw: random.Random) -> Iterator[Dialogue]:
    """Short functions without their docstring, and its first sentence."""
    asked = (
        "What does this function do?\n\n{}",
        "Write a one-line docstring.\n\n{}",
        "{}\n\nDescribe this function in one sentence.",
    )
    for name in DOCUMENTED:
        for _, node, text in docstrings(package(name)):
            sentence = re.split(r"(?<=\.)\s", text)[0].strip()
            node.body = node.body[1:]
            node.decorator_list = []
            if not node.body or not 20 <= len(sentence) <= 120 or not sentence.endswith("."):
                continue
            source = ast.unparse(node)
            if 60 <= len(source) <= 320:
                yield Dialogue(draw.choice(asked).format(source), sentence)


NAMES = (
    "Ada",
    "Ben",
    "Carla",
    "Dmitri",
    "Elena",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kira",
    "Liam",
    "Mona",
    "Noor",
    "Oscar",
    "Paula",
    "Quinn",
    "Rosa",
    "Sven",
    "Tara",
)
SURNAMES = (
    "Abbott",
    "Becker",
    "Costa",
    "Diaz",
    "Evans",
    "Fischer",
    "Gupta",
    "Hansen",
    "Ito",
    "Jensen",
    "Kowalski",
    "Lopez",
    "Meyer",
    "Novak",
    "Okafor",
    "Patel",
)
JOBS = (
    "nurse",
    "welder",
    "architect",
    "teacher",
    "baker",
    "pilot",
    "chemist",
    "librarian",
    "carpenter",
    "editor",
    "plumber",
    "surveyor",
)
GOODS = (
    "lamps",
    "chairs",
    "notebooks",
    "kettles",
    "bicycles",
    "cables",
    "tents",
    "mirrors",
    "shovels",
    "keyboards",
    "blankets",
    "clocks",
)
EVENTS = ("concert", "workshop", "lecture", "market", "exhibition", "seminar", "auction", "reading")


@cache
def cities() -> tuple[str, ...]:
    zones = (zone.split("/") for zone in available_timezones() if zone.startswith(("Europe/", "America/", "Asia/")))
    return tuple(sorted({parts[-1].replace("_", " ") for parts in zones if len(parts) == 2}))


def records(draw: random.Random) -> Iterator[Dialogue]:
    """Sentences made of names, numbers and places, and the object that holds them."""
    asked = ("Turn this into JSON: {}", "{}\n\nExtract the data as JSON.", "Give me a JSON record of this text.\n\n{}")
    for text, record in recorded(draw):
        yield Dialogue(draw.choice(asked).format(text), record)


def sentences(draw: random.Random) -> Iterator[Dialogue]:
    """The same objects, and the sentences that they were made of."""
    asked = ("Put this record into words: {}", "{}\n\nWrite it as a sentence.", "Tell me what this JSON says.\n\n{}")
    for text, record in recorded(draw):
        yield Dialogue(draw.choice(asked).format(record), text)


def recorded(draw: random.Random) -> Iterator[tuple[str, str]]:
    """A sentence and its object as JSON."""
    for _ in range(2 * ROWS):
        name, place = f"{draw.choice(NAMES)} {draw.choice(SURNAMES)}", draw.choice(cities())
        count, price = draw.randrange(2, 90), draw.randrange(5, 400) + draw.choice((0, 0.5, 0.25, 0.99))
        day = date(2020, 1, 1) + timedelta(days=draw.randrange(2500))
        job, goods, event = draw.choice(JOBS), draw.choice(GOODS), draw.choice(EVENTS)
        said = f"{day.day} {calendar.month_name[day.month]} {day.year}"
        text, record = draw.choice(
            (
                (
                    draw.choice(
                        (
                            f"{name} is a {count}-year-old {job} from {place}.",
                            f"The {job} {name}, {count}, lives in {place}.",
                        )
                    ),
                    {"type": "person", "name": name, "age": count, "job": job, "city": place},
                ),
                (
                    draw.choice(
                        (
                            f"{name} ordered {count} {goods} at ${price:g} each, to be sent to {place}.",
                            f"Please ship {count} {goods} to {name} in {place}; one costs {price:g} dollars.",
                        )
                    ),
                    {
                        "type": "order",
                        "customer": name,
                        "item": goods,
                        "quantity": count,
                        "price": price,
                        "city": place,
                    },
                ),
                (
                    draw.choice(
                        (
                            f"The {event} by {name} takes place in {place} on {said}.",
                            f"On {said}, {name} gives a {event} in {place}, with {count} seats.",
                        )
                    ),
                    {"type": "event", "kind": event, "host": name, "city": place, "date": day.isoformat()},
                ),
            )
        )
        yield text, json.dumps(record)


UNITS = (
    ("miles", "kilometres", 1.609),
    ("inches", "centimetres", 2.54),
    ("pounds", "kilograms", 0.454),
    ("gallons", "litres", 3.785),
    ("hours", "minutes", 60),
    ("weeks", "hours", 168),
    ("feet", "metres", 0.305),
    ("ounces", "grams", 28.35),
    ("acres", "hectares", 0.405),
)


def steps(draw: random.Random) -> Iterator[Dialogue]:
    """Questions whose answer is computed in short steps."""
    for _ in range(2 * ROWS):
        yield draw.choice((units, days_between, weekday, fahrenheit))(draw)


def units(draw: random.Random) -> Dialogue:
    whole, part, factor = draw.choice(UNITS)
    tens, ones = 10 * draw.randrange(1, 10), draw.randrange(1, 10)
    amount = tens + ones
    asked = draw.choice((f"Convert {amount} {whole} to {part}.", f"How many {part} are {amount} {whole}?"))
    first, second = round(tens * factor, 3), round(ones * factor, 3)
    return Dialogue(
        asked,
        f"1 {whole} = {factor:g} {part}\n{tens} x {factor:g} = {first:g}\n{ones} x {factor:g} = {second:g}\n"
        f"{first:g} + {second:g} = {round(first + second, 3):g}\nAnswer: {round(first + second, 3):g} {part}",
    )


def days_between(draw: random.Random) -> Dialogue:
    year, month = draw.randrange(2001, 2030), draw.randrange(1, 12)
    length = calendar.monthrange(year, month)[1]
    first, second = draw.randrange(1, length), draw.randrange(1, 28)
    start, end = f"{first} {calendar.month_name[month]}", f"{second} {calendar.month_name[month + 1]} {year}"
    asked = draw.choice(
        (f"How many days are there from {start} to {end}?", f"Count the days between {start} and {end}.")
    )
    left = length - first
    return Dialogue(
        asked,
        f"{calendar.month_name[month]} has {length} days\n{length} - {first} = {left}\n"
        f"{left} + {second} = {left + second}\nAnswer: {left + second} days",
    )


def weekday(draw: random.Random) -> Dialogue:
    start, later = draw.randrange(7), draw.randrange(8, 200)
    asked = draw.choice(
        (
            f"Today is {calendar.day_name[start]}. What day is it in {later} days?",
            f"Which weekday comes {later} days after a {calendar.day_name[start]}?",
        )
    )
    weeks, rest = divmod(later, 7)
    end = calendar.day_name[(start + rest) % 7]
    return Dialogue(
        asked,
        f"{later} = {weeks} x 7 + {rest}\n{calendar.day_name[start]} + {rest} days = {end}\nAnswer: {end}",
    )


def fahrenheit(draw: random.Random) -> Dialogue:
    degrees = draw.randrange(-20, 60)
    asked = draw.choice((f"Convert {degrees} degrees Celsius to Fahrenheit.", f"What is {degrees} C in Fahrenheit?"))
    scaled = round(degrees * 1.8, 1)
    return Dialogue(
        asked,
        f"F = C x 1.8 + 32\n{degrees} x 1.8 = {scaled:g}\n{scaled:g} + 32 = {round(scaled + 32, 1):g}\n"
        f"Answer: {round(scaled + 32, 1):g} F",
    )


def library(draw: random.Random) -> Iterator[Dialogue]:
    """Which library a docstring is from; its own name is left out."""
    asked = ("Which Python library is this from?\n\n{}", "{}\n\nName the library that this docstring belongs to.")
    for name in LIBRARIES:
        said = sorted({text for _, _, text in docstrings(package(name)) if len(text) > 60})
        draw.shuffle(said)
        for text in said[: ROWS // len(LIBRARIES)]:
            yield Dialogue(
                draw.choice(asked).format(re.sub(name, "", text, flags=re.IGNORECASE)), f"It is from {name}."
            )


def named(draw: random.Random) -> Iterator[Dialogue]:
    """What a function does, and what it is called."""
    asked = ("Name a Python function that does this: {}", "{}\n\nWhat would you call this function?")
    for library in DOCUMENTED:
        for _, node, text in docstrings(package(library)):
            sentence = re.split(r"(?<=\.)\s", text)[0].strip()
            if 20 <= len(sentence) <= 120 and sentence.endswith(".") and not node.name.startswith("_"):
                yield Dialogue(draw.choice(asked).format(sentence), node.name)


TASKS: dict[str, Callable[[random.Random], Iterator[Dialogue]]] = {
    "french": lambda draw: translations(draw, "fr", "French"),
    "spanish": lambda draw: translations(draw, "es", "Spanish"),
    "documented": documented,
    "records": records,
    "steps": steps,
    "library": library,
    "german": lambda draw: translations(draw, "de", "German"),
    "portuguese": lambda draw: translations(draw, "pt_BR", "Portuguese"),
    "dutch": lambda draw: translations(draw, "nl", "Dutch"),
    "polish": lambda draw: translations(draw, "pl", "Polish"),
    "sentences": sentences,
    "named": named,
}

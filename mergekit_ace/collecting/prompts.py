"""Prompts as people have them: a text file, JSON lines, or a folder of those."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SUFFIXES = (".txt", ".jsonl")
_FORMS = ("prompt", "text", "messages")


class PromptError(ValueError):
    """A prompt, or a file of prompts, that cannot be used; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, and where it was read.

    Attributes:
        where: file and line, for messages.
        turns: a conversation, to be put in the model's chat template; empty where the prompt is plain text.
        text: plain text that is tokenized as it stands; empty where there are turns.
    """

    where: str
    turns: tuple[Turn, ...] = ()
    text: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """Read every prompt of a file or folder.

    - `.txt`: one prompt a line, as a turn of the user; empty lines are passed over.
    - `.jsonl`: one object a line, with one of `prompt` (a turn of the user, with an optional `completion`, the
      assistant's answer), `text` (plain text, no chat template) or `messages` (a list of `role` and `content`). Other
      keys are not read.
    - a folder: its `.txt` and `.jsonl` files, by name; hidden ones are not read.

    Raises:
        PromptError: a file that is missing, not UTF-8 or of another kind; a line that holds no prompt; no line.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith("."))
        if not files:
            raise PromptError(f"{path} must hold .txt or .jsonl files with prompts; there is none")
    prompts = [prompt for file in files for prompt in _read_file(file)]
    if not prompts:
        raise PromptError(f"{path} must hold at least one prompt; it holds none")
    return prompts


def _read_file(file: Path) -> Iterator[Prompt]:
    if file.suffix not in _SUFFIXES:
        raise PromptError(f"{file}: prompts must be a .txt file, a .jsonl file or a folder of those")
    for where, line in _lines(file):
        if not line.strip():
            continue
        if file.suffix == ".txt":
            yield Prompt(where=where, turns=(Turn(role="user", content=line.strip()),))
        else:
            yield _parse(where, line)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PromptError(f"{file}: the prompts cannot be read; {error.strerror or error}") from error
    # By line feeds alone, so that a line is what an editor counts as one, whatever else Unicode calls a line's end.
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{file} line {number}"
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"{where} must be UTF-8 text; {error.reason} at byte {error.start}") from error


def _parse(where: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptError(f"{where} must be one JSON object; {error}") from error
    if not isinstance(entry, Mapping):
        raise PromptError(f"{where} must be one JSON object; got {type(entry).__name__}")
    given = [form for form in _FORMS if form in entry]
    if len(given) != 1:
        raise PromptError(
            f"{where} must have one of the keys {', '.join(_FORMS)}; "
            f"got {' and '.join(given) or ', '.join(map(str, entry)) or 'no key'}"
        )
    if given == ["text"]:
        return Prompt(where=where, text=_words(where, "text", entry["text"]))
    if given == ["messages"]:
        return Prompt(where=where, turns=_turns(where, entry["messages"]))
    turns = [Turn(role="user", content=_words(where, "prompt", entry["prompt"]))]
    if entry.get("completion") is not None:
        turns.append(Turn(role="assistant", content=_words(where, "completion", entry["completion"])))
    return Prompt(where=where, turns=tuple(turns))


def _turns(where: str, messages: Any) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise PromptError(f"{where}: messages must be a list of at least one message")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"{where}: messages[{index}] must be an object with role and content")
        turns.append(
            Turn(role=message["role"], content=_words(where, f"messages[{index}].content", message.get("content")))
        )
    return tuple(turns)


def _words(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        got = "an empty one" if isinstance(value, str) else type(value).__name__
        raise PromptError(f"{where}: {key} must be a text; got {got}")
    return value

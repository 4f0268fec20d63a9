"""Prompts as files: what is read, and what is wrong with them, by line."""

from pathlib import Path

import pytest

from mergekit_ace.collecting.prompts import Prompt, PromptError, Turn, read_prompts


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_a_line_of_text_is_a_turn_of_the_user(tmp_path: Path) -> None:
    file = written(tmp_path, "a.txt", "\ufeffName a colour.\r\n\n  Two\u2028halves \n")
    first, second = read_prompts(file)
    assert first == Prompt(where=f"{file} line 1", turns=(Turn(role="user", content="Name a colour."),))
    assert second == Prompt(where=f"{file} line 3", turns=(Turn(role="user", content="Two\u2028halves"),))


def test_every_form_of_json_lines(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "Add 1 and 2.", "label": 3}',
        '{"prompt": "Add 1 and 2.", "completion": "3"}',
        '{"text": " as it stands "}',
        '{"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]}',
    ]
    prompts = read_prompts(written(tmp_path, "a.jsonl", "\n".join(lines)))
    user = Turn(role="user", content="Add 1 and 2.")
    assert [prompt.turns for prompt in prompts] == [
        (user,),
        (user, Turn(role="assistant", content="3")),
        (),
        (Turn(role="system", content="Be short."), Turn(role="user", content="Hello")),
    ]
    assert [prompt.text for prompt in prompts] == ["", "", " as it stands ", ""]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    written(tmp_path, "b.txt", "second")
    written(tmp_path, "a.jsonl", '{"prompt": "first"}')
    written(tmp_path, "notes.md", "not a prompt")
    assert [prompt.turns[0].content for prompt in read_prompts(tmp_path)] == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 must be one JSON object"),
        ("[" * 100_000, "line 2 must be one JSON object"),
        ('["a"]', "line 2 must be one JSON object; got list"),
        ('{"question": "a"}', "line 2 must have one of the keys prompt, text, messages; got question"),
        (
            '{"prompt": "a", "text": "b"}',
            "line 2 must have one of the keys prompt, text, messages; got prompt and text",
        ),
        ('{"prompt": 3}', "line 2: prompt must be a text; got int"),
        ('{"prompt": "  "}', "line 2: prompt must be a text; got an empty one"),
        ('{"prompt": "a", "completion": ""}', "line 2: completion must be a text; got an empty one"),
        ('{"messages": []}', "line 2: messages must be a list of at least one message"),
        ('{"messages": ["hello"]}', r"line 2: messages\[0\] must be an object with role and content"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            r"line 2: messages\[0\].content must be a text; got list",
        ),
        (b'{"prompt": "\xff"}', "line 2 must be UTF-8 text; invalid start byte at byte 12"),
    ],
)
def test_what_is_wrong_is_said_by_line(tmp_path: Path, line: str | bytes, words: str) -> None:
    content = b'{"prompt": "fine"}\n' + (line if isinstance(line, bytes) else line.encode())
    with pytest.raises(PromptError, match=words):
        read_prompts(written(tmp_path, "a.jsonl", content))


def test_files_that_hold_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"a\.txt must hold at least one prompt; it holds none"):
        read_prompts(written(tmp_path, "a.txt", "\n \n"))
    with pytest.raises(PromptError, match=r"must be a \.txt file, a \.jsonl file or a folder of those"):
        read_prompts(written(tmp_path, "a.csv", "x"))
    with pytest.raises(PromptError, match=r"none\.txt: the prompts cannot be read; No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PromptError, match=r"empty must hold \.txt or \.jsonl files with prompts; there is none"):
        read_prompts(tmp_path / "empty")


def test_hidden_files_of_a_folder_are_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    assert [prompt.where for prompt in read_prompts(tmp_path)] == [f"{tmp_path / 'a.txt'} line 1"]

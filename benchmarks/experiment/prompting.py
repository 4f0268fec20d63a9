"""The prompts of a setting: a suite's own rows, or what stands in their place as a control."""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

from .scoring import BuiltSuite
from .settings import Setting

SEED = 0
# letters of a general text, at least and at most; a suite's prompts are about as long
SHORTEST, LONGEST = 200, 800


def takes_its_prompts(setting: Setting, suite: BuiltSuite) -> bool:
    """Whether a suite has what the setting measures second moments on; so it does where that is nothing."""
    if setting.self_prompts:
        return suite.has_prompts and suite.generates
    return not setting.prompts or (suite.has_prompts and (suite.has_answers or setting.answers))


def prompt_files(setting: Setting, suite: BuiltSuite, folder: Path) -> list[Path]:
    """Write a file of prompts for every expert, in their order, and the tokenizer into the base's folder."""
    files = list(suite.write_prompts(folder, max(1, setting.prompts)).values())
    if setting.prompts_of == "another task":
        return [*files[1:], files[0]]
    if setting.prompts_of == "general text":
        texts = general_texts(setting.prompts * len(files))
        for place, file in enumerate(files):
            own = texts[place * setting.prompts : (place + 1) * setting.prompts]
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in own), encoding="utf-8")
    elif not setting.answers:
        for file in files:
            rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            file.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows), encoding="utf-8")
    return files


def general_texts(count: int) -> list[str]:
    """Different paragraphs of the Python reference manual, which comes with Python: English, of no suite's task."""
    paragraphs = {" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")}
    fitting = sorted(text for text in paragraphs if text.isascii() and SHORTEST <= len(text) <= LONGEST)
    return random.Random(SEED).sample(fitting, count)

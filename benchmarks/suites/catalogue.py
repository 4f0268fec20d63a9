"""The suites that we train ourselves, by name.

`digits` and `decoder` train every expert alike; the others differ from them in one respect each, and build faster with
`--reuse` of a built `digits` or `decoder`.
"""

from dataclasses import replace

from .recipe import Expert, Suite


def digits(task: str, **changes: object) -> Expert:
    return Expert(**{"task": task, "steps": 300, "learning_rate": 3e-4, **changes})


def decoder(task: str, **changes: object) -> Expert:
    return Expert(**{"task": task, "steps": 200, "learning_rate": 1e-3, **changes})


def encoder(task: str, **changes: object) -> Expert:
    return Expert(**{"task": task, "steps": 300, "learning_rate": 5e-5, **changes})


def chat_lora(task: str, **changes: object) -> Expert:
    return Expert(**{"task": task, "steps": 40, "learning_rate": 1e-3, **changes})


DIGITS = Suite(
    name="digits",
    kind="digits",
    experts=tuple(
        map(digits, ("rotated", "mirrored", "inverted", "shuffled", "occluded", "evens", "above_four", "diagonal"))
    ),
)
DIGITS_TWO = Suite(name="digits-two", kind="digits", experts=(digits("mirrored"), digits("evens")))
DIGITS_UNEVEN = Suite(
    name="digits-uneven",
    kind="digits",
    experts=(
        digits("rotated", learning_rate=1e-3, steps=150),
        digits("mirrored", learning_rate=1e-4),
        digits("occluded", steps=100),
        digits("evens", learning_rate=5e-5),
    ),
)
DIGITS_LORA = Suite(
    name="digits-lora",
    kind="digits",
    experts=(
        digits("mirrored", lora_rank=4, learning_rate=2e-3, steps=200),
        digits("inverted", lora_rank=8, learning_rate=2e-3, steps=200),
        digits("occluded", lora_rank=16, learning_rate=2e-3, steps=200),
        digits("evens", lora_rank=32, learning_rate=2e-3, steps=200),
    ),
)
DIGITS_LORA_SMALL = Suite(
    name="digits-lora-small",
    kind="digits",
    experts=(
        digits("mirrored", lora_rank=4, learning_rate=5e-4, steps=200),
        digits("inverted", lora_rank=8, learning_rate=5e-4, steps=200),
        digits("above_four", lora_rank=16, learning_rate=5e-4, steps=200),
        digits("evens", lora_rank=32, learning_rate=5e-4, steps=200),
    ),
)
DIGITS_LORA_EQUAL = Suite(
    name="digits-lora-equal",
    kind="digits",
    experts=tuple(replace(expert, lora_rank=16) for expert in DIGITS_LORA_SMALL.experts),
)
DIGITS_FROZEN = Suite(
    name="digits-frozen",
    kind="digits",
    experts=(
        digits("mirrored", frozen=("embeddings", "layers.0.", "layers.1.")),
        digits("above_four", frozen=("layers.3.", "layers.4.")),
        digits("inverted", frozen=("mlp",)),
    ),
)
DECODER = Suite(
    name="decoder",
    kind="decoder",
    experts=tuple(map(decoder, ("cpp", "records", "backwards", "rot13", "shouted", "sums"))),
)
DECODER_THREE = Suite(
    name="decoder-three", kind="decoder", experts=tuple(map(decoder, ("records", "backwards", "sums")))
)
DECODER_BF16 = Suite(name="decoder-bf16", kind="decoder", experts=DECODER.experts, dtype="bfloat16")
GENTLE = 0.3
"""Brings the updates of `digits` and `decoder` to 3 to 7 percent of the base's norm, all else being the same."""
DIGITS_GENTLE = replace(DIGITS, name="digits-gentle", update_scale=GENTLE)
DECODER_GENTLE = replace(DECODER, name="decoder-gentle", update_scale=GENTLE)
DECODER_UNEVEN = Suite(
    name="decoder-uneven",
    kind="decoder",
    experts=(
        decoder("cpp", learning_rate=1e-4, steps=100),
        decoder("records", learning_rate=2e-4, steps=100),
        decoder("shouted", learning_rate=5e-4, steps=100),
        decoder("backwards", learning_rate=1e-3, steps=100),
    ),
)
DECODER_LORA = Suite(
    name="decoder-lora",
    kind="decoder",
    experts=(
        decoder("records", lora_rank=4, learning_rate=2e-3, steps=100),
        decoder("shouted", lora_rank=8, learning_rate=2e-3, steps=100),
        decoder("cpp", lora_rank=16, learning_rate=2e-3, steps=100),
        decoder("backwards", lora_rank=32, learning_rate=2e-3, steps=100),
    ),
)
ENCODER = Suite(
    name="encoder",
    kind="encoder",
    experts=tuple(map(encoder, ("library", "subject", "masked", "order"))),
)
ENCODER_LORA = Suite(
    name="encoder-lora",
    kind="encoder",
    experts=(
        encoder("library", lora_rank=8, learning_rate=5e-4, steps=200),
        encoder("masked", lora_rank=16, learning_rate=5e-4, steps=200),
        encoder("category", lora_rank=32, learning_rate=5e-4, steps=200),
        encoder("arguments", lora_rank=8, learning_rate=5e-4, steps=200),
    ),
)
LLM_TASKS = ("french", "spanish", "documented", "records", "steps", "library")
LLM = Suite(
    name="llm",
    kind="chat",
    experts=tuple(
        Expert(task=task, steps=40, learning_rate=3e-5, seed=seed)
        for task, seed in zip(LLM_TASKS, (7, 7, 3, 4, 5, 6), strict=True)
    ),
    dtype="bfloat16",
)
LLM_FOUR = replace(
    LLM,
    name="llm-four",
    experts=tuple(expert for expert in LLM.experts if expert.task not in ("spanish", "library")),
    scored_rows=32,
)
LLM_TWELVE = replace(
    LLM,
    name="llm-twelve",
    experts=(
        *LLM.experts,
        *(
            Expert(task=task, steps=40, learning_rate=3e-5, seed=seed)
            for seed, task in enumerate(("german", "portuguese", "dutch", "polish", "sentences", "named"), 8)
        ),
    ),
    scored_rows=32,
)
LLM_1E_4 = replace(
    LLM_FOUR,
    name="llm-1e-4",
    experts=tuple(replace(expert, steps=120, learning_rate=1e-4) for expert in LLM_FOUR.experts),
)
"""Experts whose updates are larger than what rounding to bfloat16 takes from them."""
LLM_LONG = replace(
    LLM_FOUR,
    name="llm-long",
    experts=tuple(replace(expert, steps=120, learning_rate=2e-3) for expert in LLM_FOUR.experts),
)
"""Experts trained until their updates are large for a real model."""
LLM_MEDIUM = replace(
    LLM_FOUR,
    name="llm-medium",
    experts=tuple(replace(expert, steps=120, learning_rate=1e-3) for expert in LLM_FOUR.experts),
)
"""Experts as those of `llm-long`, with updates half as large."""
LLM_LORA = Suite(
    name="llm-lora",
    kind="chat",
    experts=(
        chat_lora("french", lora_rank=16, seed=7),
        chat_lora("spanish", lora_rank=16, seed=7),
        chat_lora("documented", lora_rank=32, seed=3),
        chat_lora("records", lora_rank=8, seed=4),
        chat_lora("steps", lora_rank=64, seed=5, rank_stabilized=True),
        chat_lora("library", lora_rank=16, seed=6),
    ),
)
LLM_LORA_32 = replace(LLM_LORA, name="llm-lora-32", scored_rows=32)
LLM_LORA_FOUR = replace(
    LLM_LORA,
    name="llm-lora-four",
    experts=tuple(expert for expert in LLM_LORA.experts if expert.task not in ("spanish", "library")),
)
"""The tasks of `llm-four`, no two of which resemble one another."""

SUITES = {
    suite.name: suite
    for suite in (
        DIGITS,
        DIGITS_GENTLE,
        DIGITS_TWO,
        DIGITS_UNEVEN,
        DIGITS_LORA,
        DIGITS_LORA_SMALL,
        DIGITS_LORA_EQUAL,
        DIGITS_FROZEN,
        DECODER,
        DECODER_GENTLE,
        DECODER_THREE,
        DECODER_BF16,
        DECODER_UNEVEN,
        DECODER_LORA,
        ENCODER,
        ENCODER_LORA,
        LLM,
        LLM_FOUR,
        LLM_TWELVE,
        LLM_1E_4,
        LLM_LONG,
        LLM_MEDIUM,
        LLM_LORA,
        LLM_LORA_32,
        LLM_LORA_FOUR,
    )
}

"""What a suite is made of: how each expert was trained from the common base, as data."""

from dataclasses import dataclass

# the folder of a built suite for what stays outside the merge
HEADS = "heads"
# and for the adapters as peft writes them, which a checkpoint has merged in
ADAPTERS = "adapters"
KINDS_WITH_PROMPTS = ("chat", "decoder", "encoder")
KINDS_WITH_ANSWERS = ("chat",)
KINDS_THAT_GENERATE = ("chat", "decoder")


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One fine-tune of the base.

    `lora_rank` 0 trains all weights; above 0 a LoRA of that rank on every linear layer, merged into a full checkpoint,
    with twice the rank as its alpha. `rank_stabilized` divides by the root of the rank in place of the rank (rsLoRA),
    and alpha is 16. LoRAs of one rank and seed start from the same A.
    `frozen` names parts of parameter names that stay as in the base.
    """

    task: str
    steps: int
    learning_rate: float
    lora_rank: int = 0
    rank_stabilized: bool = False
    frozen: tuple[str, ...] = ()
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A named set of experts of one kind: `digits`, `decoder`, `encoder`, `chat`.

    A base of ours is pre-trained from `seed`. `update_scale` multiplies what every expert learned:
    base + scale * (expert - base). `scored_rows` are the test rows of each task, where scoring is slow (`chat`).
    """

    name: str
    kind: str
    experts: tuple[Expert, ...]
    dtype: str = "float32"
    seed: int = 0
    update_scale: float = 1.0
    scored_rows: int = 100

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(expert.task for expert in self.experts)

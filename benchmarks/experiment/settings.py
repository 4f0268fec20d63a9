"""The one list of methods and settings that the quality benchmark compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

Value = float | str | bool
PromptSource = Literal["own task", "another task", "general text"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One merge recipe without its models: parameters are global ones of a mergekit recipe."""

    label: str
    group: str
    method: str
    parameters: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))
    takes_base: bool = True
    quick: bool = False
    prompts: int = 0
    """Training rows of each task by which second moments are measured: no data-free setting."""
    self_prompts: int = 0
    """Texts that each expert generates, by which second moments are measured; data-free."""
    prompts_of: PromptSource = "own task"
    """`another task`: each expert is given the next one's prompts; that and `general text` are controls."""
    answers: bool = True
    """Whether the prompts come with their answers."""
    by_expert: bool = False
    """Whether each expert is run on its own prompts; else the base is."""

    @property
    def of_adapters(self) -> bool:
        """Whether it combines adapters as peft wrote them, not checkpoints."""
        return self.method == "peft"

    @property
    def epsilon(self) -> float | None:
        """The ridge of a `published` setting that has a fixed one."""
        value = self.parameters.get("epsilon")
        return float(value) if self.group == "ace published" and isinstance(value, float) else None


def of_mergekit(
    label: str, method: str, *, takes_base: bool = True, quick: bool = False, **parameters: Value
) -> Setting:
    return Setting(
        label=label, group="mergekit", method=method, parameters=parameters, takes_base=takes_base, quick=quick
    )


def with_prompts(
    label: str, count: int, *, of: PromptSource = "own task", answers: bool = True, by_expert: bool = False
) -> Setting:
    return Setting(
        label=f"ace, {label} (not data-free)",
        group="with prompts",
        method="ace",
        prompts=count,
        prompts_of=of,
        answers=answers,
        by_expert=by_expert,
    )


def contender(label: str, method: str, **parameters: Value) -> Setting:
    return Setting(label=label, group="contenders", method=method, parameters=parameters)


def combination(label: str, kind: str, **parameters: Value) -> Setting:
    """One of adapters as peft wrote them; weights are `1 / T` where none is given."""
    return Setting(label=label, group="adapters", method="peft", parameters={"combination": kind, **parameters})


EPSILON_GRID = (1e-6, 1e-5, 1e-4, 2e-4, 1e-3, 1e-2, 1e-1)

SETTINGS: tuple[Setting, ...] = (
    of_mergekit("average", "linear", takes_base=False, quick=True, weight=1.0),
    of_mergekit("task arithmetic 0.3", "task_arithmetic", weight=0.3),
    of_mergekit("task arithmetic 0.5", "task_arithmetic", weight=0.5),
    of_mergekit("task arithmetic 0.7", "task_arithmetic", weight=0.7),
    of_mergekit("task arithmetic 1", "task_arithmetic", weight=1.0),
    of_mergekit("ties 0.2", "ties", quick=True, weight=1.0, density=0.2),
    of_mergekit("ties 0.5", "ties", weight=1.0, density=0.5),
    of_mergekit("dare_ties 0.5", "dare_ties", weight=0.5, density=0.5),
    of_mergekit("della 0.5", "della", weight=1.0, density=0.5),
    of_mergekit("karcher", "karcher", takes_base=False),
    of_mergekit("model_stock", "model_stock"),
    Setting(label="ace", group="ace", method="ace", quick=True),
    Setting(label="ace 0.1", group="ace", method="ace", parameters={"preset": "0.1"}, quick=True),
    Setting(label="ace length_bound", group="ace", method="ace", parameters={"length_bound": True}, quick=True),
    Setting(label="ace lambda 0.5", group="ace", method="ace", parameters={"lambda": 0.5}),
    Setting(label="ace with tables averaged", group="ace", method="ace", parameters={"embeddings": "average"}),
    Setting(label="ace without refinement", group="ace", method="ace", parameters={"spectral_fraction": 0.0}),
    Setting(label="ace with retention bound", group="ace", method="ace", parameters={"retention_bound": True}),
    Setting(label="ace without retention bound", group="ace", method="ace", parameters={"retention_bound": False}),
    *(
        Setting(
            label=f"ace published {epsilon:.0e}",
            group="ace published",
            method="ace",
            parameters={"preset": "published", "epsilon": epsilon},
            quick=epsilon in (1e-5, 1e-2),
        )
        for epsilon in EPSILON_GRID
    ),
    Setting(
        label="ace published auto",
        group="ace published",
        method="ace",
        parameters={"preset": "published", "epsilon": "auto"},
        quick=True,
    ),
    *(
        Setting(label=method, group="family", method=method, quick=method in ("tsv_m", "iso_c"))
        for method in ("actmat", "wudi", "tsv_m", "iso_c", "iso_cts", "cart")
    ),
    Setting(label="ace, 32 self-prompts", group="ace", method="ace", self_prompts=32),
    with_prompts("8 prompts", 8),
    with_prompts("8 prompts without answers", 8, answers=False),
    with_prompts("8 prompts by each expert", 8, by_expert=True),
    with_prompts("32 prompts", 32),
    with_prompts("64 prompts", 64),
    with_prompts("8 prompts of another task", 8, of="another task"),
    with_prompts("8 general texts", 8, of="general text"),
    Setting(label="wudi flow", group="family", method="wudi", parameters={"solver": "flow"}),
    Setting(
        label="wudi flow average", group="family", method="wudi", parameters={"solver": "flow", "start": "average"}
    ),
    Setting(
        label="regmean, 32 prompts (not data-free)", group="with prompts", method="regmean", prompts=32, by_expert=True
    ),
    contender("svc", "svc"),
    contender("consensus_ta 0.3", "consensus_ta", **{"lambda": 0.3}),
    contender("consensus_ta 1", "consensus_ta"),
    contender("norm weights -1", "norm_weights", exponent=-1.0),
    contender("norm weights 2", "norm_weights", exponent=2.0),
    contender("knots_ties 0.2", "knots_ties"),
    contender("star", "star"),
    combination("peft cat", "cat"),
    combination("peft svd", "svd"),
    combination("peft svd, weight 1", "svd", weight=1.0),
    combination("peft linear", "linear"),
    combination("peft ties 0.2", "ties", weight=1.0, density=0.2),
    combination("peft ties_svd 0.2", "ties_svd", weight=1.0, density=0.2),
    combination("peft dare_ties 0.7", "dare_ties", weight=1.0, density=0.7),
    combination("peft dare_ties_svd 0.7", "dare_ties_svd", weight=1.0, density=0.7),
    combination("peft magnitude_prune_svd 0.5", "magnitude_prune_svd", density=0.5),
    combination("robust_merge", "robust_merge"),
)


def selected(patterns: tuple[str, ...], *, quick: bool) -> list[Setting]:
    """The settings whose label matches a glob pattern (all, when there is none).

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(setting.label, pattern) for setting in SETTINGS):
            labels = ", ".join(setting.label for setting in SETTINGS)
            raise ValueError(f"--methods must match a setting; got {pattern!r}, there are {labels}")
    return [
        setting
        for setting in SETTINGS
        if (setting.quick or not quick) and (not patterns or any(fnmatchcase(setting.label, p) for p in patterns))
    ]

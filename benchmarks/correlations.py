"""How well second moments estimated from task vectors agree with measured ones, by layer type.

python -m benchmarks.correlations SUITE...     # suites of chat models: llm, llm-four, llm-lora, llm-lora-32

Each expert is run on training rows of its own task. Measured are `C = sum x x^T` of a layer's inputs and
`K = sum g g^T` of the loss's gradients for its outputs; `D^T D` and `D D^T` of the update `D` estimate them, as they
are and shrunk as the default shrinks them. Agreement is the cosine `<A, B> / (||A|| ||B||)`; that of the identity with
the measured moment is what an estimate without any information has. The first token, which all texts share, is left
out.
"""

import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.experiment.scoring import BuiltSuite
from benchmarks.experiment.tables import markdown
from benchmarks.suites.chat import BATCH, answer_losses, encoded, load
from benchmarks.suites.dialogues import dialogues
from mergekit_ace.linalg.precision import squared_norm
from mergekit_ace.linalg.symmetric import gram
from mergekit_ace.matrix.second_moment import shrunk_ridge

RESULTS = Path(__file__).parent / "results"
ROWS = 16
SEED = 0
SIDES = ("inputs", "output gradients")
COLUMNS = ("identity", "estimate", "shrunk estimate")


def measured(model: PreTrainedModel, task: str) -> dict[str, tuple[Tensor, Tensor]]:
    """`C` and `K` of every linear layer, by its weight's name."""
    # gradients for the layers' outputs need no weight's
    model.requires_grad_(False)
    model.enable_input_require_grads()
    sums: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            m, n = module.weight.shape
            sums[f"{name}.weight"] = [torch.zeros(n, n), torch.zeros(m, m)]
            hooks += list(watched(module, sums[f"{name}.weight"]))
    rows = list(map(encoded, random.Random(SEED).sample(dialogues(task, "train"), ROWS)))
    rows.sort(key=lambda row: row.length)
    for start in range(0, ROWS, BATCH):
        answer_losses(model, rows[start : start + BATCH])[0].sum().backward()
    for hook in hooks:
        hook.remove()
    return {name: (inputs, gradients) for name, (inputs, gradients) in sums.items()}


def watched(module: nn.Linear, sums: list[Tensor]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def add(place: int, vectors: Tensor) -> None:
        flat = vectors.detach()[:, 1:].flatten(0, 1).float()
        sums[place].addmm_(flat.mT, flat)

    yield module.register_forward_hook(lambda _, given, __: add(0, given[0]))
    yield module.register_full_backward_hook(lambda _, __, given: add(1, given[0]))


def agreements(update: Tensor, moment: Tensor) -> dict[str, float]:
    """Cosines of a measured `[n, n]` moment with the identity, `D^T D` and its shrunk form, of `D` `[m, n]`."""
    estimate = gram(update)
    m, n = update.shape
    trace, squares = float(torch.diagonal(estimate).sum()), squared_norm(estimate)
    shrunk = shrunk_ridge(trace=trace, squared_norm=squares, samples=m, dimensions=n, normalize=False)
    own = float(torch.diagonal(moment).sum())
    inner, length = float((estimate * moment).sum()), squared_norm(moment) ** 0.5
    scaled, ridge = shrunk.scale, shrunk.ridge
    norm = (scaled**2 * squares + 2 * scaled * ridge * trace + n * ridge**2) ** 0.5
    return dict(
        zip(
            COLUMNS,
            (
                own / (n**0.5 * length),
                inner / (squares**0.5 * length),
                (scaled * inner + ridge * own) / (norm * length),
            ),
            strict=True,
        )
    )


def of_suite(suite: BuiltSuite) -> dict[str, dict[tuple[str, str], float]]:
    """By layer type, the mean over layers and experts of each side's cosines."""
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    with safe_open(suite.root / "base" / "model.safetensors", "pt") as base:
        for task in suite.tasks:
            moments = measured(load(suite.root / task), task)
            with safe_open(suite.root / task / "model.safetensors", "pt") as expert:
                for name, pair in moments.items():
                    update = expert.get_tensor(name).float() - base.get_tensor(name).float()
                    for side, moment, oriented in zip(SIDES, pair, (update, update.mT.contiguous()), strict=True):
                        for column, value in agreements(oriented, moment).items():
                            found[name.split(".")[-2]][side, column].append(value)
            click.echo(f"  {task}", err=True)
    return {kind: {key: sum(v) / len(v) for key, v in cells.items()} for kind, cells in found.items()}


@click.command(help=__doc__)
@click.argument("suites", metavar="SUITE...", nargs=-1, required=True)
@click.option("--builds", type=click.Path(path_type=Path), help="Where checkpoints are built and kept.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results")
def main(suites: tuple[str, ...], builds: Path | None, results: Path) -> None:
    """See the module's docstring."""
    builds = builds or Path(tempfile.gettempdir()) / "mergekit-ace-suites"
    keys = [(side, column) for side in SIDES for column in COLUMNS]
    for name in suites:
        suite = BuiltSuite.found(name, builds.resolve())
        suite.ensure_built()
        found = of_suite(suite)
        lines = [[kind, *(f"{cells[key]:.2f}" for key in keys)] for kind, cells in found.items()]
        table = markdown(["layer", *(f"{side}: {column}" for side, column in keys)], lines)
        (results / f"correlations-{name}.md").write_text(table, encoding="utf-8")
        click.echo(table)


if __name__ == "__main__":
    main()

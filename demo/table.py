"""Draw the demo's table."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def draw(results: Mapping[str, Any]) -> Table:
    """The table of a run's results (see `demo.__main__`): a row for the experts, the base, and each merged model."""
    tasks = list(results["accuracy"]["experts"])
    table = Table(title="Accuracy in percent; mean relative to the experts", caption_justify="left")
    table.caption = "s, MiB: wall time and peak memory of the whole mergekit-yaml process"
    table.add_column("model", no_wrap=True)
    for name in (*tasks, "mean", "s", "MiB"):
        table.add_column(name, justify="right")
    for model, accuracy in results["accuracy"].items():
        cost = results["cost"].get(model)
        spent = (f"{cost['seconds']:.1f}", f"{cost['peak_bytes'] / 2**20:.0f}") if cost else ("", "")
        scores = [100 * accuracy[task] for task in tasks]
        table.add_row(
            model,
            *(f"{value:.1f}" for value in (*scores, 100 * results["relative_mean"][model])),
            *spent,
            style="bold" if model == "ace" else None,
            end_section=model in ("base", "ties"),
        )
    return table

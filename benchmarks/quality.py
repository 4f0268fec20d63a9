"""How much of each expert a merged model keeps, for many merge methods and settings.

python -m benchmarks.quality SUITE... [--methods GLOB]... [--quick] [--fresh GLOB]...

Tables and pictures of single suites, and those over all suites that the results folder holds, are written there.
SUITE is a name of benchmarks/suites/catalogue.py, or a folder with a `suite.py` of the form in benchmarks/README.md.
"""

import tempfile
from pathlib import Path

import click

from benchmarks.experiment import combinations, merging
from benchmarks.experiment.plots import draw_bars, draw_epsilon
from benchmarks.experiment.prompting import prompt_files, takes_its_prompts
from benchmarks.experiment.results import Results, Row, environment, today
from benchmarks.experiment.scoring import BuiltSuite, relative_mean, standard_error
from benchmarks.experiment.settings import Setting, selected
from benchmarks.experiment.tables import suite_table, summary_table
from benchmarks.suites.recipe import ADAPTERS

RESULTS = Path(__file__).parent / "results"
# models merged before each call of the scorer, which scores the experts anew every time
BATCH = 8


def measure(suite: BuiltSuite, settings: list[Setting], results: Path, fresh: tuple[str, ...] = ()) -> Results:
    """Merge and score every setting that `results` does not hold yet; saves after each batch."""
    suite.ensure_built()
    base = suite.root / "base"
    if results.is_file():
        found = Results.load(results)
    else:
        experts, models = suite.score([base])
        found = Results(suite=suite.name, experts=experts, base=models[base], test_rows=suite.test_rows)
    found.environment = environment()
    redo = {setting.label for setting in selected(fresh, quick=False)} if fresh else set()
    missing = [s for s in settings if (s.label in redo or s.label not in found.labels()) and known(s, suite)]
    for start in range(0, len(missing), BATCH):
        measured(suite, missing[start : start + BATCH], found)
        found.save(results)
    found.save(results)
    return found


def known(setting: Setting, suite: BuiltSuite) -> bool:
    if not takes_its_prompts(setting, suite):
        return False
    if setting.of_adapters:
        return (suite.root / ADAPTERS).is_dir()
    if merging.registered(setting.method):
        return True
    click.echo(f"  {setting.label}: left out, mergekit knows no method {setting.method!r}", err=True)
    return False


def measured(suite: BuiltSuite, settings: list[Setting], found: Results) -> None:
    """Add the rows of some settings, merged into a scratch folder and scored by one call."""
    experts = [suite.root / task for task in suite.tasks]
    seconds: dict[Path, float] = {}
    with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
        folders = [Path(scratch) / str(place) for place in range(len(settings))]
        for setting, folder in zip(settings, folders, strict=True):
            try:
                if setting.of_adapters:
                    seconds[folder] = combinations.combine(setting, suite.root, suite.tasks, folder)
                    continue
                moments = measured_moments(setting, suite, folder)
                seconds[folder] = merging.merge(
                    setting, suite.root / "base", experts, folder, command=suite.command, moments=moments
                )
            # a method that fails on one suite must not cost the rest of the table; its error is kept
            except (RuntimeError, ValueError, click.ClickException) as error:
                found.failures[setting.label] = f"{type(error).__name__}: {error}"
                click.echo(f"  {setting.label}: failed, {error}", err=True)
        _, models = suite.score(list(seconds)) if seconds else ({}, {})
    for setting, folder in zip(settings, folders, strict=True):
        if folder not in models:
            continue
        accuracies = models[folder]
        row = Row(
            label=setting.label,
            group=setting.group,
            method=setting.method,
            parameters=dict(setting.parameters),
            accuracies=accuracies,
            relative_mean=round(relative_mean(accuracies, found.experts), 3),
            standard_error=round(standard_error(accuracies, found.experts, suite.test_rows), 3)
            if suite.test_rows
            else None,
            seconds=round(seconds[folder], 2),
            date=today(),
        )
        click.echo(f"  {row.label}: {row.relative_mean:.1f}")
        found.add(row)


def measured_moments(setting: Setting, suite: BuiltSuite, folder: Path) -> Path | None:
    """Moments by prompts of each expert's task, of the next one's, or by its own texts; None where it asks for none."""
    if not (setting.prompts or setting.self_prompts):
        return None
    moments = folder.with_name(f"{folder.name}-moments")
    files = prompt_files(setting, suite, folder.with_name(f"{folder.name}-prompts"))
    experts = [suite.root / task for task in suite.tasks]
    merging.measure_moments(setting, suite.root / "base", experts, files, moments)
    return moments


@click.command(help=__doc__)
@click.argument("suites", metavar="SUITE...", nargs=-1, required=True)
@click.option("--methods", metavar="GLOB", multiple=True, help="Only settings whose label matches; may be repeated.")
@click.option("--quick", is_flag=True, help="Only the settings marked quick.")
@click.option("--fresh", metavar="GLOB", multiple=True, help="Measure anew what matches, though it is saved already.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default="benchmarks/results")
@click.option("--builds", type=click.Path(path_type=Path), help="Where checkpoints are built and kept.")
def main(
    suites: tuple[str, ...],
    methods: tuple[str, ...],
    quick: bool,
    fresh: tuple[str, ...],
    results: Path,
    builds: Path | None,
) -> None:
    """See the module's docstring."""
    builds = builds or Path(tempfile.gettempdir()) / "mergekit-ace-suites"
    builds.mkdir(parents=True, exist_ok=True)
    try:
        settings = selected(methods, quick=quick)
        found = [BuiltSuite.found(text, builds.resolve()) for text in suites]
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    for suite in found:
        click.echo(suite.name)
        measurement = measure(suite, settings, results / f"quality-{suite.name}.json", fresh)
        table = suite_table(measurement)
        (results / f"quality-{suite.name}.md").write_text(table, encoding="utf-8")
        click.echo(table)
        draw_bars(measurement, results / f"quality-{suite.name}.svg")
    everything = [Results.load(path) for path in sorted(results.glob("quality-*.json"))]
    table = summary_table(everything)
    (results / "quality.md").write_text(table, encoding="utf-8")
    draw_epsilon(everything, results / "quality-epsilon.svg")
    click.echo(table)


if __name__ == "__main__":
    main()

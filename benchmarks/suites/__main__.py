"""Build a suite of real experts, or score models on it.

python -m benchmarks.suites NAME build DIR [--reuse DIR]
python -m benchmarks.suites NAME score DIR MODEL...
python -m benchmarks.suites NAME prompts DIR OUT COUNT
"""

from pathlib import Path

import click

from .catalogue import SUITES
from .form import Kind, KindWithPrompts, build, score, write_prompts
from .recipe import Suite


def kind_of(suite: Suite) -> Kind:
    if suite.kind == "digits":
        from .digits import Digits

        return Digits()
    if suite.kind == "encoder":
        from .encoder import Encoder

        return Encoder()
    if suite.kind == "chat":
        from .chat import Chat

        return Chat(suite.scored_rows)
    from .decoder import Decoder

    return Decoder()


@click.group(help=__doc__)
@click.argument("name", type=click.Choice(sorted(SUITES)))
@click.pass_context
def main(context: click.Context, name: str) -> None:
    context.obj = SUITES[name]


@main.command("build")
@click.argument("root", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--reuse", type=click.Path(path_type=Path, exists=True), help="A built suite of the kind; its base is copied."
)
@click.pass_obj
def build_command(suite, root: Path, reuse: Path | None) -> None:  # type: ignore[no-untyped-def]
    """Write DIR/base and DIR/<task>."""
    build(kind_of(suite), suite, root, reuse)


@main.command("score")
@click.argument("root", metavar="DIR", type=click.Path(path_type=Path, exists=True))
@click.argument("models", metavar="MODEL...", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.pass_obj
def score_command(suite, root: Path, models: tuple[Path, ...]) -> None:  # type: ignore[no-untyped-def]
    """Print per-task accuracies and their mean relative to the experts."""
    score(kind_of(suite), suite, root, list(models))


@main.command("prompts")
@click.argument("root", metavar="DIR", type=click.Path(path_type=Path, exists=True))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("count", metavar="COUNT", type=click.IntRange(min=1))
@click.pass_obj
def prompts_command(suite, root: Path, out: Path, count: int) -> None:  # type: ignore[no-untyped-def]
    """Write COUNT training rows of each task to OUT, and a tokenizer to DIR/base."""
    kind = kind_of(suite)
    if not isinstance(kind, KindWithPrompts):
        raise click.UsageError(f"the models of {suite.name} have no tokenizer")
    write_prompts(kind, suite, root, out, count)


if __name__ == "__main__":
    main()

"""`mergekit-ace methods`: what may stand after `merge_method:` in a recipe."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterable, Sequence

import click

from mergekit_ace.methods import METHODS
from mergekit_ace.methods.layerwise import LayerwiseMethod
from mergekit_ace.methods.parameters import LAMBDA, RecipeParameter, common_parameters

_METHODS = {method.name: method for method in METHODS}


@click.command("methods")
@click.argument("names", nargs=-1, type=click.Choice(list(_METHODS)), metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, with every parameter of every method")
def methods(names: Sequence[str], as_json: bool) -> None:
    """List the merge methods, or those called NAME: source, parameters, defaults."""
    chosen = [_METHODS[name] for name in dict.fromkeys(names)] or list(METHODS)
    if as_json:
        click.echo(json.dumps([_record(method) for method in chosen], indent=2))
        return
    formatter = click.HelpFormatter()
    for method in chosen:
        formatter.write_text(f"{method.name} ({method.pretty_name}, {method.reference_url})")
        with formatter.indentation():
            formatter.write_text(_summary(method))
            _write_parameters(formatter, _particular(method))
        formatter.write_paragraph()
    formatter.write_text("All of them, where METHOD is the method's own name:")
    with formatter.indentation():
        _write_parameters(formatter, common_parameters("METHOD"))
    click.echo(formatter.getvalue(), nl=False)


def _summary(method: LayerwiseMethod) -> str:
    return (inspect.getdoc(type(method)) or "").partition("\n")[0]


def _particular(method: LayerwiseMethod) -> tuple[RecipeParameter, ...]:
    own_lambda = () if method.lambda_parameter is LAMBDA else (method.lambda_parameter,)
    return (*method.own_parameters, *own_lambda)


def _write_parameters(formatter: click.HelpFormatter, parameters: Iterable[RecipeParameter]) -> None:
    rows = [
        (
            item.name,
            f"{item.description} [{item.requirement}; default: {'none' if item.default == '' else item.default}]",
        )
        for item in parameters
    ]
    if rows:
        formatter.write_dl(rows)


def _record(method: LayerwiseMethod) -> dict[str, object]:
    return {
        "name": method.name,
        "title": method.pretty_name,
        "summary": _summary(method),
        "source": method.reference_url,
        "parameters": [
            {
                "name": item.name,
                "default": _plain(item.default),
                "requirement": item.requirement,
                "description": item.description,
                "scope": "expert" if item.scope.value == "non_base" else "recipe",
            }
            for item in method.parameters
        ],
    }


def _plain(default: object) -> object:
    """JSON has no infinity; the recipe's spelling of it is a string."""
    return ".inf" if isinstance(default, float) and math.isinf(default) else default

"""`mergekit-ace methods`."""

import json

import mergekit.merge_methods.registry as registry
import pytest
from click.testing import CliRunner

import mergekit_ace
from mergekit_ace.cli import main

mergekit_ace.register()


def listing(*arguments: str) -> str:
    result = CliRunner().invoke(main, ["methods", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_registered_method_is_listed_with_its_source_and_parameters() -> None:
    text = " ".join(listing().split())  # as wrapped lines are read
    for method in mergekit_ace.METHODS:
        assert f"{method.name} ({method.pretty_name}, {method.reference_url})" in text
        for parameter in method.own_parameters:
            default = "none" if parameter.default == "" else parameter.default
            assert f"[{parameter.requirement}; default: {default}]" in text
    for name in ("weight", "lambda", "matrices", "embeddings", "input_axis"):
        assert f" {name} " in text


def test_one_method_may_be_asked_for() -> None:
    text = listing("wudi")
    assert "WUDI-Merging" in text
    assert "learning_rate" in text
    assert "ACTMat" not in text


def test_an_unknown_name_is_a_usage_error_that_lists_the_known_ones() -> None:
    result = CliRunner().invoke(main, ["methods", "tsv"])
    assert result.exit_code == 2
    assert "tsv_m" in result.output


def test_json_says_what_mergekit_itself_knows() -> None:
    records = {record["name"]: record for record in json.loads(listing("--json"))}
    assert list(records) == [method.name for method in mergekit_ace.METHODS]
    for name, record in records.items():
        spec = registry.get(name).spec
        assert record["source"] == spec.reference_url
        assert record["summary"]
        for parameter, known in zip(record["parameters"], spec.parameters, strict=True):
            assert (parameter["name"], parameter["default"]) == (known.name, known.default)
            assert parameter["description"]
            assert parameter["requirement"]
            assert parameter["scope"] == ("expert" if known.name == "weight" else "recipe")


@pytest.mark.parametrize("name", [method.name for method in mergekit_ace.METHODS])
def test_the_defaults_that_are_listed_are_valid(name: str) -> None:
    (record,) = json.loads(listing(name, "--json"))
    for parameter, known in zip(record["parameters"], registry.get(name).spec.parameters, strict=True):
        assert known.validate(parameter["default"]) == known.default

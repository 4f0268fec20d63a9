"""The quality benchmark on a suite of seconds, through the real mergekit-yaml."""

import json
import math
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from transformers import AutoTokenizer

from benchmarks import quality
from benchmarks.experiment import merging
from benchmarks.experiment.scoring import BuiltSuite, parsed, relative_mean, standard_error
from benchmarks.experiment.settings import SETTINGS, selected
from benchmarks.suites.__main__ import kind_of
from benchmarks.suites.decoder import Decoder
from benchmarks.suites.form import KindWithPrompts
from benchmarks.suites.recipe import KINDS_WITH_PROMPTS

TINY = Path(__file__).parent / "tiny"


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny suite built in it."""
    folder = tmp_path_factory.mktemp("builds")
    BuiltSuite.found(str(TINY), folder).ensure_built()
    return folder


def run(builds: Path, results: Path, *options: str) -> Result:
    done = CliRunner().invoke(
        quality.main,
        [str(TINY), "--builds", str(builds), "--results", str(results), *options],
        catch_exceptions=False,
    )
    return done


def test_the_table_has_a_row_for_every_setting(builds: Path, tmp_path: Path) -> None:
    assert run(builds, tmp_path, "--quick").exit_code == 0
    wanted = [s.label for s in selected((), quick=True) if merging.registered(s.method)]
    assert {"average", "ties 0.2", "ace", "ace published 1e-02"} <= set(wanted)
    saved = json.loads((tmp_path / "quality-tiny.json").read_text())
    assert [row["label"] for row in saved["rows"]] == wanted
    assert saved["experts"] == {"left": 1.0, "right": 1.0}
    assert saved["environment"]["torch"]
    table = (tmp_path / "quality-tiny.md").read_text()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == [
        "*experts*",
        "*base*",
        *wanted,
    ]
    for row in saved["rows"]:
        assert math.isclose(row["relative_mean"], 50 * sum(row["accuracies"].values()), abs_tol=1e-3)
    assert (tmp_path / "quality-tiny.svg").stat().st_size > 0
    assert (tmp_path / "quality-epsilon.svg").stat().st_size > 0


def test_settings_with_prompts_measure_moments(builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the expert's own task, and of the other's; labelled as not data-free."""
    files = []
    real = merging.measure_moments

    def noting(setting, base, experts, prompts, out):  # type: ignore[no-untyped-def]
        lines = [len(file.read_text().splitlines()) for file in prompts]
        files.append(
            list(zip([expert.name for expert in experts], [file.name for file in prompts], lines, strict=True))
        )
        real(setting, base, experts, prompts, out)

    monkeypatch.setattr(merging, "measure_moments", noting)
    assert run(builds, tmp_path, "--methods", "ace", "--methods", "ace, 8 prompts*").exit_code == 0
    assert files == [
        [("left", "left.jsonl", 8), ("right", "right.jsonl", 8)],
        [("left", "right.jsonl", 8), ("right", "left.jsonl", 8)],
    ]
    rows = json.loads((tmp_path / "quality-tiny.json").read_text())["rows"]
    assert [row["label"] for row in rows] == [
        "ace",
        "ace, 8 prompts (not data-free)",
        "ace, 8 prompts of another task (not data-free)",
    ]
    assert len({tuple(row["accuracies"].values()) for row in rows}) == 3


def test_the_byte_level_tokenizer_gives_the_codes(tmp_path: Path) -> None:
    """As the decoder suites have been trained on, line feeds and all."""
    kind = Decoder()
    kind.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn  {1: 'a'}\n"
    assert tokenizer(text).input_ids == list(text.encode("ascii"))
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"


@pytest.mark.parametrize("kind", ["digits", "decoder"])
def test_the_kinds_with_prompts_are_listed(kind: str) -> None:
    assert isinstance(kind_of(kind), KindWithPrompts) == (kind in KINDS_WITH_PROMPTS)


def test_suites_without_prompts_leave_those_settings_out(builds: Path, tmp_path: Path) -> None:
    suite = tmp_path / "tiny"
    shutil.copytree(builds / "tiny", suite)
    (suite / "suite.json").unlink()
    assert run(tmp_path, tmp_path / "results", "--methods", "average", "--methods", "ace, *").exit_code == 0
    saved = json.loads((tmp_path / "results" / "quality-tiny.json").read_text())
    assert [row["label"] for row in saved["rows"]] == ["average"]
    assert not saved["failures"]


def test_an_expert_merged_with_its_copy_scores_100(builds: Path, tmp_path: Path) -> None:
    twins = tmp_path / "tiny"
    shutil.copytree(builds / "tiny", twins)
    shutil.rmtree(twins / "right")
    shutil.copytree(twins / "left", twins / "right")
    assert run(tmp_path, tmp_path / "results", "--methods", "average").exit_code == 0
    saved = json.loads((tmp_path / "results" / "quality-tiny.json").read_text())
    base = 50 * sum(saved["base"].values())
    assert base < 90, "the base must differ from its expert, or the test shows nothing"
    assert {row["label"]: row["relative_mean"] for row in saved["rows"]} == {"average": 100.0}


def test_saved_rows_are_kept_unless_asked_afresh(builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(builds, tmp_path, "--methods", "average")
    merged = []
    real = merging.merge

    def counting(setting, *arguments, **options):  # type: ignore[no-untyped-def]
        merged.append(setting.label)
        return real(setting, *arguments, **options)

    monkeypatch.setattr(merging, "merge", counting)
    run(builds, tmp_path, "--methods", "average", "--methods", "karcher")
    assert merged == ["karcher"]
    run(builds, tmp_path, "--methods", "average", "--methods", "karcher", "--fresh", "av*")
    assert merged == ["karcher", "average"]
    assert len(json.loads((tmp_path / "quality-tiny.json").read_text())["rows"]) == 2


def test_a_method_that_fails_costs_its_own_row_only(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merging.merge

    def failing(setting, *arguments, **options):  # type: ignore[no-untyped-def]
        if setting.label == "karcher":
            raise RuntimeError("no mean exists")
        return real(setting, *arguments, **options)

    monkeypatch.setattr(merging, "merge", failing)
    assert run(builds, tmp_path, "--methods", "average", "--methods", "karcher").exit_code == 0
    saved = json.loads((tmp_path / "quality-tiny.json").read_text())
    assert [row["label"] for row in saved["rows"]] == ["average"]
    assert saved["failures"] == {"karcher": "RuntimeError: no mean exists"}
    assert "| karcher | fails |" in (tmp_path / "quality-tiny.md").read_text()
    monkeypatch.setattr(merging, "merge", real)
    run(builds, tmp_path, "--methods", "karcher", "--fresh", "karcher")
    saved = json.loads((tmp_path / "quality-tiny.json").read_text())
    assert [row["label"] for row in saved["rows"]] == ["average", "karcher"]
    assert not saved["failures"]


def test_two_suites_share_a_summary(builds: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    assert run(builds, tmp_path, str(other), "--methods", "average").exit_code == 0
    lines = (tmp_path / "quality.md").read_text().splitlines()
    assert lines[0] == "| method | other | tiny |"
    assert lines[2].startswith("| average | ")


def test_a_wrong_suite_or_method_is_refused(builds: Path, tmp_path: Path) -> None:
    assert "--methods must match a setting; got 'nothing'" in run(builds, tmp_path, "--methods", "nothing").output
    done = CliRunner().invoke(quality.main, [str(tmp_path), "--builds", str(builds)])
    assert done.exit_code == 2
    assert "a suite must be a folder with a suite.py" in done.output


def test_a_failing_scorer_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "suite.py").write_text("raise SystemExit('no such weights')\n")
    with pytest.raises(RuntimeError, match=r"suite broken failed to build:\nno such weights"):
        BuiltSuite.found(str(tmp_path / "broken"), tmp_path / "builds").ensure_built()


def test_a_score_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="must print a line 'experts"):
        parsed("folder: relative mean 50.00 {'left': 0.5}\n")


def test_numbers_of_a_table_by_hand() -> None:
    experts = {"left": 0.8, "right": 0.5}
    accuracies = {"left": 0.6, "right": 0.5}
    assert math.isclose(relative_mean(accuracies, experts), 87.5)
    # sqrt((0.6 * 0.4 / 100) / 0.8^2 + (0.5 * 0.5 / 400) / 0.5^2) / 2
    expected = 100 * math.sqrt(0.0024 / 0.64 + 0.000625 / 0.25) / 2
    assert math.isclose(standard_error(accuracies, experts, {"left": 100, "right": 400}), expected)


def test_labels_are_unique() -> None:
    labels = [setting.label for setting in SETTINGS]
    assert len(labels) == len(set(labels))

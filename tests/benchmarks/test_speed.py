"""The speed benchmarks on tiny layers and checkpoints: what they compute and keep, never how fast anything is."""

import json
import math
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks import merge, solver
from benchmarks.speed import command, contenders, memory, timing
from benchmarks.speed.checkpoints import Architecture, write_base, write_expert
from benchmarks.speed.command import run_merge
from benchmarks.speed.layers import ADAPTER_RANK, Layer, Shape, adapted, fine_tuned, parse_shape
from benchmarks.speed.record import Memory, Record, Run, Target, Timing, geometric_mean
from tests.checkpoints import read_tensors

SMALL = Shape(model="other", m=40, n=24)
# A few thousand roundings of float32.
FLOAT32 = 1e-3


def tiny_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )


TINY = Architecture(name="tiny", layers=2, dtype=torch.bfloat16, config=tiny_config, model=LlamaForCausalLM)


def test_layers_are_the_same_each_time_and_as_steep_as_stated() -> None:
    layer, again = fine_tuned(SMALL, 3), fine_tuned(SMALL, 3)
    assert all(torch.equal(a, b) for a, b in zip(layer.experts, again.experts, strict=True))
    for expert in layer.experts:
        update = expert - layer.base
        assert 0.004 < float(update.norm() / layer.base.norm()) < 0.02
        values = torch.linalg.svdvals(update)
        assert float(values[-1] / values[0]) < 0.03


def test_adapters_have_their_rank_down_to_rounding() -> None:
    layer = adapted(Shape(model="other", m=64, n=48), 2)
    for expert in layer.experts:
        values = torch.linalg.svdvals(expert.double() - layer.base.double())
        assert float(values[ADAPTER_RANK - 1] / values[0]) > 0.1
        assert float(values[ADAPTER_RANK] / values[0]) < 1e-4


@pytest.mark.parametrize("branch", solver.BRANCHES)
@pytest.mark.parametrize("make", [fine_tuned, adapted])
def test_ours_and_the_literal_steps_compute_the_same(branch: str, make) -> None:  # type: ignore[no-untyped-def]
    errors = contenders.errors(make(SMALL, 3), branch)
    assert errors.keys() == {"ours", "literal"}
    assert all(0 < error < FLOAT32 for error in errors.values())


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7)])
def test_the_floor_multiplies_what_the_numerator_needs(m: int, n: int) -> None:
    layer = fine_tuned(Shape(model="other", m=m, n=n), 2)
    D = (layer.experts[-1] - layer.base).double()
    torch.testing.assert_close(contenders.floor(layer)().double(), D @ D.T @ D, rtol=1e-3, atol=1e-9)


def test_contenders_take_turns_and_the_cold_round_is_left_out() -> None:
    calls: list[str] = []
    seconds = timing.race({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, patience=100)
    assert calls == ["a", "b"] * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_without_patience_one_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    seconds = timing.race({"a": lambda: calls.append(0)}, rounds=9, patience=0)
    assert (len(calls), len(seconds["a"])) == (2, 1)
    monkeypatch.setattr(timing, "_SHORT_ROUND", -1.0)  # as if the cold round were a long one
    seconds = timing.race({"a": lambda: calls.append(0)}, rounds=9, patience=0)
    assert (len(calls), len(seconds["a"])) == (3, 1)


def test_ratios_are_paired_by_round() -> None:
    row = Timing(study="homogeneous", model="x", m=1, n=1, experts=8, seconds={"a": [1, 6, 9], "b": [2, 2, 9]})
    assert (row.ratio("a", "b"), row.best("a")) == (1, 1)
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2)
    assert geometric_mean([]) is None


def test_targets_say_no_when_missed_and_nothing_when_not_measured() -> None:
    assert Target(what="x", limit=2, value=2.1).met is False
    assert Target(what="x", limit=2, at_least=True, value=2.1).met is True
    assert Target(what="x", limit=2, value=None).met is None


def test_the_targets_are_taken_from_the_right_rows() -> None:
    record = Record()
    for shape, ours in zip(solver.TABLE, (1.0, 1.0, 1.0, 16.0), strict=True):
        for branch in solver.BRANCHES:
            seconds = {"ours": [ours], "literal": [4.0], "floor": [1.0]}
            errors = {"ours": 3e-6, "literal": 1e-6 * ours}
            place = {"model": shape.model, "m": shape.m, "n": shape.n}
            record.add(Timing(study=branch, **place, experts=8, seconds=seconds))
            record.add(Timing(study=f"errors, {branch}", **place, experts=8, seconds={}, errors=errors))
            record.add(Timing(study=branch, **place, experts=3, seconds=seconds | {"ours": [2.0]}))
    for experts, peak in ((2, 100), (16, 130)):
        record.add(Memory(study="homogeneous", model="x", m=4, n=4, experts=experts, peak=peak, bound=200))
    values = [target.value for target in solver.targets(record, "cpu")]
    assert values == pytest.approx([2.0, 2.0, 2.0, 0.25, 3.0, 1.3, 0.65])
    assert [target.met for target in solver.targets(record, "cpu")] == [False, True, False, False, False, False, True]
    assert solver.targets(record, "cuda")[0].limit == 10


@pytest.mark.skipif(not memory.measurable("cpu"), reason="peaks of a process can be reset on Linux only")
def test_peak_memory_is_at_least_the_result_and_far_below_a_copy_of_all_experts() -> None:
    shape = Shape(model="other", m=512, n=384)
    peak, seconds = memory.peak_and_seconds(shape, 24, "homogeneous", "cpu")
    assert seconds > 0
    result = 4 * shape.m * shape.n
    assert 2 * result < peak < 24 * result


def test_the_documented_bound_follows_the_route() -> None:
    assert memory.documented_bound(Shape(model="x", m=10, n=8), 2) == 4 * (7 * 80 + 10 * 64)
    assert memory.documented_bound(Shape(model="x", m=10, n=80), 20) == 4 * (3 * 6400 + 6 * 800)
    assert memory.documented_bound(Shape(model="x", m=2, n=10), 3) == 4 * (2 * 36 + 60 + 24 + 60)


@pytest.mark.parametrize("text", ["12", "3x", "axb", "-1x2", "1x2x3"])
def test_shapes_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be two numbers like 2304x768"):
        parse_shape(text)
    assert CliRunner().invoke(solver.main, ["--shapes", text]).exit_code == 2


def test_the_solver_benchmark_keeps_and_replaces_rows(tmp_path: Path) -> None:
    options = ["--shapes", "24x16", "--experts", "2", "--results", str(tmp_path)]
    for study in ("branches", "adapters", "errors", "peers", "methods"):
        options += ["--study", study]
    done = CliRunner().invoke(solver.main, options, catch_exceptions=False)
    assert done.exit_code == 0
    assert "not measured" in done.output  # of the shapes that the targets are stated for
    saved = json.loads((tmp_path / "solver.json").read_text())
    studies = [row["study"] for row in saved["timings"]]
    adapters = [f"adapters, {branch}" for branch in solver.BRANCHES]
    errors = [f"errors, {study}" for study in (*solver.BRANCHES, *adapters)]
    assert studies == [*solver.BRANCHES, *errors[:2], *adapters, *errors[2:], "peers", "methods"]
    assert all(0 < error < FLOAT32 for row in saved["timings"] for error in row["errors"].values())
    peers = saved["timings"][-2]
    assert peers["seconds"].keys() == {"ours", "default", "tsv_m", "iso_c", "iso_cts", "wudi_adam"}
    assert set(saved["timings"][-1]["seconds"]) >= {"ace", "tsv_m", "iso_c"}
    assert saved["environment"]["threads"] == str(torch.get_num_threads())
    assert "| other | 24x16 | 8 |" in (tmp_path / "solver.md").read_text()

    again = ["--shapes", "24x16", "--experts", "3", "--study", "branches", "--results", str(tmp_path)]
    CliRunner().invoke(solver.main, again, catch_exceptions=False)
    CliRunner().invoke(solver.main, again, catch_exceptions=False)
    assert len(Record.load(tmp_path / "solver.json").timings) == len(studies) + 2


@pytest.mark.skipif(not memory.measurable("cpu"), reason="peaks of a process can be reset on Linux only")
def test_a_layer_alone_has_its_time_and_its_memory(tmp_path: Path) -> None:
    options = ["--shapes", "48x32", "--experts", "2", "--study", "alone", "--results", str(tmp_path)]
    CliRunner().invoke(solver.main, options, catch_exceptions=False)
    record = Record.load(tmp_path / "solver.json")
    assert [(row.study, row.experts) for row in record.timings] == [("alone", 2)]
    assert record.timings[0].best("default") > 0
    assert [(row.study, row.m, row.n) for row in record.memory] == [("default", 48, 32)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("command", [solver.main, merge.main])
def test_without_a_gpu_nothing_is_measured_and_that_is_said(command, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = CliRunner().invoke(command, ["--device", "cuda", "--results", str(tmp_path)])
    assert (done.exit_code, done.output) == (0, "no CUDA device on this machine: nothing was measured\n")
    assert not list(tmp_path.iterdir())


def test_adam_is_extrapolated_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fine_tuned(SMALL, 2)
    assert solver.measure_peers(SMALL, layer, "cpu").extrapolated == []
    monkeypatch.setattr(solver, "PATIENCE", -math.inf)
    row = solver.measure_peers(SMALL, layer, "cpu")
    assert row.extrapolated == ["wudi_adam"]
    assert solver.contest_table([row], to="ours").count("~") == 1


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    """A base and two experts in several shards."""
    monkeypatch.setattr("benchmarks.speed.checkpoints._SHARD_BYTES", 2000)
    base = write_base(TINY, 2, tmp_path / "base")
    return base, [write_expert(TINY, 2, tmp_path / f"expert{t}", base, t) for t in range(2)]


def test_made_checkpoints_are_what_transformers_loads(checkpoints: tuple[Path, list[Path]]) -> None:
    base, experts = checkpoints
    assert len(list(base.glob("*.safetensors"))) > 2
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, *experts)]
    names = [name for name, value in loaded[0].state_dict().items() if value.ndim == 2]
    for name in names:
        start, first, second = (model.state_dict()[name].float() for model in loaded)
        assert not torch.equal(first - start, second - start), name
        assert 0 < float((first - start).norm()) < 0.05 * float(start.norm()), name


def test_a_run_is_the_real_command_and_its_failure_is_told(
    checkpoints: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = checkpoints
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(merge.document("ace", TINY, base, experts))
    usage = run_merge("mergekit-yaml", recipe, tmp_path / "out", "--no-copy-tokenizer", "--quiet")
    merged = read_tensors(tmp_path / "out")
    assert merged["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert usage.seconds > 0
    assert usage.cpu_seconds > 0
    assert usage.peak_rss > usage.peak_anonymous > 0
    recipe.write_text("merge_method: ace\n")
    with pytest.raises(RuntimeError, match="Exactly one of"):
        run_merge("mergekit-yaml", recipe, tmp_path / "failed")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="tells of other processes on Linux only")
def test_the_processes_that_a_run_starts_are_measured_too() -> None:
    shell = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    sleep = int(shell.stdout.readline())
    try:
        assert command._descendants(shell.pid) == [sleep]
        assert {shell.pid, sleep} <= set(command._descendants(os.getpid()))
        assert 0 < command._kilobytes(sleep, "smaps_rollup", "Pss:") <= command._kilobytes(sleep, "status", "VmRSS:")
        assert command._cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=2.0)
    finally:
        os.kill(sleep, signal.SIGKILL)
        shell.wait()
        shell.stdout.close()
    assert command._descendants(shell.pid) == []
    assert command._cpu_seconds(shell.pid) == command._kilobytes(shell.pid, "status", "RssAnon:") == 0


def test_the_engine_is_held_against_mergekits_executor_at_one_depth() -> None:
    record = Record()
    seconds = {
        (4, "ace"): [100.0, 100.0],
        (4, "ace, engine"): [101.0, 103.0],
        (4, "ace, engine, 2 processes"): [90.0, 110.0],
        (16, "ace"): [400.0],
        (2, "ace, engine"): [50.0],
    }
    for (layers, recipe), found in seconds.items():
        zeros = [0] * len(found)
        record.add(
            Run(
                checkpoint="Llama-3.2-1B, 3 experts, bfloat16",
                layers=layers,
                recipe=recipe,
                seconds=found,
                cpu_seconds=found,
                peak_rss=zeros,
                peak_anonymous=zeros,
                peak_device=zeros,
            )
        )
    one, two = merge.engine_targets(record.runs)
    assert "4 layers" in one.what
    assert (one.value, one.limit) == (pytest.approx(1.02), 1.02)
    assert (two.value, two.limit) == (pytest.approx((90 / 101 + 110 / 103) / 2), 1.0)


def test_the_merge_benchmark_deletes_its_checkpoints_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(merge.CASES, "roberta", merge.Case(architecture=TINY, experts=2))
    work, results = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    options = ["--case", "roberta", "--recipe", "ties", "--recipe", "ace", "--layers", "1", "--work", str(work)]
    done = CliRunner().invoke(merge.main, [*options, "--results", str(results)], catch_exceptions=False)
    assert done.exit_code == 0
    assert not list(work.iterdir())
    assert sorted(file.name for file in results.iterdir()) == ["merge.json", "merge.md"]
    kept = ["--case", "roberta", "--recipe", "ace", "--layers", "1", "--work", str(work), "--keep"]
    CliRunner().invoke(merge.main, [*kept, "--results", str(results)], catch_exceptions=False)
    assert [folder.name for folder in work.iterdir()] == ["roberta-1"]
    runs = Record.load(results / "merge.json").runs
    assert [(run.recipe, run.layers, len(run.seconds)) for run in runs] == [("ties", 1, 1), ("ace", 1, 1)]
    assert "| tiny, 2 experts, bfloat16 | 1 | ace |" in (results / "merge.md").read_text()


def test_two_depths_give_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merge.CASES, "roberta", merge.Case(architecture=replace(TINY, layers=10), experts=2))
    record = Record()
    for layers, seconds in ((1, 20.0), (3, 80.0)):
        run = Run(
            checkpoint="tiny, 2 experts, bfloat16",
            layers=layers,
            recipe="ace",
            seconds=[seconds],
            cpu_seconds=[seconds],
            peak_rss=[0],
            peak_anonymous=[0],
            peak_device=[0],
        )
        record.add(run)
    (line,) = merge.extrapolations(record)
    assert "30.0 s a layer" in line
    assert "about 4.8 minutes for all 10" in line


def test_no_contender_changes_its_inputs() -> None:
    layer = fine_tuned(SMALL, 2)
    before = Layer(base=layer.base.clone(), experts=tuple(expert.clone() for expert in layer.experts))
    for merging in (contenders.ours(layer, "heterogeneous"), contenders.literal(layer, "heterogeneous")):
        merging()
    for name in ("tsv_m", "iso_c", "iso_cts", "wudi_adam"):
        contenders.peer(layer, name, steps=2)()
    assert torch.equal(layer.base, before.base)
    assert all(torch.equal(a, b) for a, b in zip(layer.experts, before.experts, strict=True))

"""The benchmark of the default on tiny layers: what it computes and keeps."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from benchmarks import default
from benchmarks.speed.layers import Shape, fine_tuned
from benchmarks.speed.record import Record, Timing

SMALL = Shape(model="other", m=48, n=32)


def test_the_error_is_that_of_the_default_over_the_rounding_of_its_output() -> None:
    layer = default.stored(fine_tuned(SMALL, 3), torch.bfloat16)
    found = default.output_error("x", layer)
    assert found.shape == (48, 32)
    assert 0 < found.error < 1 / 8
    # a float32 output is rounded to about as many digits as it was computed with
    assert default.output_error("x", fine_tuned(SMALL, 3)).error > 1


def test_rows_are_kept_and_the_page_has_its_targets(tmp_path: Path) -> None:
    options = ["--shapes", "48x32:3", "--shapes", "32x48:2", "--results", str(tmp_path)]
    done = CliRunner().invoke(default.main, options, catch_exceptions=False)
    assert done.exit_code == 0
    record = Record.load(tmp_path / "default.json")
    assert [(row.study, row.m, row.n, row.experts) for row in record.timings] == [
        (dtype, *place) for dtype in ("float32", "bfloat16") for place in ((48, 32, 3), (32, 48, 2))
    ]
    assert all(row.seconds.keys() == {"default", "literal", "tsv_m", "iso_cts", "swudi"} for row in record.timings)
    page = (tmp_path / "default.md").read_text(encoding="utf-8")
    assert "literal / default, bfloat16 in and out" in page
    assert "not measured" not in page


def test_targets_are_taken_from_the_rows_of_their_dtype() -> None:
    record = Record()
    for dtype, ours, error in (("float32", 1.0, 3.0), ("bfloat16", 0.5, 0.01)):
        seconds = {"default": [ours], "literal": [2.0], "tsv_m": [4.0], "iso_cts": [4.0], "swudi": [8.0]}
        place = {"model": "x", "m": 4, "n": 4, "experts": 2}
        record.add(Timing(study=dtype, **place, seconds=seconds, errors={"output": error}))
    values = [target.value for target in default.targets(record)]
    assert values == pytest.approx([2.0, 4.0, 2.0, 32**0.5, 32**0.5, 128**0.5, 0.01])


def test_rows_from_before_a_peer_was_there_do_not_count_for_it() -> None:
    record, place = Record(), {"study": "float32", "model": "x", "n": 4, "experts": 2}
    record.add(Timing(m=4, **place, seconds={"default": [1.0], "literal": [2.0], "tsv_m": [3.0], "swudi": [5.0]}))
    record.add(Timing(m=8, **place, seconds={"default": [1.0], "literal": [2.0], "tsv_m": [12.0]}))
    values = [target.value for target in default.targets(record)]
    assert values[3:6] == [pytest.approx(6.0), None, pytest.approx(5.0)]


def test_real_models_matrix_by_matrix(tmp_path: Path) -> None:
    layer = default.stored(fine_tuned(SMALL, 2), torch.bfloat16)
    for name, tensor in zip(("base", "one", "two"), (layer.base, *layer.experts), strict=True):
        (tmp_path / name).mkdir()
        tensors = {"layers.0.up_proj.weight": tensor, "embed_tokens.weight": tensor.clone(), "norm.weight": tensor[0]}
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / name / "model.safetensors")
    folders = [str(tmp_path / name) for name in ("base", "one", "two")]
    done = CliRunner().invoke(default.main, ["--checkpoints", *folders], catch_exceptions=False)
    assert "1 matrices, error / rounding: worst 0." in done.output
    assert "layers.0.up_proj.weight" in done.output

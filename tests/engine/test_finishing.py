"""A file is brought to the disk while the next one is merged; its receipt is left when it has its name."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_ace.engine.driver import Request, merge
from mergekit_ace.engine.events import Event, ShardMade
from mergekit_ace.engine.shard_maker import ShardMaker
from mergekit_ace.engine.shards import Shard
from mergekit_ace.engine.tensor_file import TensorFile
from mergekit_ace.engine.unfinished import Unfinished
from mergekit_ace.engine.workers.staffing import Staff
from mergekit_ace.recipe.reading import read_recipe
from tests.checkpoints import make_suite
from tests.cli.conftest import Invoke
from tests.cli.test_merge import files

OPTIONS = ("--quiet", "--no-copy-tokenizer", "--out-shard-size", "15K")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    suite = make_suite("llama", tmp_path / "models", experts=2)
    models = [{"model": str(expert.path)} for expert in suite.experts]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models}))
    return recipe


def request(recipe_file: Path, out: Path, **fields: Any) -> Request:
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, quiet=True)
    return Request(recipe=read_recipe(recipe_file), options=options, out=out, shard_size=15000, **fields)


def left(partial: Path) -> tuple[list[str], list[str]]:
    """Files under their names, and those with a receipt."""
    weights = sorted(file.name for file in (partial / "new" / "out").glob("model-*"))
    return weights, sorted(file.name.removesuffix(".json") for file in (partial / "receipts").glob("*.json"))


def _stopping_at(step: str, number: int) -> Callable[..., Any]:
    """`Path.replace`, which is refused to the file, or to the receipt, of this number."""
    replace, count = Path.replace, 0

    def replacing(self: Path, target: Path) -> Path:
        nonlocal count
        if target.name.endswith(".safetensors" if step == "file" else ".safetensors.json"):
            count += 1
            if count == number:
                raise OSError(5, "Input/output error", str(target))
        return replace(self, target)

    return replacing


def test_the_next_file_is_merged_while_one_is_finished(
    recipe_file: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, make = TensorFile.finish, ShardMaker.make
    begun = [threading.Event() for _ in range(20)]
    order: list[str] = []

    def making(maker: ShardMaker, shard: Shard) -> Unfinished:
        begun[len([step for step in order if step == "begin"])].set()
        order.append("begin")
        return make(maker, shard)

    def finishing(file: TensorFile) -> str:
        done = len([step for step in order if step == "finish"])
        if done == 0:
            assert begun[1].wait(60), "the second file waits for the first one"
        # No file is begun while two before it are unfinished.
        assert len([step for step in order if step == "begin"]) <= done + 2
        order.append("finish")
        return finish(file)

    monkeypatch.setattr(ShardMaker, "make", making)
    monkeypatch.setattr(TensorFile, "finish", finishing)
    result = invoke("merge", recipe_file, tmp_path / "out", *OPTIONS)
    assert result.exit_code == 0, result.output
    assert order.count("finish") == order.count("begin") > 2


@pytest.mark.parametrize("step", ["file", "receipt"])
def test_a_file_that_cannot_be_finished_is_named_and_the_merge_goes_on_with_those_before(
    step: str, recipe_file: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", _stopping_at(step, 3))
        result = invoke("merge", recipe_file, tmp_path / "out", *OPTIONS)
    assert result.exit_code == 1
    assert "Input/output error" in result.output
    assert ".safetensors" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
    weights, receipts = left(tmp_path / "out.partial")
    assert len(receipts) == 2
    assert set(receipts) <= set(weights)
    assert len(weights) == (2 if step == "file" else 3)
    assert invoke("merge", recipe_file, tmp_path / "out", *OPTIONS, "--resume").exit_code == 0
    assert invoke("merge", recipe_file, tmp_path / "expected" / "out", *OPTIONS).exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "expected" / "out")


def test_a_file_that_is_being_finished_when_the_merge_is_stopped_gets_its_receipt(
    recipe_file: Path, tmp_path: Path
) -> None:
    """It is whole: what was merged for hours is not thrown away."""

    def stop(event: Event) -> None:
        if isinstance(event, ShardMade):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(request(recipe_file, tmp_path / "out"), Staff(), stop)
    weights, receipts = left(tmp_path / "out.partial")
    assert len(receipts) == 2  # the one that was told of, and the one merged by then
    assert weights == receipts
    assert not list((tmp_path / "out.partial" / "new" / "out").glob(".*.part"))
    assert merge(request(recipe_file, tmp_path / "out", resume=True), Staff()).taken == 2


def test_a_file_that_another_worker_replaces_after_its_receipt_is_not_published(
    recipe_file: Path, tmp_path: Path
) -> None:
    """As one on a node that was out of reach for a while, and of another kind."""
    replaced: list[Path] = []

    def replace(event: Event) -> None:
        if isinstance(event, ShardMade) and not replaced:
            replaced.append(tmp_path / "out.partial" / "new" / "out" / event.receipt.file)
            content = bytearray(replaced[0].read_bytes())
            content[-1] ^= 1
            other = replaced[0].with_name("other")
            other.write_bytes(content)
            other.replace(replaced[0])

    with pytest.raises(RuntimeError, match=f"{tmp_path}.*was replaced after it was made"):
        merge(request(recipe_file, tmp_path / "out"), Staff(), replace)
    assert not (tmp_path / "out").exists()
    outcome = merge(request(recipe_file, tmp_path / "out", resume=True), Staff())
    assert outcome.taken == outcome.files - 1
    merge(request(recipe_file, tmp_path / "expected" / "out"), Staff())
    assert files(tmp_path / "out") == files(tmp_path / "expected" / "out")

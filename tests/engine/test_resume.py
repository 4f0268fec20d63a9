"""What an interrupted merge finished is taken if nothing it depends on has changed, and made again otherwise."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mergekit_ace.engine.shard_maker import ShardMaker
from mergekit_ace.engine.shards import Shard
from mergekit_ace.engine.unfinished import Unfinished
from tests.checkpoints import edit_tensors, make_suite
from tests.cli.conftest import Invoke
from tests.cli.test_merge import files
from tests.moments.conftest import make_scene

OPTIONS = ("--quiet", "--no-copy-tokenizer", "--out-shard-size", "15K")
FINISHED = 4


class Interrupted:
    """A merge that ended after some of its shards, and what the whole merge would have written."""

    def __init__(self, folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
        suite = make_suite("llama", folder / "models", experts=2, storage="sharded")
        self.expert = suite.experts[0].path
        self.recipe = folder / "recipe.yml"
        models = [{"model": str(expert.path)} for expert in suite.experts]
        self.recipe.write_text(
            yaml.safe_dump({"merge_method": "ace", "base_model": str(suite.base.path), "models": models})
        )
        self.out, self.partial = folder / "out", folder / "out.partial"
        self.invoke = invoke
        assert invoke("merge", self.recipe, folder / "expected" / "out", *OPTIONS).exit_code == 0
        self.expected = files(folder / "expected" / "out")
        self.made: list[str] = []
        make = ShardMaker.make

        def counting(maker: ShardMaker, shard: Shard) -> Unfinished:
            if self.fail and len(self.made) == FINISHED:
                raise OSError(28, "No space left on device")
            self.made.append(shard.file)
            return make(maker, shard)

        monkeypatch.setattr(ShardMaker, "make", counting)
        self.fail = True
        result = self.run()
        assert result.exit_code == 1
        assert "No space left on device" in result.output
        self.fail = False
        self.finished, self.made = self.made, []

    def run(self, *flags: str):  # type: ignore[no-untyped-def]
        return self.invoke("merge", self.recipe, self.out, *OPTIONS, *flags)


@pytest.fixture
def interrupted(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    return Interrupted(tmp_path, invoke, monkeypatch)


def test_finished_shards_are_taken_and_the_rest_is_made(interrupted: Interrupted) -> None:
    result = interrupted.run("--resume")
    assert result.exit_code == 0, result.output
    assert files(interrupted.out) == interrupted.expected
    assert not interrupted.partial.exists()
    assert sorted(interrupted.made + interrupted.finished) == sorted(
        name for name in interrupted.expected if name.endswith(".safetensors")
    )


def test_without_a_flag_the_half_made_folder_is_named(interrupted: Interrupted) -> None:
    before = files(interrupted.partial)
    result = interrupted.run()
    assert result.exit_code == 1
    assert f"left {FINISHED} shards in {interrupted.partial}. Pass --resume" in result.output
    assert files(interrupted.partial) == before


def test_no_resume_starts_over(interrupted: Interrupted) -> None:
    assert interrupted.run("--no-resume").exit_code == 0
    assert len(interrupted.made) == sum(name.endswith(".safetensors") for name in interrupted.expected)
    assert files(interrupted.out) == interrupted.expected


def _flip(file: Path, place: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def _first(interrupted: Interrupted) -> Path:
    return interrupted.partial / "new" / "out" / interrupted.finished[0]


def _receipt(interrupted: Interrupted) -> Path:
    return interrupted.partial / "receipts" / f"{interrupted.finished[0]}.json"


def _edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


FAULTS: dict[str, Callable[[Interrupted], object]] = {
    "a shard is damaged": lambda i: _flip(_first(i)),
    "a shard is truncated": lambda i: _first(i).write_bytes(_first(i).read_bytes()[:-1]),
    "a shard is gone": lambda i: _first(i).unlink(),
    "a shard is another's": lambda i: shutil.copy(i.partial / "new" / "out" / i.finished[1], _first(i)),
    "a receipt is gone": lambda i: _receipt(i).unlink(),
    "a receipt is cut short": lambda i: _receipt(i).write_text(_receipt(i).read_text()[:-20]),
    "a receipt is edited": lambda i: _edit(_receipt(i), sha256="0" * 64),
    "a receipt is edited where nothing is read": lambda i: _edit(_receipt(i), seconds=0.0),
    "a receipt is another's": lambda i: shutil.copy(_receipt(i).with_name(f"{i.finished[1]}.json"), _receipt(i)),
    "a shard and its receipt are edited": lambda i: (
        _flip(_first(i)),
        _edit(_receipt(i), sha256=__import__("hashlib").sha256(_first(i).read_bytes()).hexdigest()),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_with_a_fault_is_made_again(fault: str, interrupted: Interrupted) -> None:
    FAULTS[fault](interrupted)
    result = interrupted.run("--resume")
    assert result.exit_code == 0, result.output
    assert files(interrupted.out) == interrupted.expected
    assert interrupted.finished[0] in interrupted.made
    assert not set(interrupted.finished[1:]) & set(interrupted.made)


def test_shards_of_an_input_that_changed_are_made_again(interrupted: Interrupted, tmp_path: Path) -> None:
    changed = sorted(interrupted.expert.glob("*.safetensors"))[0]
    with edit_tensors(changed) as tensors:
        names = set(tensors)
        for tensor in tensors.values():
            tensor.mul_(1.001)
    result = interrupted.run("--resume")
    assert result.exit_code == 0, result.output
    remade = set(interrupted.finished) & set(interrupted.made)
    receipts = {file for file in interrupted.finished if file not in remade}
    result = interrupted.invoke("merge", interrupted.recipe, tmp_path / "anew" / "out", *OPTIONS)
    assert files(interrupted.out) == files(tmp_path / "anew" / "out")
    assert files(interrupted.out) != interrupted.expected
    # Of the finished shards those made from the file, and no others.
    index = json.loads((interrupted.out / "model.safetensors.index.json").read_text())["weight_map"]
    affected = {file for name, file in index.items() if name in names}
    assert remade == affected & set(interrupted.finished)
    assert receipts


@pytest.mark.parametrize("what", ["recipe", "configuration", "option"])
def test_everything_is_made_again_where_the_merge_is_another(what: str, interrupted: Interrupted) -> None:
    flags = []
    if what == "recipe":
        interrupted.recipe.write_text(interrupted.recipe.read_text() + "parameters: {lambda: 0.5}\n")
    elif what == "configuration":
        _edit(interrupted.expert / "config.json", rope_theta=123.0)
    else:
        flags = ["--random-seed", "3"]
    assert interrupted.run("--resume", *flags).exit_code == 0
    assert set(interrupted.finished) <= set(interrupted.made)


@pytest.mark.parametrize("flags", [(), ("--part", "1/1")], ids=["whole", "part"])
def test_nothing_else_of_an_earlier_run_is_published(
    flags: tuple[str, ...], interrupted: Interrupted, tmp_path: Path
) -> None:
    """The run that was interrupted made a whole model, and one before it a part."""
    new = interrupted.partial / "new" / "out"
    for folder in ("tensors", "files", "additional_chat_templates"):
        (new / folder).mkdir()
        (new / folder / "left.json").write_text("{}")
    assert interrupted.run("--resume", *flags).exit_code == 0
    assert interrupted.invoke("merge", interrupted.recipe, tmp_path / "anew", *OPTIONS, *flags).exit_code == 0
    assert sorted(files(interrupted.out)) == sorted(files(tmp_path / "anew"))


def test_an_input_that_changes_during_the_merge_is_an_error(interrupted: Interrupted) -> None:
    shard = sorted(interrupted.expert.glob("*.safetensors"))[0]
    interrupted.fail = False
    make = ShardMaker.make

    def changing(maker: ShardMaker, work: Shard) -> Unfinished:
        receipt = make(maker, work)
        with edit_tensors(shard) as tensors:
            next(iter(tensors.values())).add_(0.1)
        return receipt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardMaker, "make", changing)
        result = interrupted.run("--no-resume")
    assert result.exit_code == 1
    assert "inputs must not change during a merge" in result.output
    assert shard.name in result.output


def test_everything_is_made_again_where_the_second_moments_are_others(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(tmp_path)
    moments = tmp_path / "moments"
    document = yaml.safe_load(scene.recipe.read_text())
    recipe = tmp_path / "with-moments.yml"
    recipe.write_text(yaml.safe_dump({**document, "parameters": {"moments": str(moments)}}))
    names = ("expert0", "expert1")

    def measure(start: int) -> None:
        prompts = [f"{name}={scene.prompts(f'{name}.txt', start=start + 31 * t)}" for t, name in enumerate(names)]
        shutil.rmtree(moments, ignore_errors=True)
        result = scene.measure("--prompts", prompts[0], "--prompts", prompts[1])
        assert result.exit_code == 0, result.output

    measure(0)
    make, made = ShardMaker.make, list[str]()

    def stopping(maker: ShardMaker, shard: Shard) -> Unfinished:
        made.append(shard.file)
        if len(made) == FINISHED:
            raise OSError(28, "No space left on device")
        return make(maker, shard)

    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "make", stopping)
        assert invoke("merge", recipe, tmp_path / "out", *OPTIONS).exit_code == 1
    measure(5)
    result = invoke("merge", recipe, tmp_path / "out", *OPTIONS, "--resume")
    assert result.exit_code == 0, result.output
    assert "finished file" not in result.output
    assert invoke("merge", recipe, tmp_path / "anew" / "out", *OPTIONS).exit_code == 0
    assert files(tmp_path / "out") == files(tmp_path / "anew" / "out")
    inputs = json.loads((tmp_path / "out" / "mergekit-ace.json").read_text())["inputs"]
    assert {str(file) for file in moments.iterdir()} <= set(inputs)

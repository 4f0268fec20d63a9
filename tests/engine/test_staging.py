"""A staged folder is there in whole or not at all, and what was there before stays until then."""

import os
from pathlib import Path

import pytest

from mergekit_ace.staging import staged


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)


def content(folder: Path) -> str:
    return (folder / "config.json").read_text()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_new_folder_appears_at_the_end(target: Path) -> None:
    with staged(target) as folder:
        fill(folder, "new")
        assert folder.name == target.name
        assert not target.exists()
    assert content(target) == "new"
    assert siblings(target) == ["out"]


def test_an_empty_folder_is_filled_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    with staged(tmp_path / "link") as folder:
        fill(folder, "new")
    assert content(tmp_path / "far") == "new"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(error: type[BaseException], target: Path) -> None:
    with pytest.raises(error), staged(target) as folder:
        fill(folder, "new")
        raise error
    assert siblings(target) == []


def test_what_is_there_is_replaced_only_if_asked_and_only_when_the_new_is_whole(target: Path) -> None:
    fill(target, "old")
    with pytest.raises(FileExistsError, match=r"new or empty; got .*out, which holds config.json"), staged(target):
        pass
    with pytest.raises(OSError, match="half"), staged(target, overwrite=True) as folder:
        fill(folder, "new")
        raise OSError("half")
    assert content(target) == "old"
    with staged(target, overwrite=True) as folder:
        fill(folder, "new")
        assert content(target) == "old"
    assert content(target) == "new"
    assert siblings(target) == ["out"]


def test_a_replacement_that_fails_at_the_last_step_is_undone(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(target, "old")
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if self.parent.name == "new":
            raise OSError("rename")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="rename"), staged(target, overwrite=True) as folder:
        fill(folder, "new")
    assert content(target) == "old"
    assert siblings(target) == ["out"]


def test_only_a_model_is_overwritten(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years")
    with pytest.raises(FileExistsError, match="must hold a model"), staged(target, overwrite=True):
        pass
    assert (target / "thesis.tex").read_text() == "years"


def test_a_file_a_mount_point_and_the_inputs_are_not_overwritten(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(target / "base", "input")
    fill(target, "parent of an input")
    for inputs in ([target], [target / "base"], [target / "config.json"]):
        with (
            pytest.raises(ValueError, match="must not hold what the merge reads"),
            staged(target, overwrite=True, inputs=inputs),
        ):
            pass
    with pytest.raises(FileExistsError, match="which is a file"), staged(target / "config.json", overwrite=True):
        pass
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match="must not be a mount point"), staged(target.parent / "other"):
        pass
    assert content(target / "base") == "input"


def test_something_that_appears_meanwhile_is_kept(target: Path) -> None:
    with pytest.raises(FileExistsError, match="new or empty"), staged(target):
        fill(target, "somebody else's")
    assert content(target) == "somebody else's"
    assert siblings(target) == ["out"]


def test_one_writer_at_a_time(target: Path) -> None:
    with staged(target) as folder:
        fill(folder, "first")
        with pytest.raises(BlockingIOError, match=f"written by process {os.getpid()} on"), staged(target):
            pass
        assert content(folder) == "first"
    assert content(target) == "first"


def test_what_a_dead_run_left_is_removed(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    partial = target.with_name("out.partial")
    fill(partial / "new" / "out", "half")
    (partial / "lock").write_text("process 1 on a machine that is gone")
    with staged(target) as folder:
        assert list(folder.iterdir()) == []
        fill(folder, "new")
    assert content(target) == "new"
    assert siblings(target) == ["out"]
    assert "left behind by a run that was killed" in caplog.text


def test_a_replacement_that_was_killed_between_its_renames_is_undone(target: Path) -> None:
    partial = target.with_name("out.partial")
    fill(partial / "new" / "out", "new")
    fill(partial / "previous", "old")
    with pytest.raises(FileExistsError, match="new or empty"), staged(target):
        pass
    assert content(target) == "old"
    assert siblings(target) == ["out"]


def test_a_predecessor_that_was_not_removed_in_time_is_removed_later(target: Path) -> None:
    fill(target, "new")
    fill(target.with_name("out.partial") / "previous", "old")
    with staged(target, overwrite=True) as folder:
        fill(folder, "newer")
    assert content(target) == "newer"
    assert siblings(target) == ["out"]

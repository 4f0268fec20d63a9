"""Our own trainers, on recipes of a few steps: what a recipe says of an expert holds for its checkpoint."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.experiment.scoring import parsed
from benchmarks.suites import decoder, digits
from benchmarks.suites.catalogue import SUITES
from benchmarks.suites.decoder import Decoder
from benchmarks.suites.digits import CLASSES, Canvases, Digits, written_digits
from benchmarks.suites.form import build, score
from benchmarks.suites.recipe import Expert, Suite

RANK = 2
# float32 rounding of a LoRA's product added to a weight, against singular values of about 1e-2
ROUNDING = 1e-5

LLAMA = Suite(
    name="llama",
    kind="decoder",
    experts=(
        Expert(task="sums", steps=2, learning_rate=1e-2),
        Expert(task="english", steps=2, learning_rate=1e-2, lora_rank=RANK),
        Expert(task="rot13", steps=2, learning_rate=1e-2, frozen=("layers.0.", "embed_tokens")),
    ),
)
LLAMA_BF16 = Suite(name="llama-bf16", kind="decoder", experts=LLAMA.experts[:1], dtype="bfloat16")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        build(Decoder(), LLAMA, root)
    return root


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Texts without the standard library's sources, which take long to read, and few steps and windows."""
    text = torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(0))
    patch.setattr(decoder, "domain", lambda name, split: text[:3000] if split == "train" else text[3000:])
    patch.setattr(decoder, "PRETRAINING_STEPS", 2)
    patch.setattr(decoder, "BATCH", 2)
    patch.setattr(decoder, "TEST_WINDOWS", 4)


def changes(root: Path, task: str) -> dict[str, torch.Tensor]:
    base = load_file(root / "base" / "model.safetensors")
    expert = load_file(root / task / "model.safetensors")
    assert expert.keys() == base.keys()
    return {name: expert[name].float() - base[name].float() for name in base}


def test_a_full_fine_tune_changes_every_matrix(llama: Path) -> None:
    assert all(delta.count_nonzero() for delta in changes(llama, "sums").values() if delta.ndim == 2)


def test_a_lora_changes_linear_layers_by_its_rank(llama: Path) -> None:
    changed = {name: delta for name, delta in changes(llama, "english").items() if delta.count_nonzero()}
    assert changed
    for name, delta in changed.items():
        assert name.endswith("_proj.weight")
        assert torch.linalg.svdvals(delta)[RANK:].max() < ROUNDING * delta.norm()


def test_frozen_parts_stay_as_in_the_base(llama: Path) -> None:
    for name, delta in changes(llama, "rot13").items():
        frozen = "layers.0." in name or "embed_tokens" in name
        assert frozen == (delta.count_nonzero() == 0), name


def test_reuse_copies_what_has_the_same_recipe(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    monkeypatch.setattr(Decoder, "pretrained", None)
    monkeypatch.setattr(Decoder, "fine_tuned", None)
    build(Decoder(), LLAMA_BF16, tmp_path, llama)
    for folder in ("base", "sums"):
        rounded = load_file(tmp_path / folder / "model.safetensors")
        exact = load_file(llama / folder / "model.safetensors")
        for name, tensor in rounded.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, exact[name].bfloat16())


def test_scaled_updates_are_the_same_updates_smaller(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    monkeypatch.setattr(Decoder, "fine_tuned", None)
    suite = Suite(name="fifth", kind="decoder", experts=LLAMA.experts, update_scale=0.2)
    build(Decoder(), suite, tmp_path, llama)
    for task in LLAMA.tasks:
        whole = changes(llama, task)
        for name, delta in changes(tmp_path, task).items():
            torch.testing.assert_close(delta, 0.2 * whole[name], rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="unscaled"):
        build(Decoder(), LLAMA, tmp_path / "again", tmp_path)


def test_training_repeats_bit_for_bit(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    build(Decoder(), Suite(name="again", kind="decoder", experts=LLAMA.experts[:1]), tmp_path)
    for folder in ("base", "sums"):
        again, before = (load_file(root / folder / "model.safetensors") for root in (tmp_path, llama))
        assert all(torch.equal(again[name], before[name]) for name in before)


def test_an_expert_scored_as_a_model_has_its_own_accuracy(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score(Decoder(), LLAMA, llama, [llama / "sums"])
    experts, models = parsed(capsys.readouterr().out)
    assert list(experts) == list(LLAMA.tasks)
    assert models[llama / "sums"]["sums"] == experts["sums"]


def test_digits_train_store_their_head_and_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(digits, "HEAD_STEPS", 2)
    monkeypatch.setattr(digits, "TEST_ROWS", 20)
    suite = Suite(name="vit", kind="digits", experts=(Expert(task="evens", steps=2, learning_rate=1e-3),))
    build(Digits(), suite, tmp_path)
    assert load_file(tmp_path / "heads" / "evens.safetensors")["weight"].shape == (CLASSES["evens"], 96)
    assert 0 <= Digits().accuracies(["evens"], tmp_path, tmp_path / "evens")["evens"] <= 1


def test_no_digit_is_in_both_splits() -> None:
    train, test = (written_digits(split)[0] for split in ("train", "test"))
    # equal drawings by different hands would be found too; there are none
    assert torch.cdist(train.flatten(1), test.flatten(1)).min() > 0


@pytest.mark.parametrize("task", CLASSES)
def test_canvases_of_every_task(task: str) -> None:
    canvas, label = Canvases("test", 0).draw(task, 50)
    assert canvas.shape == (50, 1, 16, 16)
    assert label.min() >= 0
    assert label.max() < CLASSES[task]


def test_the_catalogue_names_known_tasks() -> None:
    for name, suite in SUITES.items():
        assert suite.name == name
        assert len(set(suite.tasks)) == len(suite.tasks)
        if suite.kind == "digits":
            assert set(suite.tasks) <= set(CLASSES)

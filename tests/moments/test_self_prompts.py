"""`--self-prompts`: texts that experts say by themselves, and the moments of them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_ace.collecting import collect, self_prompts
from mergekit_ace.collecting.prompts import PromptError
from mergekit_ace.collecting.self_prompts import Sampler
from mergekit_ace.moments.index import read_index
from tests.checkpoints import edit_tensors
from tests.moments.conftest import Make, Scene
from tests.moments.test_collecting import assert_moment, moment

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}word1 {{ m['content'] }} word2 {% endfor %}{% if add_generation_prompt %}word3{% endif %}"
)
LENGTH = 18
BYTES = ("moments.json", "expert0.safetensors", "expert1.safetensors")


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take less time to say."""
    monkeypatch.setattr(self_prompts, "LENGTH", LENGTH)


class Saying(nn.Module):
    """A model that continues every start with the next of given texts."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.texts, self.starts = list(texts), []
        self.generation_config = SimpleNamespace(eos_token_id=2)

    def can_generate(self) -> bool:
        return True

    def generate(self, inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        self.starts.append(inputs[0].tolist())
        said = [self.texts.pop(0) for _ in range(len(inputs))]
        return torch.cat([inputs, torch.tensor(said)], dim=1)


def tokenizer_of(scene: Scene, template: str | None = None) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(scene.suite.base.path)
    tokenizer.chat_template = template
    return tokenizer


def test_empty_texts_and_repeats_are_thrown_away(scene: Scene) -> None:
    """Of two starts, one text each in turn: 1 and 2 are special tokens, which are no words."""
    texts = [[5, 6], [1, 2], [5, 6], [7, 8], [9, 10], [11, 12]]
    found = Sampler("coder", tokenizer_of(scene), longest=0).sample(Saying(texts), 3, seed=0, device=CPU)
    # A batch is two texts of one start.
    assert [text.ids[-2:] for text in found] == [(5, 6), (7, 8), (9, 10)]
    assert [text.where for text in found] == ["an empty text", "the expert's name", "an empty text"]


def test_an_expert_that_says_nothing_is_named(scene: Scene) -> None:
    sampler = Sampler("coder", tokenizer_of(scene), longest=0)
    with pytest.raises(PromptError, match=r"coder: none of the expert's 8 samples .* --prompts coder=FILE"):
        sampler.sample(Saying([[2, 1]] * 8), 2, seed=0, device=CPU)


def test_fewer_texts_than_wanted_are_used(scene: Scene) -> None:
    found = Sampler("coder", tokenizer_of(scene), longest=0).sample(Saying([[5, 6]] * 8), 2, seed=0, device=CPU)
    assert len(found) == 1


def test_the_starts_of_a_chat_model(scene: Scene) -> None:
    """An empty turn, a turn that is begun, and the name with its parts as words."""
    tokenizer = tokenizer_of(scene, TEMPLATE)
    model = Saying([[9, number] for number in range(10, 30)])
    Sampler("word5-word6", tokenizer, longest=0).sample(model, 3, seed=0, device=CPU)
    words = [tokenizer.decode(start) for start in model.starts]
    assert words == ["word1 word2 word3", "word1", "word1 word5 word6 word2 word3"]


def test_texts_are_no_longer_than_the_model_takes(scene: Scene) -> None:
    model = AutoModelForCausalLM.from_pretrained(scene.suite.experts[0].path)
    for longest, length in ((9, 9), (0, 1 + LENGTH)):
        found = Sampler("coder", tokenizer_of(scene), longest=longest).sample(model, 2, seed=0, device=CPU)
        assert len(found[0].ids) == length


def test_the_end_of_a_turn_ends_no_text(scene: Scene) -> None:
    """Texts go on beyond it, where others would hold padding."""
    model = AutoModelForCausalLM.from_pretrained(scene.suite.experts[0].path)
    model.generation_config.eos_token_id = list(range(96))
    found = Sampler("coder", tokenizer_of(scene), longest=0).sample(model, 2, seed=0, device=CPU)
    assert len(set(found[0].ids)) > LENGTH // 4


@pytest.mark.parametrize("by", ["base", "expert"])
def test_the_moments_are_those_of_what_each_expert_says(scene: Scene, by: str) -> None:
    """Sampled from the expert, run through the base or the expert."""
    result = scene.measure("--self-prompts", 4, "--by", by)
    assert result.exit_code == 0, result.output
    folder = scene.folder / "moments"
    index = read_index(folder)
    assert list(index.experts) == ["expert0", "expert1"]
    module = "model.layers.1.mlp.down_proj"
    for place, expert in enumerate(scene.suite.experts):
        model = AutoModelForCausalLM.from_pretrained(expert.path)
        sampler = Sampler(f"expert{place}", tokenizer_of(scene), longest=model.config.max_position_embeddings)
        texts = sampler.sample(model, 4, seed=0, device=CPU)
        if by == "base":
            model = AutoModelForCausalLM.from_pretrained(scene.suite.base.path)
        rows: list[torch.Tensor] = []
        model.get_submodule(module).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0]))
        with torch.no_grad():
            for text in texts:
                model(torch.tensor([text.ids]))
        together = torch.cat(rows).double()
        expected = together.T @ together / len(together)
        assert_moment(moment(folder, index, f"expert{place}", f"{module}.weight"), expected)
        assert index.experts[f"expert{place}"].inputs[module].prompts == 4


def test_the_seed_decides_what_is_said(scene: Scene) -> None:
    written = []
    for out, seed in (("one", 1), ("other", 2)):
        assert scene.measure("--self-prompts", 2, "--random-seed", seed, out=out).exit_code == 0
        written.append([(scene.folder / out / name).read_bytes() for name in BYTES])
    assert all(one != other for one, other in zip(*written, strict=True))


def test_experts_with_prompts_are_not_sampled(scene: Scene) -> None:
    result = scene.measure(f"--prompts=expert1={scene.prompts('a.txt')}", "--self-prompts", 3)
    assert result.exit_code == 0, result.output
    experts = read_index(scene.folder / "moments").experts
    prompts = {name: {found.prompts for found in expert.inputs.values()} for name, expert in experts.items()}
    assert prompts == {"expert0": {3}, "expert1": {6}}


def test_a_stopped_run_samples_no_expert_twice(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said is not kept; the folder is that of a run that was not stopped, byte for byte."""
    sampled: list[str] = []
    sample = Sampler.sample

    def stopping(self: Sampler, *arguments: Any, **options: Any) -> Any:
        sampled.append(self._name)
        if sampled == ["expert0", "expert1"]:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(collect.Sampler, "sample", stopping)
        assert scene.measure("--self-prompts", 3).exit_code != 0
        assert scene.measure("--self-prompts", 3).exit_code == 0
    assert sampled == ["expert0", "expert1", "expert1"]
    assert scene.measure("--self-prompts", 3, out="whole").exit_code == 0
    for name in BYTES:
        assert (scene.folder / "whole" / name).read_bytes() == (scene.folder / "moments" / name).read_bytes()
    assert not (scene.folder / "moments.partial").exists()


def test_another_expert_is_sampled_anew_after_a_stop(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is part of what its moments depend on."""
    sampled: list[str] = []
    sample = Sampler.sample

    def stopping(self: Sampler, *arguments: Any, **options: Any) -> Any:
        sampled.append(self._name)
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    monkeypatch.setattr(collect.Sampler, "sample", stopping)
    assert scene.measure("--self-prompts", 3).exit_code != 0
    with edit_tensors(scene.suite.experts[0].path / "model.safetensors") as tensors:
        tensors["model.norm.weight"] *= 2
    assert scene.measure("--self-prompts", 3).exit_code == 0
    assert sampled == ["expert0", "expert1", "expert0", "expert1"]


def silence(checkpoint: Path) -> None:
    """Let a model say the end of a text and nothing else."""
    with edit_tensors(checkpoint / "model.safetensors") as tensors:
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
        tensors["model.embed_tokens.weight"][:] = 1.0
        head = tensors["lm_head.weight"]
        head.zero_()
        head[2] = 10.0


def test_an_expert_that_says_nothing_stops_the_command(scene: Scene) -> None:
    silence(scene.suite.experts[1].path)
    result = scene.measure("--self-prompts", 2)
    assert result.exit_code == 1
    assert "expert1: none of the expert's 8 samples could be used as a prompt" in result.output
    assert "Give --prompts expert1=FILE" in result.output
    assert not (scene.folder / "moments").exists()


def test_experts_that_write_no_text_are_refused(make: Make) -> None:
    scene = make("roberta")
    result = scene.measure("--self-prompts", 2)
    assert result.exit_code == 1
    assert "expert0: --self-prompts needs experts that write text; got Roberta" in result.output


def test_one_of_the_two_is_needed(scene: Scene) -> None:
    result = scene.measure()
    assert result.exit_code == 2
    assert "Give --prompts NAME=FILE for some experts, or --self-prompts N" in result.output

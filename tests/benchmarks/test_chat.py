"""The chat suites' scoring, on a model and rows of seconds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.suites import chat
from benchmarks.suites.chat import KEPT_LOSSES, Chat

LOSSES = {"base": 2.0, "french": 0.5}


def test_losses_of_base_and_experts_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def loss(model: Path, task: str, count: int) -> float:
        measured.append((model.name, task, count))
        return LOSSES.get(model.name, 1.0)

    monkeypatch.setattr(chat, "load", lambda folder: folder)
    monkeypatch.setattr(chat, "mean_loss", loss)
    root = tmp_path / "suite"
    root.mkdir()
    for _ in range(2):
        assert Chat(32).accuracies(["french"], root, root / "french") == {"french": 0.75}
        assert Chat(32).accuracies(["french"], root, tmp_path / "merged") == {"french": 0.5}
    # a merged model is measured every time
    assert sorted(measured) == [("base", "french", 32), ("french", "french", 32), *2 * [("merged", "french", 32)]]
    assert json.loads((root / KEPT_LOSSES).read_text()) == {
        "french, 32 rows of french": 0.5,
        "base, 32 rows of french": 2.0,
    }
    # other rows have another loss
    Chat(100).accuracies(["french"], root, root / "french")
    assert ("french", "french", 100) in measured


def test_a_packed_batch_has_the_losses_of_its_rows_alone() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = [
        chat.Encoded((1, 2, 3, 9), (5, 6)),
        chat.Encoded((1, 2, 4), (7,)),
        chat.Encoded((1, 2, 3, 8, 8), (6, 5, 4)),
    ]
    packed, owners = chat.answer_losses(model, rows)
    alone = [chat.answer_losses(model, [row])[0] for row in rows]
    torch.testing.assert_close(packed, torch.cat(alone))
    assert owners.tolist() == [0, 0, 1, 2, 2, 2]

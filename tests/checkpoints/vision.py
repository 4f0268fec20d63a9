"""Models that see: a classifier, a contrastive pair, and a language model with eyes."""

import torch
import transformers
from torch import Tensor

from tests.checkpoints.family import HEADS_OF_THEIR_OWN_SIZE, SMALL, Family, tokens

IMAGE = 16
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 8,
}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * IMAGE * IMAGE).view(1, 3, IMAGE, IMAGE)}


def _caption() -> dict[str, Tensor]:
    return {**tokens(), **_image()}


VISION = (
    Family(
        "vit",
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TOWER, num_labels=5)),
        _image,
        averaged=("vit.embeddings.cls_token", "vit.embeddings.position_embeddings"),
    ),
    Family(
        "clip",
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**SMALL, "num_hidden_layers": 2}, vision_config=TOWER, projection_dim=24
            )
        ),
        _caption,
        tables=("*.token_embedding.weight", "*.position_embedding.weight"),
        averaged=("text_projection.weight",),
    ),
)

# mergekit merges it module by module: the text decoder, the projector, the vision tower.
MODULAR = (
    Family(
        "qwen3-vision",
        lambda: transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig(
                text_config={
                    **HEADS_OF_THEIR_OWN_SIZE,
                    "num_hidden_layers": 2,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
                },
                vision_config={
                    "depth": 3,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 4,
                    "patch_size": 8,
                    "out_hidden_size": 32,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0, 1, 2],  # mergekit plans three
                },
                tie_word_embeddings=False,
            )
        ),
        tokens,
        tables=("*embed_tokens.weight", "lm_head.weight", "*.pos_embed.weight"),
    ),
)

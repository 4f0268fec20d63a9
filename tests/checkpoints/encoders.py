"""Encoders of text, and encoder-decoders of text and of sound."""

import torch
import transformers
from torch import Tensor

from tests.checkpoints.family import SMALL, VOCABULARY, Family, tokens

FEATURES = 8


def _translation() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.tensor([[0, 4, 8]])}


def _sound() -> dict[str, Tensor]:
    """The encoder halves the frames, to as many as it has positions."""
    return {"input_features": torch.ones(1, FEATURES, 40), "decoder_input_ids": torch.tensor([[1, 4, 8]])}


ENCODERS = (
    Family(
        "roberta",
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, num_labels=3)),
        tokens,
        tables=("*.word_embeddings.weight", "*.position_embeddings.weight", "*.token_type_embeddings.weight"),
    ),
    # mergekit 0.1.5 cannot plan a BertModel.
    Family(
        "bert",
        lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
        tokens,
        tables=("*word_embeddings.weight", "*position_embeddings.weight", "*token_type_embeddings.weight"),
    ),
)

ENCODER_DECODERS = (
    Family(
        "t5",
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                decoder_start_token_id=0,
            )
        ),
        _translation,
        tables=("shared.weight", "*.embed_tokens.weight", "lm_head.weight", "*.relative_attention_bias.weight"),
    ),
    Family(
        "whisper",
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=VOCABULARY,
                d_model=32,
                num_mel_bins=FEATURES,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=20,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        _sound,
        tables=("*.embed_tokens.weight", "*.embed_positions.weight", "proj_out.weight"),
        averaged=("model.encoder.conv?.weight",),
    ),
)

"""A tensor's treatment by its name alone, against the module that owns it, over what transformers and mergekit know."""

import json
import re
from importlib import resources
from typing import Any

import pytest

from mergekit_ace import tensor_treatment
from mergekit_ace.tensor_treatment import Heads, is_embedding, treatment
from tests.zoo.owners import Owned, owned, read

ROWS = read()

# Parameters without a module of their own that a model multiplies its inputs by.
MAPS = re.compile(
    r"(?:^|\.)(?:in_proj_weight|weight_[ih]h_l\d|mm_input_projection_weight|prompts_visual_projection|w_g|(?:hc_)?fn"
    r"|rel_logits_proj\.proj|relative_position_bias\.proj|(?:gate|router)\.weight)$"
)
# What a name cannot tell, and which way the treatment errs. A linear map that is averaged is merged as most methods
# merge it; a head of a vocabulary that is solved as a matrix is one all the same.
AVERAGED_MAPS = {
    # CLIP's is averaged as published; other models' is called the same.
    *(row.name for row in ROWS if row.name.endswith("text_projection.weight")),
    "encoder.embedder.input_embedding.weight",  # patchtst: of a window of numbers
    "output.weight",  # pe_audio_encoder: of no vocabulary, where Mistral's own checkpoints have their head
    "model.vision_tokenizer.quantize.embedding.weight",  # apertus1p5: a codebook
}
SOLVED_HEADS = re.compile(r"(?:^|\.)head\.weight$|^model\.audio_tower\.proj2\.weight$|\.mlp\.2\.weight$")


def wrong(row: Owned) -> str | None:
    """What is wrong with the treatment of a tensor; None where it is right."""
    kind = treatment(row.name, row.shape).kind
    table = is_embedding(row.name, None)
    if row.owner == "head":
        return None if table or SOLVED_HEADS.search(row.name) else "a head is no table"
    if row.owner == "embedding":
        return None if kind == "average" else f"a table is {kind}"
    if row.owner == "linear" or (len(row.shape) == 2 and row.owner == "parameter" and MAPS.search(row.name)):
        # Heads of a vocabulary without a table, or a small one, are heads all the same.
        if kind == "matrix" or row.shape[0] == 1 or re.search(r"head(?:\.decoder|s\.\d+)?\.weight$", row.name):
            return None
        return None if row.name in AVERAGED_MAPS else f"a linear map is {kind}"
    return f"{row.owner} is {kind}" if kind == "matrix" else None


def test_every_tensor_of_transformers_is_treated_as_its_module_asks() -> None:
    assert len(ROWS) > 1500
    assert len({row.architecture for row in ROWS}) > 200
    assert [(error, str(row)) for row in ROWS if (error := wrong(row))] == []


# Of each kind: decoders, encoders, mixtures, vision, audio, recurrent ones, and those of the reports.
BUILT = (
    "albert",
    "bart",
    "clip",
    "gpt2",
    "gpt_oss",
    "llama",
    "mamba",
    "mixtral",
    "roberta",
    "sam",
    "swin",
    "t5",
    "whisper",
)


@pytest.mark.parametrize("architecture", BUILT)
def test_and_so_is_what_this_transformers_builds(architecture: str) -> None:
    rows = list(owned(architecture))
    assert rows
    assert [(error, str(row)) for row in rows if (error := wrong(row))] == []


def test_every_table_of_mergekits_architectures_is_one() -> None:
    folder = resources.files("mergekit") / "_data" / "architectures"
    named: dict[str, bool] = {}

    def collect(node: object) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("name"), str) and node["name"].endswith("weight"):
                named.setdefault(node["name"].replace("${layer_index}", "0"), False)
                named[node["name"].replace("${layer_index}", "0")] |= bool(node.get("is_embed"))
            for child in node.values():
                collect(child)
        elif isinstance(node, list):
            for child in node:
                collect(child)

    for file in folder.iterdir():
        if file.name.endswith(".json"):
            collect(json.loads(file.read_text(encoding="utf-8")))
    assert len(named) > 300
    tables = {name for name in named if is_embedding(name, None)}
    assert {name for name, is_table in named.items() if is_table} <= tables
    last = {name.removesuffix(".weight").rpartition(".")[2] for name in tables}
    assert last == {
        *("embed_tokens", "tok_embeddings", "word_embeddings", "embeddings", "wte", "embed_in", "shared"),
        *("position_embeddings", "token_type_embeddings", "embed_positions", "wpe", "relative_attention_bias"),
        *("position_embedding", "pos_embed", "lm_head", "embed_out", "output", "decoder"),
        "vocab_projector",
    }


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table", (169, 3), "average"),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (2048, 64), "buffer"),
        ("model.layers.0.self_attn.rotary_emb.sin_cached", (1, 1, 2048, 64), "buffer"),
        ("model.rotary_emb.original_inv_freq", (64,), "buffer"),
        ("text.attn_mask", (77, 77), "buffer"),
        ("layers.0.blocks.1.attn_mask", (64, 49, 49), "buffer"),
        ("decoder.mask", (448, 448), "buffer"),
        ("mask_token", (1, 1, 64), "average"),
        ("albert.encoder.embedding_hidden_mapping_in.weight", (768, 128), "matrix"),
        ("vit.embeddings.patch_embedding.weight", (768, 588), "matrix"),
        ("vit.embeddings.patch_position_embeddings.weight", (196, 768), "average"),
        ("decoder.decoder_embed.weight", (512, 768), "matrix"),
        ("decoder.decoder_pos_embed", (197, 512), "average"),
        ("model.layers.0.mlp.experts.down_proj_bias", (32, 2880), "average"),
        ("model.layers.0.mlp.experts.down_proj", (32, 2880, 2880), "stack"),
        ("model.layers.0.self_attn.query.weight", (64, 64), "matrix"),
        ("model.projector.query", (256, 64), "average"),
        ("", (8, 8), "matrix"),
    ],
)
@pytest.mark.parametrize("matrices", ["method", "base"])
def test_names_of_reports(name: str, shape: tuple[int, ...], kind: str, matrices: str) -> None:
    wanted = "base" if kind in ("matrix", "stack") and matrices == "base" else kind
    assert treatment(name, shape, matrices=matrices).kind == wanted  # type: ignore[arg-type]


REASONS = [
    ("model.rotary_emb.inv_freq", (64,), {}, "buffer", "a buffer, not a weight"),
    ("lm_head.weight", (9, 4), {"embeddings": "auto", "heads": "named"}, "head", tensor_treatment.HEAD_REASON),
    ("wte.weight", (9, 4), {}, "average", "embedding table or output head (embeddings: average)"),
    ("wte.weight", (9, 4), {"embeddings": "base"}, "base", "embedding table or output head (embeddings: base)"),
    ("wte.weight", (9, 4), {"embeddings": "method"}, "matrix", "matrix"),
    ("lm_head.weight", (9, 4), {"embeddings": "auto"}, "average", "embedding table or output head (embeddings: auto)"),
    (
        "lm_head.weight",
        (2, 9, 4),
        {"embeddings": "auto", "heads": "named"},
        "average",
        "embedding table or output head (embeddings: auto)",
    ),
    ("text_projection", (4, 4), {}, "average", "CLIP's text projection, averaged as published"),
    ("a.weight", (0, 4), {}, "base", "empty"),
    ("a.weight", (4, 0), {}, "base", "empty"),
    ("mamba.A_log", (4, 4), {}, "average", "state-space decay rates, not a linear map"),
    ("attention.bias", (4, 4), {}, "average", "vectors side by side, not a linear map"),
    ("attention.bias", (4,), {}, "average", "vector or scalar"),
    ("a.weight", (4, 4), {"matrices": "base"}, "base", "matrix (matrices: base)"),
    ("a.weight", (4, 4), {"matrices": "average"}, "average", "matrix (matrices: average)"),
    ("mlp.experts.up", (3, 4, 4), {"matrices": "average"}, "average", "matrix (matrices: average)"),
    ("mlp.experts.up", (3, 4, 4), {}, "stack", "stacked expert matrices, slice by slice"),
    ("a.weight", (4,), {"matrices": "base"}, "average", "vector or scalar"),
    ("a.weight", (), {}, "average", "vector or scalar"),
    ("a.weight", (3, 4, 4), {}, "average", "convolution kernel or table"),
    ("a.weight", (1, 4), {}, "average", "a single row"),
    ("a.weight", (4, 1), {}, "matrix", "matrix"),
]


@pytest.mark.parametrize(("name", "shape", "choices", "kind", "reason"), REASONS)
def test_reasons(name: str, shape: tuple[int, ...], choices: dict[str, Any], kind: str, reason: str) -> None:
    assert treatment(name, shape, **choices) == tensor_treatment.Treatment(kind=kind, reason=reason)  # type: ignore[arg-type]


def test_the_vocabulary_axis_makes_a_table_of_any_name() -> None:
    assert is_embedding("model.layers.0.q_proj.weight", 0)
    assert is_embedding("model.layers.0.q_proj.weight", 1)
    assert not is_embedding("model.layers.0.q_proj.weight", None)
    # One of a list of tables is told by the list.
    assert is_embedding("model.codebook.3.weight", None)
    assert is_embedding("model.embeddings.3.weights", None)
    assert not is_embedding("model.embeddings.proj.3.weight", None)
    assert tensor_treatment.is_output_head("lm_head.weights", None, "named")
    assert tensor_treatment.is_output_head("wte.weight", 0, "tied")
    assert not tensor_treatment.is_output_head("wte.weight", None, "tied")
    assert not tensor_treatment.is_output_head("wte.weight", 0, "named")
    assert not tensor_treatment.is_output_head("lm_head.weight", 0, "none")


@pytest.mark.parametrize(
    ("name", "axis", "of_heads"),
    [
        ("lm_head.weight", 0, {"none": "average", "named": "head", "tied": "head"}),
        ("lm_head.weight", None, {"none": "average", "named": "head", "tied": "head"}),
        ("output_projection.weight", None, {"none": "average", "named": "head", "tied": "head"}),
        ("model.embed_tokens.weight", 0, {"none": "average", "named": "average", "tied": "head"}),
        ("transformer.wpe.weight", None, {"none": "average", "named": "average", "tied": "average"}),
        ("model.layers.0.self_attn.q_proj.weight", None, {"none": "matrix", "named": "matrix", "tied": "matrix"}),
    ],
)
def test_output_heads(name: str, axis: int | None, of_heads: dict[Heads, str]) -> None:
    for heads, kind in of_heads.items():
        assert treatment(name, (96, 32), vocabulary_axis=axis, embeddings="auto", heads=heads).kind == kind
        otherwise = treatment(name, (96, 32), vocabulary_axis=axis, embeddings="average", heads=heads).kind
        assert otherwise == ("matrix" if kind == "matrix" else "average")
    assert treatment("lm_head.bias", (96,), vocabulary_axis=0, embeddings="auto", heads="tied").kind == "average"

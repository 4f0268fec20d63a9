"""Decoders: dense, mixtures of experts, and state spaces."""

import transformers

from tests.checkpoints.family import GROUPED, HEADS_OF_THEIR_OWN_SIZE, SMALL, VOCABULARY, causal

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
CONV1D = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight")

DENSE = (
    causal("llama", transformers.LlamaConfig(**GROUPED, tie_word_embeddings=False), tables=TABLES),
    causal("llama-tied", transformers.LlamaConfig(**SMALL, tie_word_embeddings=True), tables=TABLES),
    causal("qwen2", transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True), tables=TABLES),
    causal("qwen3", transformers.Qwen3Config(**HEADS_OF_THEIR_OWN_SIZE), tables=TABLES),
    causal("mistral", transformers.MistralConfig(**GROUPED, sliding_window=16), tables=TABLES),
    causal("gemma2", transformers.Gemma2Config(**HEADS_OF_THEIR_OWN_SIZE), tables=TABLES),
    causal("gemma3", transformers.Gemma3TextConfig(**HEADS_OF_THEIR_OWN_SIZE), tables=TABLES),
    causal("phi3", transformers.Phi3Config(**GROUPED), tables=TABLES),
    causal(
        "gpt2",
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        tables=("transformer.w?e.weight", "lm_head.weight"),
        input_first=CONV1D,
    ),
    causal("gpt-neox", transformers.GPTNeoXConfig(**SMALL), tables=("gpt_neox.embed_in.weight", "embed_out.weight")),
)

MIXTURES = (
    causal("mixtral", transformers.MixtralConfig(**GROUPED, num_local_experts=4), tables=TABLES),
    causal(
        "qwen3-moe",
        transformers.Qwen3MoeConfig(
            **HEADS_OF_THEIR_OWN_SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        ),
        tables=TABLES,
    ),
)

STATE_SPACES = (
    causal(
        "mamba",
        transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=3, use_mambapy=False
        ),
        tables=("backbone.embeddings.weight", "lm_head.weight"),
        averaged=("*.conv1d.weight", "*.A_log"),
    ),
)

# mergekit has no definition of this one and infers it from the checkpoint.
INFERRED = (causal("olmo", transformers.OlmoConfig(**GROUPED), tables=TABLES),)

"""Two experts of a one-layer Llama with random weights, for the benchmark's own tests; in numpy, so it takes no time.

python suite.py build DIR
python suite.py score DIR MODEL...
python suite.py prompts DIR OUT COUNT

A task: for random inputs to the query and the gate projection, choose the output that its expert makes the largest.
"""

import json
import sys
from pathlib import Path

import numpy
from safetensors.numpy import load_file, save_file

TASKS = ("left", "right")
WIDTH = 16
SHAPES = {
    "model.embed_tokens.weight": (WIDTH, WIDTH),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
    "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.k_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.v_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.o_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.post_attention_layernorm.weight": (WIDTH,),
    "model.layers.0.mlp.up_proj.weight": (2 * WIDTH, WIDTH),
    "model.layers.0.mlp.gate_proj.weight": (2 * WIDTH, WIDTH),
    "model.layers.0.mlp.down_proj.weight": (WIDTH, 2 * WIDTH),
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (WIDTH, WIDTH),
}
SCORED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": WIDTH,
}

Weights = dict[str, numpy.ndarray]


def save(weights: Weights, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))


def build(root: Path) -> None:
    random = numpy.random.default_rng(0)
    base = {name: random.standard_normal(shape, dtype=numpy.float32) for name, shape in SHAPES.items()}
    save(base, root / "base")
    for task in TASKS:
        drawn = {name: random.standard_normal(shape, dtype=numpy.float32) for name, shape in SHAPES.items()}
        save({name: base[name] + 0.5 * drawn[name] for name in base}, root / task)
    (root / "suite.json").write_text(
        json.dumps({"tasks": list(TASKS), "prompts": True, "answers": True, "generates": True})
    )


def write_prompts(root: Path, out: Path, count: int) -> None:
    """Words of each task, of one half of the vocabulary each, with an answer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WIDTH)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(root / "base")
    out.mkdir()
    random = numpy.random.default_rng(2)
    for place, task in enumerate(TASKS):
        words = random.integers(place * WIDTH // 2, (place + 1) * WIDTH // 2, (count, 9))
        texts = [[f"w{word}" for word in row] for row in words.tolist()]
        lines = [json.dumps({"prompt": " ".join(text[:6]), "completion": " ".join(text[6:])}) for text in texts]
        (out / f"{task}.jsonl").write_text("\n".join(lines))


def choices(weights: Weights) -> numpy.ndarray:
    inputs = numpy.random.default_rng(1).standard_normal((WIDTH, 200), dtype=numpy.float32)
    return numpy.concatenate([(weights[name] @ inputs).argmax(0) for name in SCORED])


def score(root: Path, folders: list[Path]) -> None:
    wanted = {task: choices(load_file(root / task / "model.safetensors")) for task in TASKS}
    print("experts", dict.fromkeys(TASKS, 1.0))
    for folder in folders:
        made = choices(load_file(folder / "model.safetensors"))
        found = {task: float((made == wanted[task]).mean()) for task in TASKS}
        print(f"{folder}: relative mean {50 * sum(found.values()):.2f}", found)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    elif sys.argv[1] == "prompts":
        write_prompts(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    else:
        score(Path(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])

"""A demonstration on real experts: four LoRA adapters of one sentence encoder, merged by `mergekit-yaml` and scored.

`python -m demo` runs it from the repository root; `make demo` does so in an environment of its own.
"""

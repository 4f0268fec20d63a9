"""Measuring the second moments of layer inputs: prompts are read, a model is run over them, its inputs are sampled.

One direction: prompts -> tokens -> targets -> activations -> collect. What is measured is stored by
`mergekit_ace.moments`, which knows nothing of prompts or models.
"""

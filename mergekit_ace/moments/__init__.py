"""Measured second moments of layer inputs: their shrinkage, their files, and whether they belong to a checkpoint.

Knows no prompts and no models: `mergekit_ace.collecting` measures, `mergekit_ace.methods` merges by them.
"""

"""Merges on accelerators, without one: a pretended device that has CUDA's rules and the CPU's numbers."""

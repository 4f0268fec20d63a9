"""Merges on disk: whole or not at all, in one run or in parts that are joined later."""

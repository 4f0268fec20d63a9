"""The parts of the quality benchmark: settings as data, merging, scoring, results, tables, plots."""

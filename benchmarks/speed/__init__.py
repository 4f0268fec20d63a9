"""The parts of the speed benchmarks: layers and checkpoints to merge, contenders, timing, memory, the record."""

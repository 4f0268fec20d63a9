"""What `mergekit-ace inspect` costs beside the merge that it reports on, in CPU time of single matrices.

python -m benchmarks.inspection
"""

import time
from collections.abc import Callable

import click
import torch

from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods import METHODS
from mergekit_ace.report.measure import merge_fields

SHAPES = ((1024, 1024), (3072, 768), (768, 3072))
REPEATS = 3


def experts_of(m: int, n: int, count: int) -> TaskVectors:
    """Full fine-tunes whose updates share a covariance."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(m, n, generator=generator)
    root = torch.randn(n, n, generator=generator) / n**0.5
    updates = [5e-4 * torch.randn(m, n, generator=generator) @ root for _ in range(count)]
    return StoredTaskVectors(base, [Expert(name=str(t), tensor=base + update) for t, update in enumerate(updates)])


def seconds(act: Callable[[], object]) -> float:
    """The least CPU time of a few runs."""
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        act()
        times.append(time.process_time() - started)
    return min(times)


@click.command()
@click.option("--method", "name", type=click.Choice([method.name for method in METHODS]), default="ace")
def main(name: str) -> None:
    """Print CPU seconds of the merge and of its inspection."""
    method = next(method for method in METHODS if method.name == name)
    parameters = {parameter.name: parameter.default for parameter in method.own_parameters}
    print("| experts | matrix | merge | inspection | ratio |\n| ---: | --- | ---: | ---: | ---: |")
    for count in (4, 8):
        for m, n in SHAPES:
            task_vectors = experts_of(m, n, count)

            def merge(task_vectors: TaskVectors = task_vectors) -> object:
                return method.merge(task_vectors, parameters)

            def inspect(task_vectors: TaskVectors = task_vectors) -> object:
                return merge_fields(task_vectors, method.merge(task_vectors, parameters), 1.0, with_spectra=False)

            alone, inspected = seconds(merge), seconds(inspect)
            print(f"| {count} | {m} x {n} | {alone:.2f} s | {inspected:.2f} s | {inspected / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()

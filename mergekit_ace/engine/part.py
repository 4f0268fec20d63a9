"""Which part of a merge one machine makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Part:
    """The `index`-th of `count` parts of a merge, counted from 1.

    Raises:
        ValueError: Not `1 <= index <= count`.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"part must be I/N with 1 <= I <= N; got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `I/N`.

        Raises:
            ValueError: The text is not of this form, or out of range.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ValueError(f"part must be I/N, as in 2/8, or auto; got {text!r}")
        return cls(index=int(index), count=int(count))

    @classmethod
    def of_environment(cls, variables: Mapping[str, str]) -> Part:
        """Read the variables that a scheduler sets for each of its tasks.

        Slurm arrays (`SLURM_ARRAY_TASK_ID`), SkyPilot (`SKYPILOT_NODE_RANK`), torchrun and others (`RANK`), indexed
        jobs of Kubernetes (`JOB_COMPLETION_INDEX`, with `JOB_COMPLETIONS` set in the job), `srun` (`SLURM_PROCID`).

        Raises:
            ValueError: There is no such variable, or an array whose numbers have gaps.
        """
        if "SLURM_ARRAY_TASK_ID" in variables:
            first, last, step, number = (
                int(variables.get(f"SLURM_ARRAY_TASK_{name}", default))
                for name, default in (("MIN", "0"), ("MAX", "0"), ("STEP", "1"), ("ID", "0"))
            )
            count = int(variables.get("SLURM_ARRAY_TASK_COUNT", "0"))
            if count != (last - first) // step + 1:
                raise ValueError(
                    f"a Slurm array must be a range of numbers; got {count} tasks from {first} to {last}. "
                    f"Pass --part I/{count}"
                )
            return cls(index=(number - first) // step + 1, count=count)
        for rank, size in _RANKS:
            if rank in variables and size in variables:
                return cls(index=int(variables[rank]) + 1, count=int(variables[size]))
        names = ", ".join(rank for rank, _ in _RANKS)
        raise ValueError(
            f"--part auto needs a scheduler's variables (SLURM_ARRAY_TASK_ID, {names}); there are none. Pass --part I/N"
        )


# A task's number from 0, and how many tasks there are.
_RANKS = (
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    ("RANK", "WORLD_SIZE"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)

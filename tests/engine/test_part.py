"""Which part a task of a scheduler's array makes."""

import pytest

from mergekit_ace.engine.part import Part

SLURM = {
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
}


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "3"}, "1/4"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "9"}, "4/4"),
        ({"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "8", "RANK": "3", "WORLD_SIZE": "4"}, "1/8"),
        ({"RANK": "3", "WORLD_SIZE": "4"}, "4/4"),
        ({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "3"}, "3/3"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "2/2"),
    ],
)
def test_a_schedulers_variables_name_the_part(variables: dict[str, str], part: str) -> None:
    assert Part.of_environment(variables) == Part.parse(part)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "--part auto needs a scheduler's variables"),
        ({"RANK": "1"}, "--part auto needs a scheduler's variables"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3"}, "must be a range of numbers"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "part must be I/N"),
    ],
)
def test_variables_that_name_none_are_an_error(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Part.of_environment(variables)

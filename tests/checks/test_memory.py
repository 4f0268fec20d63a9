"""The memory that a merge may take, by what Linux says of the machine and of control groups."""

from pathlib import Path

import pytest

from mergekit_ace.checks.memory import available_memory

MEMINFO = "MemTotal:  24684084 kB\nMemFree:  303504 kB\nMemAvailable:  10341928 kB\nBuffers: 252452 kB\n"
MACHINE = 10341928 * 1024
GIGABYTE = 10**9


def machine(root: Path, groups: str, files: dict[str, object]) -> Path:
    """`proc` and `sys` of a machine."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(MEMINFO)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, content in files.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def test_what_files_in_memory_give_back_is_available(tmp_path: Path) -> None:
    """Free alone is little on any machine that has read a model."""
    assert available_memory(machine(tmp_path, "", {})) == MACHINE
    assert available_memory(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (
            "0::/job/step",
            {
                "job/memory.max": 8 * GIGABYTE,
                "job/memory.current": 6 * GIGABYTE,
                "job/memory.stat": f"anon 1\nfile {5 * GIGABYTE}\ninactive_file {4 * GIGABYTE}\nactive_file {GIGABYTE}",
                "job/step/memory.max": "max",
                "job/step/memory.current": 3 * GIGABYTE,
            },
            7 * GIGABYTE,
        ),
        (
            "3:cpuset:/\n4:cpu,memory:/docker/123\n0::/",
            {
                # As a container sees itself: the path is that of the machine.
                "memory/memory.limit_in_bytes": 4 * GIGABYTE,
                "memory/memory.usage_in_bytes": 3 * GIGABYTE,
                "memory/memory.stat": f"total_inactive_file {GIGABYTE}",
            },
            2 * GIGABYTE,
        ),
        ("0::/", {"memory.max": 100 * GIGABYTE, "memory.current": GIGABYTE}, MACHINE),
        ("0::/", {"memory.max": GIGABYTE, "memory.current": 2 * GIGABYTE}, 0),
    ],
)
def test_a_control_group_may_have_less(groups: str, files: dict[str, object], expected: int, tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path, groups, files)) == expected

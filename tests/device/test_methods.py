"""Every method on a device: where mergekit's worker runs it, without a mixture of devices, to the bytes of the CPU."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mergekit_ace
from tests.device.pretended import AVAILABLE, PretendedAccelerator
from tests.family.cases import Case, cases, drawn

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this torch cannot be given a device in Python")

# Few enough steps of Adam that each may pass through Python.
STEPS = {"steps": 5}
EVERY = pytest.mark.parametrize("case", list(cases()), ids=str)
LAYERS = {
    # Large enough for the search for low rank, which smaller layers are spared.
    "square": ((272, 264), None, torch.float32),
    "low rank": ((272, 264), 3, torch.float32),
    "wide": ((20, 60), None, torch.bfloat16),
    "tall": ((60, 20), None, torch.bfloat16),
    "float64": ((30, 20), None, torch.float64),
    "table": ((70, 20), None, torch.bfloat16),
    "vector": ((50,), None, torch.bfloat16),
}


def parameters(case: Case) -> dict[str, int]:
    return STEPS if case.parameters.get("solver") == "adam" else {}


@EVERY
@pytest.mark.parametrize("layer", LAYERS)
def test_a_device_gives_the_bytes_of_the_cpu(case: Case, layer: str) -> None:
    shape, rank, dtype = LAYERS[layer]
    base, experts = drawn(3, *shape, rank=rank, dtype=dtype)
    name = "model.embed_tokens.weight" if layer == "table" else "layers.0.weight"
    expected = case.merge(base, experts, name=name, **parameters(case))
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in (base, *experts)]
        # Other than where the tensors are: a factory call without a device would make its tensor there.
        with torch.device("gpu:1"):
            merged = case.merge(on_device[0], on_device[1:], name=name, **parameters(case))
    assert merged.device == torch.device("gpu:0")
    assert torch.equal(merged.cpu(), expected)


FACTORIES = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "from_numpy", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros", "Generator"),
}


def factory_calls_without_a_device(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in FACTORIES
            and ast.unparse(node.func.value) == "torch"
            and not any(keyword.arg == "device" for keyword in node.keywords)
        ):
            yield ast.unparse(node)


PACKAGE = Path(mergekit_ace.__file__).parent
# What a merge runs in the worker; commands and collections of data work outside of it.
IN_THE_WORKER = sorted(file for part in ("linalg", "matrix", "methods") for file in (PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("file", IN_THE_WORKER, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_factory_call_names_its_device(file: Path) -> None:
    """Within `with torch.device(...)`, where mergekit's multi-GPU worker runs, one that does not is made there."""
    assert list(factory_calls_without_a_device(file.read_text(encoding="utf-8"))) == []


def test_condition_numbers_are_estimated_on_a_device_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mergekit_ace")
    base, experts = drawn(3, 30, 20, dtype=torch.float32)
    case = next(cases())
    case.merge(base, experts)
    with PretendedAccelerator() as accelerator:
        on_device = [accelerator.place(tensor, "gpu:0") for tensor in (base, *experts)]
        with torch.device("gpu:0"):
            case.merge(on_device[0], on_device[1:])
    on_cpu, on_gpu = (record.getMessage().rpartition(" ")[0].rpartition(" ")[0] for record in caplog.records[-2:])
    assert "condition" in on_cpu
    assert on_cpu == on_gpu

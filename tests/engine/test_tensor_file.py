"""A safetensors file written tensor by tensor: what the library reads from it, and what is left after a failure."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mergekit_ace.engine.pickle_file import Pickle
from mergekit_ace.engine.shards import OutputTensor
from mergekit_ace.engine.tensor_file import TensorFile, described, header, layout

TENSORS = {
    "odd": torch.arange(3, dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.int8),
    "mask": torch.tensor([True, False, True]),
    "wide": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
    "double": torch.ones(1, dtype=torch.float64) / 3,
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).mT,
    "ünïcode.weight": torch.ones(2),
}


def write(file: Path, planned: dict[str, Tensor], left_out: tuple[str, ...] = ()) -> str:
    with TensorFile(file, layout(described(name, tensor) for name, tensor in planned.items())) as writing:
        for tensor in layout(described(name, tensor) for name, tensor in planned.items()):
            if tensor.name not in left_out:
                writing.write(tensor, planned[tensor.name])
    assert not file.exists()
    return writing.finish()


@pytest.mark.parametrize("left_out", [(), ("double",), ("wide", "bytes"), ("ünïcode.weight",)])
def test_the_library_reads_what_was_written(left_out: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    sha256 = write(file, TENSORS, left_out)
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    found, expected = load_file(file), {name: TENSORS[name] for name in TENSORS if name not in left_out}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    outputs = layout(described(name, tensor) for name, tensor in TENSORS.items())
    content = header(outputs)
    size = int.from_bytes(content[:8], "little")
    assert len(content) == 8 + size
    assert size % 8 == 0
    places = json.loads(content[8:])
    for output in outputs:
        assert places[output.name]["data_offsets"][0] % getattr(torch, output.dtype).itemsize == 0, output.name


def test_tensors_of_one_width_keep_their_order() -> None:
    outputs = [OutputTensor(name=name, dtype="bfloat16", shape=(2,)) for name in "cab"]
    assert [output.name for output in layout(outputs)] == ["c", "a", "b"]


def test_a_failure_leaves_what_was_there_before(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"earlier")
    outputs = layout(described(name, tensor) for name, tensor in TENSORS.items())
    with pytest.raises(ValueError, match="the merge stops"), TensorFile(file, outputs) as writing:
        writing.write(outputs[0], TENSORS[outputs[0].name])
        raise ValueError("the merge stops")
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert file.read_bytes() == b"earlier"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_stops_the_merge_at_the_next_tensor(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    outputs = layout(described(name, tensor) for name, tensor in TENSORS.items())
    with pytest.raises(OSError, match="No space left"), TensorFile(file, outputs) as writing:
        writing._stream.close()
        writing._stream = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        writing.write(outputs[0], TENSORS[outputs[0].name])
        writing.write(outputs[1], TENSORS[outputs[1].name])
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_last_tensor_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    one = described("a", torch.ones(2))
    with TensorFile(file, [one]) as writing:
        writing._stream.close()
        writing._stream = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        writing.write(one, torch.ones(2))
    with pytest.raises(OSError, match=f"No space left on device: '{file}'"):
        writing.finish()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["os.fsync", "Path.replace"])
@pytest.mark.parametrize("kind", [TensorFile, Pickle])
def test_an_error_at_the_end_names_the_file_and_leaves_none(
    kind: type[TensorFile | Pickle], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    one = described("a", torch.ones(2))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error", *([str(file)] if step == "Path.replace" else []))

    monkeypatch.setattr(os if step == "os.fsync" else Path, step.partition(".")[2], fail)
    with kind(file, [one]) as writing:
        writing.write(one, torch.ones(2))
    with pytest.raises(OSError, match=f"Input/output error: '{file}'"):
        writing.finish()
    assert os.listdir(tmp_path) == []


def test_a_dtype_that_cannot_be_stored_leaves_no_file(tmp_path: Path) -> None:
    one = described("a", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="one that safetensors stores"), TensorFile(tmp_path / "m.safetensors", [one]):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [TensorFile, Pickle])
def test_no_file_holds_nothing(kind: type[TensorFile | Pickle], tmp_path: Path) -> None:
    with kind(tmp_path / "model", [described("a", torch.ones(2))]) as writing:
        pass
    assert writing.finish() == ""
    assert os.listdir(tmp_path) == []


def test_a_pickle_is_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    one = described("a", torch.ones(2))
    with pytest.raises(ValueError, match="the merge stops"), Pickle(file, [one]) as writing:
        writing.write(one, torch.ones(2))
        raise ValueError("the merge stops")
    assert os.listdir(tmp_path) == []
    with Pickle(file, [one]) as writing:
        writing.write(one, torch.ones(2))
    assert writing.finish() == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.equal(torch.load(file, weights_only=True)["a"], torch.ones(2))

"""Whether tensors are quantized, by the headers of their files."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ace.checkpoints.headers import TensorHeader
from mergekit_ace.quantization import Quantization, from_dtypes, from_names


def quantization_of_tensors(headers: Mapping[str, TensorHeader]) -> Quantization | None:
    """What follows from the names and dtypes of a checkpoint's tensors."""
    dtypes = {name: (_name(header), len(header.shape)) for name, header in headers.items()}
    return from_names(headers) or from_dtypes(dtypes)


def _name(header: TensorHeader) -> str:
    return str(header.dtype).removeprefix("torch.")

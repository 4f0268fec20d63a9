"""What is in a moments folder: one index, and one safetensors file an expert."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from mergekit_ace.moments.fingerprint import Fingerprint

INDEX = "moments.json"


class MomentsError(ValueError):
    """A moments folder that cannot be used, or belongs to other models; the message names cause and remedy."""


class MeasuredTensor(BaseModel, frozen=True, extra="forbid"):
    """A matrix of the merged model.

    Attributes:
        input: the name under which its inputs are kept; matrices with the same inputs share one.
        input_first: stored `[in, out]`.
        base: fingerprint of the base's weight.
    """

    input: str
    input_first: bool
    base: Fingerprint


class MeasuredInput(BaseModel, frozen=True, extra="forbid"):
    """How one expert's moment of one input was measured.

    Attributes:
        tokens: sampled inputs.
        prompts: that they come from.
        error: share of the off-diagonal energy that is sampling error.
    """

    tokens: int = Field(ge=1)
    prompts: int = Field(ge=1)
    error: float = Field(ge=0, le=1)


class MeasuredExpert(BaseModel, frozen=True, extra="forbid"):
    """One expert.

    Attributes:
        model: as the recipe names it.
        file: of its factors, in the folder.
        inputs: by name.
        weights: by tensor, of the expert's own weight where its moments were measured by itself; else empty.
    """

    model: str
    file: str = Field(pattern=r"^[\w-]+\.safetensors$")
    inputs: dict[str, MeasuredInput]
    weights: dict[str, Fingerprint] = {}


class MomentsIndex(BaseModel, frozen=True, extra="forbid"):
    """Everything in a moments folder but the factors.

    Attributes:
        format: of the folder.
        by: whose activations: the `base`'s, or each `expert`'s own.
        base: the base, as the recipe names it.
        tensors: of the merged model, by name.
        experts: by the name that the user gave.
    """

    format: Literal[1] = 1
    by: Literal["base", "expert"]
    base: str
    tensors: dict[str, MeasuredTensor]
    experts: dict[str, MeasuredExpert]


def read_index(folder: Path) -> MomentsIndex:
    """Read the index of a moments folder.

    Raises:
        MomentsError: there is none, or it is not one.
    """
    file = folder / INDEX
    try:
        return MomentsIndex.model_validate_json(file.read_bytes())
    except OSError as error:
        raise MomentsError(
            f"parameter moments must be a folder that mergekit-ace moments wrote; got {str(folder)!r}, whose {INDEX} "
            f"cannot be read: {error.strerror}"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MomentsError(
            f"{file} must be an index of this version of mergekit-ace; {place or 'the file'}: {first['msg']}. "
            "Measure the moments again"
        ) from error

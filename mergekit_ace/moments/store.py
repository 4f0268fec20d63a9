"""Writing a moments folder, one expert after another; one that is not finished is continued by the next run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import save_file

from mergekit_ace.moments.fingerprint import Fingerprint
from mergekit_ace.moments.index import INDEX, MeasuredExpert, MeasuredInput, MeasuredTensor, MomentsIndex
from mergekit_ace.moments.statistics import SampledMoment


class _State(BaseModel):
    """What an unfinished folder knows of an expert that is done."""

    digest: str
    expert: MeasuredExpert
    sources: dict[str, str]


class MomentsWriter:
    """Writes `OUT.partial` and renames it to `OUT` when it is whole.

    While unfinished, the folder also holds a digest of what each expert was measured on, so that a run on the same
    prompts and models takes it over; the finished folder does not.

    Args:
        out: the folder; new or empty.

    Raises:
        FileExistsError: there is something in it.
    """

    def __init__(self, out: Path) -> None:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise FileExistsError(f"{out} must be new or an empty folder; remove it, or give another one")
        self._out = out
        self._partial = out.with_name(out.name + ".partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        self._experts: dict[str, MeasuredExpert] = {}
        self._sources: dict[str, str] = {}

    def take_over(self, name: str, digest: str) -> bool:
        """Use what an earlier run measured of an expert, if it was the same; returns whether it was."""
        try:
            state = _State.model_validate_json(self._state(name).read_bytes())
        except (OSError, ValidationError):
            return False
        if state.digest != digest or not (self._partial / state.expert.file).exists():
            return False
        self._experts[name] = state.expert
        self._sources.update(state.sources)
        return True

    def add(
        self,
        name: str,
        moments: Mapping[str, SampledMoment],
        *,
        model: str,
        sources: Mapping[str, str],
        weights: Mapping[str, Fingerprint],
        digest: str,
    ) -> None:
        """Write one expert.

        Args:
            name: of the expert.
            moments: by the name of the input; the factors are rounded to bfloat16, an error of 0.4 percent in each
                number and far less in the moment.
            model: the expert, as the recipe names it.
            sources: tensor of the merged model -> the name of its input.
            weights: tensor -> the expert's own weight, where it was run itself.
            digest: of what the moments were measured on.
        """
        file = f"{_file_name(name)}.safetensors"
        factors = {key: moment.factor.to(torch.bfloat16).contiguous() for key, moment in moments.items()}
        save_file(factors, self._partial / file)
        inputs = {
            key: MeasuredInput(tokens=moment.tokens, prompts=moment.prompts, error=moment.error)
            for key, moment in moments.items()
        }
        self._experts[name] = MeasuredExpert(model=model, file=file, inputs=inputs, weights=dict(weights))
        self._sources.update(sources)
        state = _State(digest=digest, expert=self._experts[name], sources=dict(sources))
        # Last, since it shows that the factors are complete.
        self._state(name).write_text(state.model_dump_json(), encoding="utf-8")

    @property
    def sources(self) -> Mapping[str, str]:
        """Tensor of the merged model -> the name of its input, of all experts."""
        return self._sources

    @property
    def tokens(self) -> Mapping[str, int]:
        """Sampled inputs of each expert, in the layers that all of them came to."""
        return {
            name: max((found.tokens for found in entry.inputs.values()), default=0)
            for name, entry in self._experts.items()
        }

    def finish(self, *, by: Literal["base", "expert"], base: str, tensors: Mapping[str, MeasuredTensor]) -> None:
        """Write the index of what was added and put the folder in place.

        Args:
            by: whose activations.
            base: as the recipe names it.
            tensors: the matrices that have moments.
        """
        index = MomentsIndex(by=by, base=base, tensors=dict(tensors), experts=self._experts)
        kept = {entry.file for entry in self._experts.values()}
        for entry in self._partial.iterdir():
            if entry.name not in kept:
                entry.unlink()
        (self._partial / INDEX).write_text(index.model_dump_json(indent=1), encoding="utf-8")
        if self._out.exists():
            self._out.rmdir()
        os.rename(self._partial, self._out)

    def _state(self, name: str) -> Path:
        return self._partial / f"{_file_name(name)}.json"


def _file_name(name: str) -> str:
    """A file name for any name of an expert: its letters, and a digest where that is not all of it."""
    letters = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)
    return letters if letters == name else f"{letters}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

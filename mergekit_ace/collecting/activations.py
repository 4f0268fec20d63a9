"""Inputs of linear layers, sampled while a model runs over prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ace.collecting.tokens import Encoded


class InputSampler:
    """Samples the inputs of some modules, one prompt after another.

    Modules that are given the same tensor, such as the projections to query, key and value, share one sample: it is
    kept under the name of the first of them.

    Args:
        modules: by name.

    Attributes:
        source: name of each module that was called -> name under which its inputs are kept.
        rows: such a name -> sampled inputs `[tokens, n]` of each prompt, on the CPU, in the dtype of the model.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._prompt: Encoded | None = None
        # The last input seen is held, so that no other tensor can take its identity.
        self._last: Tensor | None = None
        self._last_source = ""
        self.source: dict[str, str] = {}
        self.rows: dict[str, list[Tensor]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Sample within the block."""
        handles = [
            module.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, module in self._modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def expect(self, prompt: Encoded) -> None:
        """Set what the model is about to be run on."""
        self._prompt, self._last = prompt, None

    def _hook(self, name: str) -> Any:
        def sample(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            if inputs is not self._last:
                self._last, self._last_source = inputs, self.source.get(name, name)
                self.rows.setdefault(self._last_source, []).append(self._sampled(name, inputs))
            elif self.source.get(name, self._last_source) != self._last_source:
                # It shared another module's inputs before, and shares them no longer: it gets a sample of its own.
                raise RuntimeError(f"{name}: the modules that share its input differ from prompt to prompt")
            self.source.setdefault(name, self._last_source)

        return sample

    def _sampled(self, name: str, inputs: Tensor) -> Tensor:
        assert self._prompt is not None
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        length, positions = len(self._prompt.ids), torch.tensor(self._prompt.positions, dtype=torch.int64)
        if len(rows) != length:
            # A router sent some of the tokens here: of those the same share, evenly spread.
            count = -(-len(rows) * len(positions) // length)
            positions = torch.arange(count) * len(rows) // max(1, count)
        chosen = rows[positions.to(rows.device)].cpu()
        if not bool(torch.isfinite(chosen).all()):
            raise ValueError(
                f"{name}: its inputs must be finite; {self._prompt.where} gives NaN or infinity. Run the model in "
                "another dtype, or leave that prompt out"
            )
        return chosen


@torch.no_grad()
def sample_inputs(
    model: nn.Module, sampler: InputSampler, prompts: Sequence[Encoded], device: torch.device
) -> Iterator[Encoded]:
    """Run a model over prompts, one at a time, and yield each that is done.

    Args:
        model: called with `input_ids` `[1, tokens]` alone.
        sampler: of modules of it.
        prompts: what it is run on.
        device: of the model's first layer.

    Raises:
        ValueError: an input that is NaN or infinite; names the layer and the prompt.
    """
    with sampler.attached():
        for prompt in prompts:
            sampler.expect(prompt)
            model(input_ids=torch.tensor([prompt.ids], device=device))
            yield prompt

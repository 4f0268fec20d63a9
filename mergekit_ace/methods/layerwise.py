"""From mergekit's tensor group to one layer's merge and back: what every method of this package shares."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    TensorGroup,
)
from torch import Tensor

from mergekit_ace.linalg.blocks import blocks
from mergekit_ace.linalg.precision import all_finite, squared_norm
from mergekit_ace.matrix.averaging import mean_task_vector
from mergekit_ace.matrix.decision import heterogeneity
from mergekit_ace.matrix.diagnostics import diagnostics
from mergekit_ace.matrix.expert import require_finite_base
from mergekit_ace.matrix.merge import MatrixMerge
from mergekit_ace.matrix.options import Gate
from mergekit_ace.matrix.task_vectors import TaskVectors
from mergekit_ace.methods.advice import Evidence, log_messages, table_merged_as_matrix
from mergekit_ace.methods.output_range import require_in_range
from mergekit_ace.methods.parameters import LAMBDA, MOMENTS, RecipeParameter, common_parameters
from mergekit_ace.methods.tensors.adapter_factors import adapter_factors, known
from mergekit_ace.methods.tensors.device_failures import named, on_device_or_cpu
from mergekit_ace.methods.tensors.lost_inputs import KnownInputs
from mergekit_ace.methods.tensors.matrices import Matrix, inputs_last, matrices, weighted_experts
from mergekit_ace.methods.tensors.measured_moments import with_measured_moments
from mergekit_ace.methods.tensors.model_depth import depth_of
from mergekit_ace.methods.tensors.output_head import heads_of
from mergekit_ace.methods.tensors.quantized_inputs import require_unquantized_models, require_unquantized_tensors
from mergekit_ace.methods.tensors.treated_tensor import TreatedTensor
from mergekit_ace.methods.tensors.warnings import MergeWarnings, begins_a_merge
from mergekit_ace.printable import printable
from mergekit_ace.tensor_treatment import Choice, Heads, Treatment, is_embedding, treatment

LOG = logging.getLogger("mergekit_ace")


class LayerwiseMethod(GroupMergeMethod):
    """A merge method that treats every matrix by itself and averages what is not a matrix.

    A subclass defines how one matrix is merged (`merge_matrix`) and its parameters (`own_parameters`). Embedding
    tables, vectors, stacked experts, weights, scale, precision and errors are the same for all. So is a matrix that one
    expert alone changed: it becomes that expert's, and `merge_matrix` is not asked.
    """

    name: str
    pretty_name: str
    reference_url: str
    own_parameters: tuple[RecipeParameter, ...] = ()
    lambda_parameter: RecipeParameter = LAMBDA
    merges_heads: bool = False
    """Whether `embeddings: auto` merges output heads as linear maps (`head_parameters`)."""

    def __init__(self) -> None:
        self._warnings = MergeWarnings()
        self._known_inputs = KnownInputs()
        self.spec = MergeMethodSpec(
            name=self.name,
            pretty_name=self.pretty_name,
            reference_url=self.reference_url,
            parameters=self.parameters,
            contract=InputContract(base=BasePolicy.REQUIRED, min_non_base=1),
        )

    @property
    def parameters(self) -> tuple[RecipeParameter, ...]:
        """All that a recipe may set."""
        common = common_parameters(self.name, scale=self.lambda_parameter, heads=self.merges_heads)
        return (*self.own_parameters, *common)

    def validate_inputs(
        self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, *, group_name: str | None = None
    ) -> None:
        """Check what mergekit plans to hand over, before anything is read; called by mergekit.

        Raises:
            ValueError: no base, too few experts, or a model that is quantized.
            RuntimeError: a tensor without all of the models that it was merged from before in this merge.
        """
        self._warnings.inputs_checked(group_name)
        if begins_a_merge(group_name):
            self._known_inputs.begin()
        self._known_inputs.require(group_name, input_ids)
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        require_unquantized_models(input_ids)

    def _execute_resolved(self, groups: Sequence[TensorGroup], *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        for group in groups:  # before mergekit brings a group to one dtype
            require_unquantized_tensors(group)
        results: tuple[Tensor, ...] = super()._execute_resolved(groups, *args, **kwargs)
        if kwargs.get("out_dtype") is not None:  # mergekit has rounded what `merge_group` found finite
            for group, stored in zip(groups, results, strict=True):
                require_in_range(group.metadata.name or "the tensor", stored, _widest(group, kwargs.get("dtype")))
        return results

    @abstractmethod
    def merge_matrix(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """Merge the task vectors of one `[m, n]` weight, inputs last; `parameters` holds `own_parameters` by name.

        Asked for two experts or more; `scale` is applied to the result.
        """

    def needs_entries(self, parameters: Mapping[str, Any]) -> str | None:
        """Why the merge depends on single entries of a matrix, and cannot be had from factors; None: it can."""
        return None

    def takes_moments(self, parameters: Mapping[str, Any]) -> bool:
        """Whether second moments that were measured can take the place of estimates under these parameters."""
        return any(item.name == MOMENTS.name for item in self.own_parameters)

    def needs_base_norm(self, parameters: Mapping[str, Any]) -> bool:
        """Whether the merge depends on how large the updates are for the base's weight."""
        return False

    def scale(self, parameters: Mapping[str, Any]) -> float:
        """What the merged task vector is multiplied by: `lambda`, unless the method has another use for it."""
        return float(parameters["lambda"])

    def head_parameters(self, parameters: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The parameters under which an output head is merged, inputs last; None: it is averaged."""
        return None

    def in_force(
        self, treatment: Treatment, parameters: Mapping[str, Any], vocabulary_axis: int | None
    ) -> Mapping[str, Any]:
        """The parameters under which a tensor is merged that is treated in some way."""
        if treatment.kind != "head":
            return parameters
        of_heads = self.head_parameters(parameters)
        assert of_heads is not None  # or it was treated otherwise
        return {**of_heads, "input_axis": "first" if vocabulary_axis == 1 else "last"}

    def settings(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """The parameters in force that bear on a matrix, by name: the method's own and `lambda`."""
        return {item.name: parameters[item.name] for item in (*self.own_parameters, self.lambda_parameter)}

    def gate(self, parameters: Mapping[str, Any]) -> Gate | None:
        """By what the method finds heterogeneous matrices; None where it treats all alike."""
        return None

    def treated(self, group: TensorGroup, name: str, parameters: Mapping[str, Any]) -> TreatedTensor:
        """A tensor with its treatment.

        Args:
            group: mergekit's, with a base.
            name: of the tensor.
            parameters: resolved.
        """
        assert group.base is not None  # the contract requires one
        base, axis = group.base.tensor, group.metadata.vocabulary_axis
        models = [entry.id for entry in (group.base, *group.non_base)]
        treatment = self.treat(name, base.shape, axis, parameters, heads=heads_of(models))
        return TreatedTensor(
            name=name,
            group=group,
            base=base,
            experts=weighted_experts(group, parameters),
            treatment=treatment,
            parameters=self.in_force(treatment, parameters, axis),
            depth=depth_of(models),
        )

    def matrices(
        self, tensor: TreatedTensor, warn: Callable[[str, str], None] = lambda cause, message: None
    ) -> Iterator[Matrix]:
        """Every matrix of a tensor that is treated as a matrix, a stack or a head.

        With what is known of its updates: their factors, or the second moments that were measured.

        Args:
            tensor: of two or three dimensions.
            warn: takes a cause and a message.
        """
        name, base, experts, parameters = tensor.name, tensor.base, tensor.experts, tensor.parameters
        if tensor.treatment.kind != "matrix":  # no moments are measured of others
            return matrices(name, base, experts, parameters, depth=tensor.depth)
        experts = with_measured_moments(name, base, experts, parameters, warn)
        factors = known(adapter_factors(tensor.group)) if self.needs_entries(parameters) is None else ()
        return matrices(name, base, experts, parameters, factors, tensor.depth)

    def merge(self, task_vectors: TaskVectors, parameters: Mapping[str, Any]) -> MatrixMerge:
        """Merge the task vectors of one matrix, before `scale`: of at least one expert."""
        if len(task_vectors) == 1:
            return MatrixMerge(task_vector=task_vectors.task_vector(0))
        unit = task_vectors.suitable_unit
        if unit == 1:
            return self.merge_matrix(task_vectors, parameters)
        return self.merge_matrix(task_vectors.in_units_of(unit), parameters).times_(unit)

    @torch.no_grad()
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor; called by mergekit. The result is in no autograd graph, should the inputs be in one.

        Returns:
            A tensor of the base's shape and dtype in storage of its own, rounded once.

        Raises:
            ValueError: NaN or infinity in a tensor, or weights that leave no expert.
            RuntimeError: the process runs float32 products in reduced precision.
            FactorizationError: a system that no jitter makes positive definite.
            torch.OutOfMemoryError: with the tensor's name and what to set.
        """
        started = time.perf_counter()
        tensor = self.treated(group, printable(group.metadata.name or "the tensor"), parameters)
        name, base, treatment = tensor.name, tensor.base, tensor.treatment
        self._warnings.merging(group.metadata.name)
        self._known_inputs.merging(group.metadata.name, [entry.id for entry in group.entries])
        if treatment.kind == "matrix" and is_embedding(name, group.metadata.vocabulary_axis):
            self._warnings.warn("embeddings", "{}: {}. {}".format(name, *table_merged_as_matrix(self.name)))
        with named(name, base), diagnostics(LOG.isEnabledFor(logging.INFO)):
            merged, notes = self._merge(tensor)
            finite = treatment.kind == "buffer" or all_finite(merged)
        if LOG.isEnabledFor(logging.INFO):
            seconds = time.perf_counter() - started
            LOG.info("%s %s: %s; %s %.3f s", name, tuple(base.shape), treatment.reason, notes, seconds)
        if not finite:
            remedy = "Set a smaller lambda."
            if merged.dtype in (torch.float16, torch.bfloat16):
                remedy = "Set dtype: float32 (and out_dtype: bfloat16 for a small result), or a smaller lambda."
            raise ValueError(
                f"{name}: every merged weight must be finite; the merge exceeds the range of {merged.dtype}. {remedy}"
            )
        return merged

    def treat(
        self,
        name: str,
        shape: Sequence[int],
        vocabulary_axis: int | None,
        parameters: Mapping[str, Any],
        *,
        heads: Heads,
    ) -> Treatment:
        """The treatment that a tensor of this stored shape gets from this method under these parameters.

        Args:
            name: of the tensor.
            shape: as stored.
            vocabulary_axis: mergekit's, where it gives one.
            parameters: resolved.
            heads: of the merge (`heads_of`).
        """

        def choice(parameter: str) -> Choice:
            value: Choice = parameters[parameter]
            return "method" if value == self.name else value

        if parameters["input_axis"] == "first" and len(shape) >= 2:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return treatment(
            name,
            shape,
            vocabulary_axis=vocabulary_axis,
            embeddings=choice("embeddings"),
            matrices=choice("matrices"),
            heads=heads if self.head_parameters(parameters) is not None else "none",
        )

    def _merge(self, tensor: TreatedTensor) -> tuple[Tensor, str]:
        kind, base, parameters = tensor.treatment.kind, tensor.base, tensor.parameters
        if kind == "buffer":
            return base.clone(), ""
        if kind == "base":
            require_finite_base(base, name=tensor.name)
            return base.clone(), ""
        if kind == "average":
            everything = Matrix(name=tensor.name, place=(), base=base, experts=tensor.experts)
            return on_device_or_cpu(lambda tensors: self._average(tensors, parameters), everything, self._warnings.warn)

        def merge_one(matrix: Matrix) -> tuple[Tensor, str]:
            return on_device_or_cpu(lambda moved: self._merge_one(moved, parameters), matrix, self._warnings.warn)

        parts = self.matrices(tensor, self._warnings.warn)
        if kind in ("matrix", "head"):
            weight, notes = merge_one(next(parts))
            return inputs_last(weight, parameters), notes
        merged, notes = torch.empty_like(base), ""
        for matrix in parts:
            weight, notes = merge_one(matrix)
            merged[matrix.place] = inputs_last(weight, parameters)
        return merged, notes

    def _average(self, tensors: Matrix, parameters: Mapping[str, Any]) -> tuple[Tensor, str]:
        mean = mean_task_vector(tensors.base, tensors.experts, name=tensors.name)
        return _apply(tensors.base, mean, self.scale(parameters)), ""

    def _merge_one(self, matrix: Matrix, parameters: Mapping[str, Any]) -> tuple[Tensor, str]:
        space = matrix.cores()
        task_vectors, scale = matrix.task_vectors(space), self.scale(parameters)
        if len(task_vectors) == 0:
            return matrix.base.clone(), "no expert changed it"
        if len(task_vectors) == 1:
            note = f"only {task_vectors.experts[0].name} changed it"
            if space is not None:
                return _apply(matrix.base, space.matrix(task_vectors.task_vector(0)), scale), f"{note}, by its factors"
            return _sole(matrix, task_vectors, scale), note
        merge = self.merge(task_vectors, parameters)
        for cause, message in log_messages(self.evidence(task_vectors, merge, parameters)):
            self._warnings.warn(cause, message)
        if space is None:
            return _apply(matrix.base, merge.task_vector, scale), merge.describe()
        return _apply(matrix.base, space.matrix(merge.task_vector), scale), f"by factors, {merge.describe()}"

    def evidence(self, task_vectors: TaskVectors, merge: MatrixMerge, parameters: Mapping[str, Any]) -> Evidence:
        """What the rules of advice look at, of a matrix that two experts or more changed."""
        norm = abs(self.scale(parameters)) * squared_norm(merge.task_vector) ** 0.5
        mean = task_vectors.energy_of_mean**0.5
        return Evidence(
            name=task_vectors.name,
            method=self.name,
            settings=self.settings(parameters),
            facts=merge.facts(),
            gate=self.gate(parameters),
            experts=[expert.name for expert in task_vectors.experts],
            energies=task_vectors.energies,
            heterogeneity=heterogeneity(task_vectors.energies, "scale_free"),
            dtype=str(task_vectors.dtype).removeprefix("torch."),
            relative_change=norm / task_vectors.base_norm if task_vectors.base_norm else None,
            relative_to_mean=norm / mean if mean else None,
        )


def _widest(group: TensorGroup, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a group is merged in."""
    return dtype or reduce(torch.promote_types, (entry.tensor.dtype for entry in group.entries))


def _apply(base: Tensor, task_vector: Tensor, scale: float) -> Tensor:
    """`base + scale * task_vector`, added in the working dtype, rounded once to the base's; consumes `task_vector`."""
    for update, weights in zip(blocks(task_vector), blocks(base), strict=True):
        update.mul_(scale).add_(weights)
    return task_vector.to(base.dtype)


def _sole(matrix: Matrix, task_vectors: TaskVectors, scale: float) -> Tensor:
    """`base + scale * D_1`. With a scale of 1 the expert's own bits: `base + (expert - base)` would round twice."""
    if scale == 1:
        name = task_vectors.experts[0].name
        return next(expert.tensor for expert in matrix.experts if expert.name == name).clone()
    return _apply(matrix.base, task_vectors.task_vector(0), scale)

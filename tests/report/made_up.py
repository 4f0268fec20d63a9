"""Reports that were measured nowhere: for what is written and drawn from them."""

import math

from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.merge import MergeFacts
from mergekit_ace.matrix.options import Gate
from mergekit_ace.report.model import (
    ExpertReport,
    Interference,
    LeftOut,
    Merged,
    Report,
    Spectrum,
    TensorReport,
)

# What a checkpoint's maker could write into a name to get into a page, a terminal, a formula or a spreadsheet.
HOSTILE = "=x<script>document.title='owned'</script>\"'&$\\frac{1}$[red]\x1b[31m"
EXPERTS = ("/models/plain", f"/models/{HOSTILE}")


def spectrum(scale: float) -> Spectrum:
    ranks = (1, 2, 4, 8)
    return Spectrum(ranks=ranks, values=tuple(scale / rank for rank in ranks))


def decision(heterogeneity: float, heterogeneous: bool | None, *, trace_normalized: bool = False) -> Decision:
    return Decision(
        heterogeneity=heterogeneity,
        heterogeneous=heterogeneous,
        trace_normalized=trace_normalized,
        refined_directions=2 if heterogeneous else 0,
        refined_residual=bool(heterogeneous),
        low_rank=None,
        effective_experts=None,
        longest=math.inf,
    )


def merged_tensor(name: str, depth: int, heterogeneity: float, *, kind: str = "mlp.up_proj") -> TensorReport:
    """By ACE as published: above 0.3 heterogeneous, so trace-normalized and refined."""
    refined = heterogeneity > 0.3
    return TensorReport(
        name=name,
        depth=depth,
        kind=kind,
        shape=(16, 8),
        treatment="merged",
        reason="matrix",
        dtype="float32",
        experts=tuple(
            ExpertReport(
                expert=expert,
                weight=1.0,
                norm=(1.0, 1.5)[t],
                energy_share=(1.0, 2.25)[t] / 3.25,
                ridge=0.1,
                effective_rank=4.0,
                loss=(0.2, 0.6)[t],
                spectrum=spectrum(1.0 + t),
            )
            for t, expert in enumerate(EXPERTS)
        ),
        heterogeneity=1.0,
        heterogeneity_published=heterogeneity,
        gate=Gate(statistic="published", threshold=0.3),
        parameters={
            "preset": "published",
            "epsilon": 0.01,
            "heterogeneity": "published",
            "heterogeneity_threshold": 0.3,
            "spectral_fraction": 0.3,
            "length_bound": False,
            "lambda": 1.0,
        },
        merge=MergeFacts(
            decision=decision(heterogeneity, refined, trace_normalized=refined),
            ridge=0.05,
            ridge_is_fixed=True,
            condition=42.0,
            refinement_norm=1.0 if refined else None,
        ),
        merged=Merged(
            norm=1.2,
            relative_norm=0.9,
            relative_to_mean=1.3,
            relative_change=0.01,
            effective_rank=5.0,
            spectrum=spectrum(1.5),
            spectrum_before=spectrum(1.4) if refined else None,
        ),
        interference=Interference(overlap=((1.0, 0.3), (0.3, 1.0)), alignment=((1.0, -0.2), (-0.2, 1.0))),
        seconds=0.25,
    )


def made_up_report(name: str = "mlp.up_proj") -> Report:
    return Report(
        producer="mergekit-ace 0",
        recipe=f"recipes/{HOSTILE}.yml",
        method="ace",
        mode="full",
        complete=True,
        base="/models/base",
        experts=EXPERTS,
        planned=6,
        tensors=(
            *(merged_tensor(f"model.layers.{i}.{name}.weight", i, value) for i, value in enumerate((0.1, 0.5, 2.0))),
            merged_tensor(f"{HOSTILE}.weight", 3, math.inf, kind=HOSTILE),
            TensorReport(
                name="model.norm.weight",
                depth=None,
                kind="model.norm",
                shape=(8,),
                treatment="unchanged",
                reason="vector or scalar",
                left_out=tuple(LeftOut(expert=expert, reason="equal to the base here") for expert in EXPERTS),
            ),
            TensorReport(
                name="lm_head.weight",
                depth=None,
                kind="lm_head",
                shape=(),
                treatment="failed",
                reason="the merge stops here",
                error=f"NaN in {HOSTILE}",
            ),
        ),
    )

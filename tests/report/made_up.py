"""Reports that were measured nowhere: for what is written and drawn from them."""

import math

from mergekit_ace.report.model import (
    ExpertReport,
    Gate,
    Interference,
    LayerReport,
    LeftOut,
    Merged,
    Report,
    Spectrum,
)

# What a checkpoint's maker could write into a name to get into a page, a terminal, a formula or a spreadsheet.
HOSTILE = "=x<script>document.title='owned'</script>\"'&$\\frac{1}$[red]\x1b[31m"
EXPERTS = ("/models/plain", f"/models/{HOSTILE}")


def spectrum(scale: float) -> Spectrum:
    ranks = (1, 2, 4, 8)
    return Spectrum(ranks=ranks, values=tuple(scale / rank for rank in ranks))


def solved_layer(name: str, depth: int, heterogeneity: float, *, kind: str = "mlp.up_proj") -> LayerReport:
    refined = heterogeneity > 0.3
    return LayerReport(
        name=name,
        depth=depth,
        kind=kind,
        shape=(16, 8),
        branch="heterogeneous" if refined else "homogeneous",
        reason="matrix",
        experts=tuple(
            ExpertReport(
                expert=expert,
                weight=1.0,
                norm=1.0 + t,
                trace_share=(0.25, 0.75)[t],
                ridge=0.1,
                effective_rank=4.0,
                top_energy=0.5,
                loss=(0.2, 0.6)[t],
                spectrum=spectrum(1.0 + t),
            )
            for t, expert in enumerate(EXPERTS)
        ),
        heterogeneity=heterogeneity,
        heterogeneity_scale_free=1.0,
        gate=Gate(statistic="published", threshold=0.3),
        ridge=0.05,
        condition=42.0,
        refined_directions=2 if refined else None,
        merged=Merged(
            norm=1.2,
            relative_norm=0.8,
            top_energy=0.6,
            top_energy_before=0.7 if refined else None,
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
        layers=(
            *(solved_layer(f"model.layers.{i}.{name}.weight", i, value) for i, value in enumerate((0.1, 0.5, 2.0))),
            solved_layer(f"{HOSTILE}.weight", 3, math.inf, kind=HOSTILE),
            LayerReport(
                name="model.norm.weight",
                depth=None,
                kind="model.norm",
                shape=(8,),
                branch="frozen",
                reason="vector or scalar",
                left_out=tuple(LeftOut(expert=expert, reason="equal to the base here") for expert in EXPERTS),
            ),
            LayerReport(
                name="lm_head.weight",
                depth=None,
                kind="lm_head",
                shape=(),
                branch="failed",
                reason="the merge would stop here",
                error=f"NaN in {HOSTILE}",
            ),
        ),
    )

"""The rulebook, held on real merges: each cause is named once a merge, with numbers and a remedy that helps.

Merges without a cause for a warning log none, by every method under its defaults.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods.api import merge_state_dicts, merge_tensors
from torch import Tensor

import mergekit_ace
from mergekit_ace.matrix.decision import Decision
from mergekit_ace.matrix.expert import Expert
from mergekit_ace.matrix.merge import MergeFacts
from mergekit_ace.matrix.options import Gate
from mergekit_ace.matrix.stored_task_vectors import StoredTaskVectors
from mergekit_ace.methods.advice import RULES, Evidence, table_merged_as_matrix
from mergekit_ace.methods.layerwise import LayerwiseMethod
from tests.checkpoints import Suite, Update, make_suite
from tests.commands import mergekit_yaml
from tests.end_to_end.comparison import recipe_for
from tests.matrix.experts import adapter_updates, related_updates

NAME = "model.layers.0.mlp.up_proj.weight"
METHODS = {method.name: method for method in mergekit_ace.METHODS}
FULL = related_updates(60, 30, 3)
UNEVEN = related_updates(60, 30, 3, spread=6.0)
WIDE = related_updates(10, 60, 3)
ADAPTERS = adapter_updates(60, 80, 3, rank=3)
OF_UNIT_NORM = [update / update.norm() * factor for update, factor in zip(FULL, (1.0, 1.1, 1.2), strict=True)]
ONE_SIDED = [FULL[0] * 10, *FULL[1:]]


def models(updates: Sequence[Tensor], change: float | None, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """A base and its experts, the updates being `change` times the norm of the base; of their own size where None."""
    base = torch.randn(updates[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = 1.0 if change is None else change * base.norm() / torch.stack([u.norm() for u in updates]).mean()
    experts = {f"expert {t}": {NAME: (base + scale * update).to(dtype)} for t, update in enumerate(updates)}
    return {"base": {NAME: base.to(dtype)}, **experts}


def logged(
    caplog: pytest.LogCaptureFixture,
    method: str,
    updates: Sequence[Tensor],
    change: float | None = 0.01,
    parameters: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mergekit_ace"):
        merge_state_dicts(models(updates, change, dtype), method, base="base", parameters=parameters or {})
    return messages(caplog)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "mergekit_ace"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("updates", [FULL, UNEVEN, [FULL[0]] * 3, related_updates(30, 60, 8)])
def test_defaults_merge_full_fine_tunes_in_silence(
    method: str, updates: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    assert logged(caplog, method, updates) == []


def test_a_bound_that_has_no_effect_is_no_remedy(caplog: pytest.LogCaptureFixture) -> None:
    """Of adapters that are merged without second moments: lambda is what there is."""
    (large,) = [message for message in logged(caplog, "ace", ADAPTERS, change=0.5) if "of its norm" in message]
    assert "Set lambda nearer to 0, such as 0.5." in large
    assert "length_bound" not in large
    plain, bounded = (
        merge_state_dicts(models(ADAPTERS, 0.5, torch.float32), "ace", base="base", parameters=parameters)[NAME]
        for parameters in ({}, {"length_bound": True})
    )
    assert torch.equal(plain, bounded)
    for parameters in ({"length_bound": False}, {"preset": "0.1"}):
        (full,) = [m for m in logged(caplog, "ace", FULL, change=0.5, parameters=parameters) if "of its norm" in m]
        assert "Set length_bound: true, or lambda nearer to 0, such as 0.5." in full
    # By their size they are bounded already.
    (full,) = [m for m in logged(caplog, "ace", FULL, change=0.5) if "of its norm" in m]
    assert "Set lambda nearer to 0, such as 0.5." in full


@pytest.mark.parametrize("method", METHODS)
def test_defaults_warn_of_adapters_only_where_they_are_averaged(method: str, caplog: pytest.LogCaptureFixture) -> None:
    found = logged(caplog, method, ADAPTERS)
    assert len(found) == (method == "ace")
    assert all("the result is merged without them" in message for message in found)


PUBLISHED = {"preset": "published"}
# method, updates, their size, parameters; the sentence; what the remedy says to set, and to what.
CASES: tuple[tuple[str, list[Tensor], float | None, dict[str, Any], str, dict[str, Any]], ...] = (
    (
        "ace",
        FULL,
        0.3,
        {},
        r"changes the weight by \d+% of its norm, more than 20%.*add up\. Set lambda",
        {"lambda": 0.1},
    ),
    ("ace", FULL, 0.3, {"length_bound": True}, "changes the weight by", {"lambda": 0.1}),
    ("ace", FULL, 0.5, {"length_bound": False}, "changes the weight by", {"lambda": 0.1}),
    ("wudi", FULL, 0.3, {}, "changes the weight by", {"lambda": 0.1}),
    ("tsv_m", FULL, 0.3, {}, "changes the weight by", {"lambda": 0.1}),
    ("ace", FULL, 0.01, {"epsilon": 100.0}, r"the ridge \(epsilon: 100\) is .* times the mean", {"epsilon": "auto"}),
    ("wudi", FULL, 0.01, {"epsilon": 100.0}, r"the ridge \(epsilon: 100\) is", {"epsilon": "auto"}),
    ("ace", FULL, 0.01, {**PUBLISHED, "epsilon": 1e6}, r"the ridge \(epsilon: 1e\+06\) is", {"epsilon": "auto"}),
    ("ace", ADAPTERS, 0.01, {}, r"correlate by 0\.\d+ only.*merged without them", {"correlation_threshold": 0.0}),
    ("ace", UNEVEN, 0.01, PUBLISHED, "spectral refinement adds", {"spectral_fraction": 0.0}),
    ("actmat", WIDE, 0.01, {"epsilon": 1e-8}, "has condition number", {"epsilon": "auto"}),
    ("ace", OF_UNIT_NORM, None, PUBLISHED, "published is .*, above the threshold 0.3", {"heterogeneity": "scale_free"}),
    ("ace", FULL, 0.01, {"lambda": 0.1}, r"0\.\d+ times the norm of the experts' plain average", {"lambda": 1.0}),
    ("iso_c", ADAPTERS, 0.01, {"mean_over": "all"}, "times the norm of the experts' plain", {"mean_over": "existing"}),
    ("iso_cts", ADAPTERS, 0.01, {"mean_over": "all"}, "times the norm of the experts' plain", {"lambda": 3.0}),
)


@pytest.mark.parametrize(("method", "updates", "change", "parameters", "sentence", "remedy"), CASES)
def test_a_cause_is_named_and_its_remedy_helps(
    method: str,
    updates: list[Tensor],
    change: float | None,
    parameters: dict[str, Any],
    sentence: str,
    remedy: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="mergekit_ace"):  # -v: condition numbers are estimated too
        before = logged_at_info(caplog, method, updates, change, parameters)
        after = logged_at_info(caplog, method, updates, change, parameters | remedy)
    (found,) = (message for message in before if re.search(sentence, message))
    assert found.startswith(f"{NAME}: ")
    (parameter,) = remedy
    assert parameter in remedy_of(found)
    assert not [message for message in after if _gist(sentence) in message]
    for message in [*before, *after]:
        assert_sound(message, METHODS[method])


def logged_at_info(
    caplog: pytest.LogCaptureFixture,
    method: str,
    updates: Sequence[Tensor],
    change: float | None,
    parameters: Mapping[str, Any],
) -> list[str]:
    caplog.clear()
    merge_state_dicts(models(updates, change, torch.float32), method, base="base", parameters=parameters)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def _gist(sentence: str) -> str:
    """Without the numbers, which the remedy changes."""
    return max(re.findall(r"[a-z' ]{9,}", sentence), key=len)  # type: ignore[no-any-return]


def remedy_of(message: str) -> str:
    """The sentence before the last."""
    return message.partition(" Logged once")[0].rpartition(". ")[2]


def assert_sound(message: str, method: LayerwiseMethod) -> None:
    """No words for missing numbers, and no parameter that the method does not have."""
    assert not re.search(r"\b(?:inf|nan|None)\b", message)
    known = {parameter.name for parameter in method.parameters} | {"dtype", "scale_free"}
    settings = re.findall(r"\b([a-z]+(?:_[a-z]+)+|lambda|epsilon|dtype|matrices)\b", remedy_of(message))
    assert settings
    assert set(settings) <= known


def evidence(
    *,
    energies: Sequence[float] = (4.0, 1.0),
    large: float = 0.0,
    facts: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Evidence:
    """Of a sound merge of two experts, but for the changes."""
    decision = Decision(
        heterogeneity=1.0,
        heterogeneous=None,
        trace_normalized=False,
        refined_directions=0,
        refined_residual=False,
        low_rank=None,
        effective_experts=None,
        longest=math.inf,
        large=large,
    )
    given: dict[str, Any] = {
        "name": NAME,
        "method": "ace",
        "settings": {"epsilon": 1.0, "lambda": 1.0, "length_bound": "auto"},
        "facts": MergeFacts(**{"decision": decision, "correlation": 0.01, "ridge_is_fixed": True, **(facts or {})}),
        "gate": None,
        "experts": ["a", "b"],
        "energies": energies,
        "heterogeneity": 1.0,
        "dtype": "float32",
        "relative_change": 0.1,
        "relative_to_mean": 1.0,
    }
    return Evidence(**{**given, **changes})


def gated(heterogeneity: float, found: bool) -> Decision:
    sound = evidence().facts.decision
    assert sound is not None
    return replace(sound, heterogeneity=heterogeneity, heterogeneous=found, trace_normalized=True)


GATE = Gate(statistic="published", threshold=0.3)


@pytest.mark.parametrize(
    ("cause", "found", "not_found"),
    [
        ("change", [evidence(relative_change=0.201)], [evidence(relative_change=0.2), evidence(relative_change=None)]),
        (
            "ridge",
            [evidence(facts={"ridge": 10.1}), evidence(facts={"ridge": math.inf})],
            [evidence(facts={"ridge": 10.0}), evidence(facts={"ridge": 1e9, "ridge_is_fixed": False})],
        ),
        ("average", [evidence(facts={"averaged": 0.51})], [evidence(facts={"averaged": 0.5})]),
        # three times the norm of the larger update, 2
        ("refinement", [evidence(facts={"refinement_norm": 6.1})], [evidence(facts={"refinement_norm": 6.0})]),
        (
            "condition",
            [evidence(facts={"condition": 8.4e5}), evidence(facts={"condition": 4.6e14}, dtype="float64")],
            [evidence(facts={"condition": 8.3e5}), evidence(facts={"condition": 8.4e5}, dtype="float64")],
        ),
        (
            "dominant",
            [evidence(energies=(4.1, 1.0))],
            [evidence(energies=(4.0, 1.0)), evidence(energies=(9.0, 1.0), facts={"decision": gated(1.0, True)})],
        ),
        (
            "gate",
            [evidence(gate=GATE, heterogeneity=0.3, facts={"decision": gated(0.31, True)})],
            [
                evidence(gate=GATE, heterogeneity=0.31, facts={"decision": gated(0.31, True)}),
                evidence(gate=GATE, heterogeneity=0.1, facts={"decision": gated(0.3, False)}),
                evidence(
                    gate=replace(GATE, statistic="scale_free"), heterogeneity=0.3, facts={"decision": gated(0.31, True)}
                ),
            ],
        ),
        ("short", [evidence(relative_to_mean=0.49)], [evidence(relative_to_mean=0.5), evidence(relative_to_mean=None)]),
    ],
)
def test_a_rule_applies_beyond_its_threshold_and_not_at_it(
    cause: str, found: list[Evidence], not_found: list[Evidence]
) -> None:
    (rule,) = (rule for rule in RULES if rule.cause == cause)
    for case in found:
        assert rule.extent(case) is not None
        sentence = f"{rule.what(case)}. {rule.remedy(case)}"
        assert not re.search(r"\b(?:inf|nan|None)\b", sentence)
    assert [rule.extent(case) for case in not_found] == [None] * len(not_found)
    assert [rule.cause for rule in RULES if rule.extent(evidence()) is not None] == []


EXPLAINED = {"averaged": 1.0, "correlation": 0.0123}
SENTENCES: list[tuple[str, Evidence, str]] = [
    (
        "change",
        evidence(relative_change=0.3),
        "the merge changes the weight by 30% of its norm, more than 20%: updates that large do not add up. "
        "Set length_bound: true, or lambda nearer to 0, such as 0.5.",
    ),
    (
        "change",
        evidence(relative_change=0.3, settings={"length_bound": True}),
        ". Set lambda nearer to 0, such as 0.5.",
    ),
    ("change", evidence(relative_change=0.3, large=0.6), ". Set lambda nearer to 0, such as 0.5."),
    (
        "change",
        evidence(relative_change=0.3, large=0.4),
        " length_bound: true, or lambda nearer to 0, such as 0.5.",
    ),
    (
        "change",
        evidence(relative_change=0.3, large=1.0, settings={"length_bound": False}),
        " length_bound: true, or lambda nearer to 0, such as 0.5.",
    ),
    ("change", evidence(relative_change=0.3, settings={}), ". Set lambda nearer to 0, such as 0.5."),
    ("change", evidence(relative_change=0.3, facts={"averaged": 1}), ". Set lambda nearer to 0, such as 0.5."),
    (
        "ridge",
        evidence(facts={"ridge": 12.34}),
        "the ridge (epsilon: 1) is 12.3 times the mean eigenvalue of the second moments: the result is close to an "
        "average. Set epsilon: auto, or a smaller number.",
    ),
    (
        "ridge",
        evidence(facts={"ridge": math.inf}),
        "the second moments are zero, so that epsilon (1) is all that the solve sees. "
        "Set epsilon: auto, or a smaller number.",
    ),
    (
        "average",
        evidence(facts=EXPLAINED),
        "the updates are of low rank and their second moments correlate by 0.012 only, as those of adapters with "
        "independent random A matrices do: the result is merged without them. Measure them on a few prompts, or on "
        "texts that the experts generate (mergekit-ace moments), or set correlation_threshold: 0 to use the estimates.",
    ),
    ("average", evidence(facts=EXPLAINED | {"averaged": 0.6}), "do: the result is 60% merged without them. Measure"),
    (
        "refinement",
        evidence(facts={"refinement_norm": 6.4}),
        "spectral refinement adds 3.2 times the norm of the largest update. Set spectral_fraction: 0.",
    ),
    (
        "refinement",
        evidence(facts={"refinement_norm": 6.4}, gate=GATE),
        ". Set spectral_fraction: 0, or raise heterogeneity_threshold.",
    ),
    (
        "condition",
        evidence(facts={"condition": 9e5}),
        "the system has condition number 9.0e+05: a float32 solve keeps about one correct digit in its weakest "
        "directions. Raise epsilon, or set epsilon: auto.",
    ),
    ("condition", evidence(facts={"condition": 9e5, "ridge_is_fixed": False}), "directions. Set dtype: float64."),
    (
        "condition",
        evidence(facts={"condition": 1e15, "ridge_is_fixed": False}, dtype="float64"),
        "a float64 solve keeps about one correct digit in its weakest directions. Set matrices: average for this "
        "tensor, by a filter.",
    ),
    (
        "dominant",
        evidence(energies=(1.0, 9.0)),
        "b has 90% of the updates' energy, and second moments are not divided by their traces: the result follows "
        "that expert. Give that expert a smaller weight, or take wudi, which divides by the traces.",
    ),
    ("dominant", evidence(energies=(9.0, 1.0), gate=GATE), "weight, or lower heterogeneity_threshold."),
    (
        "gate",
        evidence(gate=GATE, heterogeneity=0.25, facts={"decision": gated(0.3512, True)}),
        "heterogeneity: published is 0.351, above the threshold 0.3, though the updates are of like norm (scale-free: "
        "0.25): it divides by the mean of log ||D||^2, which is near 0 here. Set heterogeneity: scale_free.",
    ),
    (
        "gate",
        evidence(gate=GATE, heterogeneity=0.25, facts={"decision": gated(math.inf, True)}),
        "heterogeneity: published is infinite, above the threshold 0.3",
    ),
    (
        "short",
        evidence(relative_to_mean=0.25),
        "the merged update has 0.25 times the norm of the experts' plain average. Raise lambda.",
    ),
    (
        "short",
        evidence(relative_to_mean=0.25, settings={"mean_over": "all"}),
        "average. Set mean_over: existing, or raise lambda.",
    ),
]


@pytest.mark.parametrize(("cause", "found", "words"), SENTENCES, ids=[f"{c}{i}" for i, (c, *_) in enumerate(SENTENCES)])
def test_every_sentence_of_the_rulebook(cause: str, found: Evidence, words: str) -> None:
    (rule,) = (rule for rule in RULES if rule.cause == cause)
    assert rule.extent(found) is not None
    sentence = f"{rule.what(found)}. {rule.remedy(found)}"
    assert words in sentence
    # Beginning or end of the sentence: a part from the middle would show neither.
    assert sentence.startswith(words) or sentence.endswith(words) or not words.endswith(".")


def test_the_sentence_of_tables() -> None:
    assert table_merged_as_matrix("wudi") == (
        "embeddings: wudi merges an embedding table or output head as if it were a linear map on shared inputs; the "
        "authors leave such tables out",
        "Leave embeddings at its default, or set it to base.",
    )


def test_how_far_a_rule_applies_orders_the_matrices() -> None:
    """The report shows the matrix that a rule applies to most."""
    extents = {
        "change": (evidence(relative_change=0.3), 0.3),
        "ridge": (evidence(facts={"ridge": 12.0}), 12.0),
        "average": (evidence(facts={"averaged": 0.6}), 0.6),
        "refinement": (evidence(energies=(1.0, 4.0), facts={"refinement_norm": 8.0}), 4.0),
        "condition": (evidence(facts={"condition": 2.0**21}), 0.25),
        "dominant": (evidence(energies=(9.0, 1.0)), 0.9),
        "gate": (evidence(gate=GATE, heterogeneity=0.2, facts={"decision": gated(0.4, True)}), 0.4),
        "short": (evidence(relative_to_mean=0.25), -0.25),
    }
    assert {rule.cause: rule.extent(extents[rule.cause][0]) for rule in RULES} == {
        cause: pytest.approx(extent) for cause, (_, extent) in extents.items()
    }
    dominant = next(rule for rule in RULES if rule.cause == "dominant")
    assert dominant.extent(evidence(energies=(9.0,))) is None
    assert dominant.extent(evidence(energies=(9.0, 1.0), facts={"decision": None})) is None


def test_a_dominant_expert_is_no_matter_of_one_matrix(caplog: pytest.LogCaptureFixture) -> None:
    """The report counts it; a log would name it for a single matrix of many."""
    assert logged(caplog, "actmat", ONE_SIDED) == []


def test_a_cause_is_logged_once_a_merge_and_again_in_the_next(caplog: pytest.LogCaptureFixture) -> None:
    two = {
        model: {NAME: t[NAME], NAME.replace("0", "1"): t[NAME]} for model, t in models(FULL, 0.3, torch.float32).items()
    }
    for _ in range(2):
        caplog.clear()
        merge_state_dicts(two, "ace", base="base")
        assert len(messages(caplog)) == 1
    # other names and no name are merges of their own
    tensors = [tensors[NAME] for tensors in two.values()]
    for names in ([None, None], ["a", "a"]):
        caplog.clear()
        for name in names:
            merge_tensors(tensors, "ace", base_index=0, name=name)
        assert len(messages(caplog)) == 2
    caplog.clear()
    for name in (None, "c", "d"):  # the last two: one merge, tensor by tensor
        merge_tensors(tensors, "ace", base_index=0, name=name)
    assert len(messages(caplog)) == 2


@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_what_a_merge_records_is_in_units_of_the_weights(size: float) -> None:
    """Updates of 1e-25 are merged in units of their own."""
    base = torch.zeros(60, 30)
    experts = [Expert(name=str(t), tensor=(size * update).float()) for t, update in enumerate(FULL)]
    ace = METHODS["ace"]
    merge = ace.merge(StoredTaskVectors(base, experts), {item.name: item.default for item in ace.parameters})
    assert merge.refinement is not None
    assert merge.facts().refinement_norm == pytest.approx(float(merge.refinement.update.double().norm()), rel=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return make_suite("llama", tmp_path_factory.mktemp("llama"), update=Update.EVEN)


def test_mergekit_yaml_warns_in_every_merge_of_a_process(
    llama: Suite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_for(llama) | {"parameters": {"epsilon": 1e6, "embeddings": "ace"}}
    for out in ("first", "second"):
        caplog.clear()
        mergekit_yaml(recipe, tmp_path / out)
        causes = sorted(message.partition(": ")[2].partition(" (")[0][:30] for message in messages(caplog))
        assert len(causes) == len(set(causes)) >= 2, messages(caplog)
        assert any("embeddings: ace merges an embedding table" in message for message in messages(caplog))
        assert any("the ridge (epsilon: 1e+06)" in message for message in messages(caplog))

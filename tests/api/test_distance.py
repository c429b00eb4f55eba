"""Distance: how far a converted model is from its teacher."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES, LENGTH, build, padded

from attnrewrite import (
    AttnRewriteError,
    RoutingConfig,
    SEAConfig,
    SelectiveConfig,
    SSAConfig,
    SymmetricConfig,
    VariantConfig,
    calibrate,
    conversion_of,
    convert,
    distances,
    load_pretrained,
    save_pretrained,
)
from attnrewrite.distances import Distance, distance
from attnrewrite.saving import REPORT

IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [SelectiveConfig(), SSAConfig()], ids=lambda c: c.variant)
def test_a_conversion_that_starts_as_identity_is_at_distance_zero(config: SelectiveConfig | SSAConfig) -> None:
    """Up to rounding, in every layer and head and at the output; later it is not."""
    teacher = tiny.llama().double()
    model = convert(copy.deepcopy(teacher), config, example_inputs=(IDS,))
    found = distance(model, teacher, [IDS])
    assert [row.layer for row in found.layers] == [f"model.layers.{n}.self_attn" for n in range(2)]
    assert all(len(row.maps) == len(row.outputs) == 4 for row in found.layers)
    assert max(x for row in found.layers for x in (*row.maps, *row.outputs)) < 1e-6
    assert found.kl is not None
    assert abs(found.kl) < 1e-12
    assert told(model) is None

    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "q_gain")):
            torch.nn.init.constant_(parameter, 20.0)
    moved = distance(model, teacher, [IDS])
    assert moved.kl is not None
    assert moved.kl > 1e-12
    assert all(min(max(row.maps), max(row.outputs)) > 1e-5 for row in moved.layers)


def test_distance_is_that_of_the_definition() -> None:
    """Doubled values in one layer: its maps do not move, its outputs are one norm away; the layer behind sees it."""
    teacher = tiny.llama().double()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(2.0)
    found = distance(model, teacher, [IDS, IDS[:, :5]])
    first, second = found.layers
    assert max(*first.maps, *first.outputs, *second.maps) == 0.0
    assert second.outputs == pytest.approx([1.0] * 4, abs=1e-12)


SEA = SEAConfig(slices=8, budget=3, max_length=32)
APPROXIMATIONS = [SelectiveConfig(mode="raw"), SymmetricConfig(max_error=1), SEA]


@pytest.mark.parametrize("config", APPROXIMATIONS, ids=lambda c: c.variant)
def test_a_conversion_that_starts_elsewhere_says_how_far_it_is(config: VariantConfig, tmp_path: Path) -> None:
    """In the model, in a copy and in the saved report; a model that is loaded has no original to be far from."""
    teacher = tiny.llama()
    model = convert(copy.deepcopy(teacher), config, example_inputs=(IDS,), example_kwargs={"use_cache": False})
    found = told(copy.deepcopy(model))
    assert found is not None
    assert found == distance(model, teacher, [IDS])
    assert found.kl is not None
    assert found.kl > 1e-9
    assert all(x > 0 for row in found.layers for x in row.outputs)
    folder = save_pretrained(model, tmp_path / "saved")
    report = json.loads((folder / REPORT).read_text())["distance"]
    assert [row["maps"] for row in report["layers"]] == [list(row.maps) for row in found.layers]
    assert told(load_pretrained(folder)) is None


def told(model: torch.nn.Module) -> Distance | None:
    found = conversion_of(model)
    assert found is not None
    return found.distance


def test_nothing_is_said_where_there_is_nothing_to_measure() -> None:
    """Where the user does not want it, and of what waits for its calibration; then the model is its own teacher."""
    assert told(convert(tiny.llama(), SelectiveConfig(mode="raw"), example_inputs=(IDS,), verify=False)) is None
    model = convert(tiny.llama(), RoutingConfig(clusters=2, window_size=2), example_inputs=(IDS,))
    assert told(model) is None
    calibrate(model, [IDS])
    found = distance(model, model, [IDS])
    assert found == distance(model, tiny.llama(), [IDS])
    assert min(x for row in found.layers for x in row.maps) > 1e-3


def test_attention_is_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts add up to the whole, and what is kept of a teacher is not of the size of its attention weights."""
    teacher, ids = tiny.llama(), torch.randint(96, (2, 40))
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(30.0)
    kept = [value for t in distances.record(teacher, ids).attentions for value in t.values.values()]
    assert max(value.numel() for value in kept) < 2 * 4 * 40 * 40
    whole = distance(model, teacher, [ids])
    monkeypatch.setattr(distances, "_COLUMNS", 7)
    monkeypatch.setattr(distances, "_POSITIONS", 11)
    parts = distance(model, teacher, [ids])
    for ours, theirs in zip(parts.layers, whole.layers, strict=True):
        assert (*ours.maps, *ours.outputs) == pytest.approx((*theirs.maps, *theirs.outputs), rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-9)


def test_queries_at_padding_do_not_count() -> None:
    """What routing gives there is 0, which the teacher does not; nothing reads either."""
    family = next(family for family in FAMILIES if family.name == "bert")
    teacher, inputs = build(family, "eager"), padded(family.inputs())
    model = convert(copy.deepcopy(teacher), RoutingConfig(clusters=1, window_size=LENGTH), example_kwargs=inputs)
    calibrate(model, [inputs])
    found = distance(model, teacher, [inputs])
    assert max(x for row in found.layers for x in (*row.maps, *row.outputs)) < 1e-5


def test_next_tokens_at_padding_do_not_count() -> None:
    teacher = tiny.llama().double()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    inputs = padded({"input_ids": IDS[:, :LENGTH]})
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        p, q = (x(**inputs, use_cache=False).logits[real].log_softmax(-1) for x in (teacher, model))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert distance(model, teacher, [inputs]).kl == pytest.approx(float(expected), rel=1e-9)
    whole = distance(model, teacher, [{"input_ids": inputs["input_ids"]}]).kl
    assert whole != pytest.approx(float(expected), rel=1e-6)


def test_a_soft_cap_is_part_of_the_teachers_attention() -> None:
    family = next(family for family in FAMILIES if family.name == "gemma2")
    teacher, inputs = build(family, "eager"), family.inputs()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "q_proj" in name:
                parameter.mul_(5000.0)
    model = convert(copy.deepcopy(teacher), SelectiveConfig(), example_kwargs=inputs)
    found = distance(model, teacher, [inputs])
    assert max(x for row in found.layers for x in (*row.maps, *row.outputs)) < 1e-3


def test_models_of_other_layers_are_refused() -> None:
    for layers in (1, 3):
        with pytest.raises(AttnRewriteError, match="AR102"):
            distance(tiny.llama(), tiny.llama(num_hidden_layers=layers), [IDS])

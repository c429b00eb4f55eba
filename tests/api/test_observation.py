"""Observe: the tensors of every attention while the model runs."""

from __future__ import annotations

import pytest
import tiny
import torch

from attnrewrite import SelectiveConfig, convert
from attnrewrite.observation import Observed, outputs_observed
from attnrewrite.passes.rules import RULES
from attnrewrite.passes.rules.sdpa import exact


def test_every_attention_of_every_batch_is_seen_and_nothing_is_changed() -> None:
    """Layers come in order, for batches of several lengths; the tensors give the layer's own attention."""
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.randint(96, (2, n)) for n in (9, 12, 1)]
    seen: list[tuple[str, int]] = []

    def see(at: Observed) -> None:
        assert at.request.variant == "sdpa"
        assert torch.isfinite(exact(at.tensors)).all()
        seen.append((at.site.layer, at.tensors.query().shape[2]))

    model.train()
    assert [out.logits.shape[1] for out in outputs_observed(model, batches, see)] == [9, 12, 1]
    layers = [f"model.layers.{n}.self_attn" for n in range(2)]
    assert seen == [(layer, n) for n in (9, 12, 1) for layer in layers]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("as_mapping", [False, True])
def test_a_converted_model_is_observed_as_it_was(as_mapping: bool) -> None:
    """What a layer sees is that of the original model, whatever the conversion would make of it."""
    ids = torch.randint(96, (2, 12))
    batches = [{"input_ids": ids} if as_mapping else (ids,)]
    model = tiny.llama()
    queries: list[torch.Tensor] = []
    plain = [out.logits for out in outputs_observed(model, batches, lambda at: queries.append(at.tensors.query()))]

    convert(model, SelectiveConfig(), example_inputs=(ids,))
    for parameter in (p for name, p in model.named_parameters() if name.endswith("gamma")):
        torch.nn.init.constant_(parameter, 50.0)
    again: list[torch.Tensor] = []
    ours: list[torch.Tensor] = []

    def see(at: Observed) -> None:
        again.append(at.tensors.query())
        ours.append(RULES[at.request.variant].function(at.request)(at.tensors) - exact(at.tensors))

    assert all(map(torch.equal, plain, [out.logits for out in outputs_observed(model, batches, see)]))
    assert all(map(torch.equal, queries, again))
    assert all(float(x.abs().max()) > 1e-5 for x in ours)

    (found,) = outputs_observed(model, batches, lambda at: None, converted=True)
    assert torch.equal(found.logits, model(ids).logits)
    assert not torch.equal(found.logits, plain[0])

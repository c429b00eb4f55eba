"""Soundness: whatever one small change makes of an attention is refused, or rewritten to exactly what it became."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from grid import DIM, HEADS, Cell, Composed
from mutations import mutate, mutations
from spellings import GroupedEinsum, LearnedScale, MemoryKeys, MultiQuery, NanoGPT, SingleHead, TransposedScores
from torch import nn

from attnrewrite.explanation import export_model
from attnrewrite.passes.graph.capture import Capture, from_program
from attnrewrite.passes.pipeline import Pipeline

CELLS = [
    Cell("bhld", "scores_over", "add_inf"),
    Cell("bmm", "query_times", "where_min", "written_out", "interleave"),
    Cell("einsum", "scores_times", "alibi", "logsumexp"),
    Cell("key_permuted", "key_times", "padding_causal", "maximum_off", "expand"),
    Cell("five_dims", "both", "tril_zero", "log", extra="weights"),
    Cell("sequence_first", "query_over", "window", groups="index"),
    Cell("ellipsis", "rsqrt", "floored"),
]
MODELS = [
    *(pytest.param(lambda c=c: nn.Sequential(Composed([c])), True, id=c.name) for c in CELLS),
    *(
        pytest.param(cls, False, id=cls.__name__)
        for cls in (NanoGPT, GroupedEinsum, LearnedScale, MemoryKeys, MultiQuery, SingleHead, TransposedScores)
    ),
]


def captured(make: object, padded: bool) -> tuple[Capture, list[torch.Tensor]]:
    """Capture a model in float64; return also the values of all placeholders."""
    torch.manual_seed(0)
    model = make().double().eval()  # type: ignore[operator]  # a module's class
    pad = torch.ones(2, 9, dtype=torch.bool)
    pad[0, :2] = False
    x = torch.randn(2, 9, HEADS * DIM, dtype=torch.float64)
    model = model[0] if isinstance(model, nn.Sequential) else model
    program = export_model(model, (x, pad) if padded else (x,), {})
    held = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    targets = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    inputs = iter([x, pad])
    capture = from_program(program)
    names = [node.name for node in capture.module.graph.find_nodes(op="placeholder")]
    return capture, [held[targets[name]] if name in targets else next(inputs) for name in names]


@pytest.mark.parametrize(("make", "padded"), MODELS)
def test_no_change_is_overlooked(make: object, padded: bool) -> None:
    capture, values = captured(make, padded)
    plain = run(capture, values)
    verdicts: Counter[str] = Counter()
    for mutation in mutations(capture.module.graph):
        mutated = mutate(capture, mutation)
        if mutated is None:
            continue
        before = run(mutated, values)
        report, _ = Pipeline().rewrite(mutated)
        rewritten = report.summary["rewritten"] > 0
        after = run(mutated, values)
        equal = before.shape == after.shape and torch.allclose(before, after, rtol=1e-8, atol=1e-8, equal_nan=True)
        assert equal, f"{mutation.name}: {[(s.status, s.mask, s.spelling) for s in report.sites]}"
        changed = before.shape != plain.shape or not torch.allclose(before, plain, equal_nan=True)
        verdicts[("exact" if rewritten else "refused") if changed else "without effect"] += 1
    assert verdicts["refused"] + verdicts["exact"] >= 30, verdicts
    assert verdicts["refused"] and verdicts["exact"], verdicts


def run(capture: Capture, values: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = fx_outputs(capture, values)
    return torch.cat([x.double().flatten() for x in found])


def fx_outputs(capture: Capture, values: list[torch.Tensor]) -> list[torch.Tensor]:
    out = torch.fx.Interpreter(capture.module).run(*(v.clone() for v in values))
    return [x for x in out if isinstance(x, torch.Tensor)]

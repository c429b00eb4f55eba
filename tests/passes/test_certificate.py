"""A certificate that cannot fail proves nothing: every mistake in the normal form must break it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, build, padded
from spellings import FoldedHeads, GroupedEinsum, LearnedScale, NanoGPT
from torch import nn

from attnrewrite.explanation import capture_model
from attnrewrite.passes.attention.form import Attention
from attnrewrite.passes.matching.match import match
from attnrewrite.passes.proof.certificate import Prover


def alpha(site: Attention) -> None:
    site.scores.alpha *= 1.01


def drop_term(site: Attention) -> None:
    site.scores.terms.pop()


def flip_term(site: Attention) -> None:
    site.scores.terms[-1].when ^= True
    site.scores.terms[-1].weight *= -1


def causal(site: Attention) -> None:
    site.scores.is_causal ^= True


def softcap(site: Attention) -> None:
    site.scores.softcap = 1.01 * site.scores.softcap if site.scores.softcap else 5.0


def swap_operands(site: Attention) -> None:
    site.query, site.key = site.key, site.query


def swap_heads_and_batch(site: Attention) -> None:
    site.kv_heads, site.groups, site.batch = site.batch, (), site.kv_heads + site.groups
    site.groups, site.kv_heads = site.kv_heads[:0], site.kv_heads


def drop_factor(site: Attention) -> None:
    site.scores.factors.pop()


def transpose_output(site: Attention) -> None:
    site.output_layout = (*site.output_layout[:-2], site.output_layout[-1], site.output_layout[-2])


def first_site(make: Callable[[], nn.Module]) -> Attention:
    torch.manual_seed(0)
    return match(capture_model(make(), (torch.randn(2, 13, 32),), {})).attentions[0]


def family_site(name: str) -> Attention:
    family = next(f for f in FAMILIES if f.name == name)
    return match(capture_model(build(family, "eager"), (), padded(family.inputs()))).attentions[0]


SITES: dict[str, Callable[[], Attention]] = {
    "nanogpt": lambda: first_site(NanoGPT),
    "folded": lambda: first_site(FoldedHeads),
    "einsum": lambda: first_site(GroupedEinsum),
    "scale": lambda: first_site(LearnedScale),
    "llama": lambda: family_site("llama"),
    "gemma2": lambda: family_site("gemma2"),
    "t5": lambda: family_site("t5"),
}
MUTANTS = [
    *[(name, m) for name in SITES for m in (alpha, causal, softcap, transpose_output)],
    *[(name, m) for name in ("nanogpt", "folded", "llama", "gemma2", "t5") for m in (drop_term, flip_term)],
    ("llama", swap_operands),
    ("nanogpt", swap_operands),
    ("scale", drop_factor),
]


@pytest.mark.parametrize("name", SITES)
def test_the_true_normal_form_is_proved(name: str) -> None:
    assert Prover().prove(SITES[name]()) == ""


@pytest.mark.parametrize(("name", "mutate"), MUTANTS, ids=[f"{n}-{m.__name__}" for n, m in MUTANTS])
def test_every_mutant_is_refused(name: str, mutate: Callable[[Attention], None]) -> None:
    site = SITES[name]()
    mutate(site)
    assert Prover().prove(site) != ""


def test_a_failed_certificate_rejects_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    import attnrewrite
    from attnrewrite.passes.matching import match as module

    honest = module._from_softmax

    def wrong(softmax: object, reader: object) -> Attention:
        site = honest(softmax, reader)  # type: ignore[arg-type]  # passed through
        alpha(site)
        return site

    monkeypatch.setattr(module, "_from_softmax", wrong)
    (site,) = attnrewrite.explain(NanoGPT(), torch.randn(2, 13, 32)).sites
    assert (site.status, site.certificate, site.rejections[0].code) == ("rejected", "failed", "AR205")

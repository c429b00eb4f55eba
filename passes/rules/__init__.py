"""How a site becomes each variant: one rule per file."""

from attnrewrite.passes.rules.base import Rule
from attnrewrite.passes.rules.routing import RoutingRule
from attnrewrite.passes.rules.sdpa import SdpaRule
from attnrewrite.passes.rules.sea import SEARule
from attnrewrite.passes.rules.selective import SelectiveRule
from attnrewrite.passes.rules.ssa import SSARule
from attnrewrite.passes.rules.symmetric import SymmetricRule

RULES: dict[str, Rule] = {
    rule.variant: rule for rule in (SdpaRule(), SelectiveRule(), SSARule(), SymmetricRule(), RoutingRule(), SEARule())
}
"""Variant name -> rule. A sixth variant adds itself here through ``attnrewrite.register_variant``."""

"""How a site becomes each variant: one rule per file."""

from importlib import import_module

from attnrewrite.passes.rules.base import Rule

_OWN = {
    "sdpa": "SdpaRule",
    "selective": "SelectiveRule",
    "ssa": "SSARule",
    "symmetric": "SymmetricRule",
    "routing": "RoutingRule",
    "sea": "SEARule",
    "selective_ssa": "SelectiveSSARule",
}


class _Rules(dict[str, Rule]):
    """The library's own rules are imported when they are first asked for: most processes need one."""

    def __missing__(self, variant: str) -> Rule:
        if variant not in _OWN:
            raise KeyError(variant)
        rule: Rule = getattr(import_module(f"{__name__}.{variant}"), _OWN[variant])()
        self[variant] = rule
        return rule

    def __contains__(self, variant: object) -> bool:
        return super().__contains__(variant) or variant in _OWN


RULES: dict[str, Rule] = _Rules()
"""Variant name -> rule. A variant of another package adds itself here through ``attnrewrite.register_variant``."""

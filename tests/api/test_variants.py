"""The registry: configs both ways, and what cannot be registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from attnrewrite import (
    AttnRewriteError,
    RoutingConfig,
    SEAConfig,
    SelectiveConfig,
    SelectiveSSAConfig,
    SSAConfig,
    SymmetricConfig,
    VariantConfig,
    list_variants,
    register_variant,
)
from attnrewrite.variants import VariantInfo, config_fields, parse_config

CONFIGS = [
    SelectiveConfig("raw", 3, False),
    SSAConfig(position="sigmoid"),
    SymmetricConfig("symmetric", max_error=0.5),
    RoutingConfig(routing_heads=(0, 3), local_heads=(1,), local_window=8),
    SEAConfig(slices=64, positions="fourier"),
    SelectiveSSAConfig(mode="raw", gate="full"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_survive_json(config: VariantConfig) -> None:
    assert VariantConfig.from_dict(config.to_dict()) == config


def test_configs_are_read_from_text() -> None:
    found = parse_config("selective", {"mode": "raw", "selection_head": "2", "protect_first": "no"})
    assert found == SelectiveConfig("raw", 2, False)
    fields = {"routing_heads": "0, 3", "window_size": "none", "local_heads": "", "ema_decay": "0.9"}
    assert parse_config("routing", fields) == RoutingConfig(routing_heads=(0, 3), ema_decay=0.9)
    for settings in ({"selection_head": "two"}, {"protect_first": "perhaps"}):
        with pytest.raises(AttnRewriteError, match="AR303"):
            parse_config("selective", settings)


def test_every_field_of_every_variant_is_documented() -> None:
    for info in list_variants():
        assert info.paper
        assert all(doc for _, _, _, doc in config_fields(info.config))


@dataclass(frozen=True)
class OtherConfig(VariantConfig):
    """Another variant."""

    variant: ClassVar[str] = "other"


@pytest.mark.parametrize("name", ["sdpa", "another", "other"])
def test_what_cannot_be_registered_is_said(name: str) -> None:
    """Sdpa is taken, the config of `another` has a different name, and `other` has no rule."""
    before = [info.name for info in list_variants()]
    config = type(list_variants()[0].config()) if name == "sdpa" else OtherConfig
    with pytest.raises(AttnRewriteError, match="AR314"):
        register_variant(VariantInfo(name, "", False, False, "", config))
    assert [info.name for info in list_variants()] == before

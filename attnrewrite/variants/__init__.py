"""The variants: one file each with its config and parameters, and the registry."""

from attnrewrite.variants.base import Swap as Swap
from attnrewrite.variants.base import VariantConfig as VariantConfig
from attnrewrite.variants.base import VariantInfo as VariantInfo
from attnrewrite.variants.base import config_fields as config_fields
from attnrewrite.variants.base import list_variants as list_variants
from attnrewrite.variants.base import parse_config as parse_config
from attnrewrite.variants.base import register_variant as register_variant
from attnrewrite.variants.base import variant_info as variant_info
from attnrewrite.variants.routing import RoutingConfig as RoutingConfig
from attnrewrite.variants.sdpa import SdpaConfig as SdpaConfig
from attnrewrite.variants.sea import SEAConfig as SEAConfig
from attnrewrite.variants.selective import SelectiveConfig as SelectiveConfig
from attnrewrite.variants.ssa import SSAConfig as SSAConfig
from attnrewrite.variants.symmetric import SymmetricConfig as SymmetricConfig

for _info in (
    VariantInfo(
        "sdpa",
        "the exact rewrite to fused attention",
        False,
        False,
        "Vaswani et al. 2017, arXiv 1706.03762",
        SdpaConfig,
    ),
    VariantInfo(
        "selective",
        "one head votes tokens out for later queries",
        True,
        True,
        "Leviathan, Kalman, Matias, ICLR 2025, arXiv 2410.02703",
        SelectiveConfig,
    ),
    VariantInfo(
        "ssa",
        "a temperature per query and per value, from token and position",
        True,
        True,
        "Zhang et al., NeurIPS 2024, arXiv 2411.12892",
        SSAConfig,
    ),
    VariantInfo(
        "symmetric",
        "queries and keys from one projection, with a matrix per head between them",
        True,
        True,
        "Courtois, Ostendorff, Hennig, Rehm, Findings of ACL 2024, arXiv 2406.06366",
        SymmetricConfig,
    ),
    VariantInfo(
        "routing",
        "tokens attend within clusters that follow the data",
        True,
        True,
        "Roy, Saffar, Vaswani, Grangier, TACL 2021, arXiv 2003.05997",
        RoutingConfig,
    ),
    VariantInfo(
        "sea",
        "a small network estimates the attention, and the best keys are attended",
        True,
        True,
        "Lee, Kim, Willette, Hwang, ICLR 2024, arXiv 2310.01777",
        SEAConfig,
    ),
):
    register_variant(_info)

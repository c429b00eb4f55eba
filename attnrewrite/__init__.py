"""Find the attention in any PyTorch model and rewrite it, through ``torch.compile`` or ``convert``.

Importing this package imports neither torch nor anything heavy: every public name is loaded at first use.
"""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# `passes/` and `kernels/` lie beside this folder in a checkout and inside it in a wheel. They are not put on
# `__path__`, because the checkout would then hold this package a second time, inside itself.
if not (Path(__file__).parent / "passes").is_dir():
    for _name in ("passes", "kernels"):
        _folder = Path(__file__).parents[1] / _name
        _spec = spec_from_file_location(
            f"{__name__}.{_name}", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
        )
        if _spec is not None and _spec.loader is not None:
            sys.modules[_spec.name] = globals()[_name] = module_from_spec(_spec)
            _spec.loader.exec_module(sys.modules[_spec.name])

if TYPE_CHECKING:
    from attnrewrite import functional as functional
    from attnrewrite.backend import Backend as Backend
    from attnrewrite.calibration import calibrate as calibrate
    from attnrewrite.calibration import update as update
    from attnrewrite.commitment import with_commitment as with_commitment
    from attnrewrite.conversion import conversion_of as conversion_of
    from attnrewrite.conversion import convert as convert
    from attnrewrite.conversion import fit_errors as fit_errors
    from attnrewrite.conversion import restore as restore
    from attnrewrite.distances import distance as distance
    from attnrewrite.distillation import distill as distill
    from attnrewrite.errors import AttnRewriteError as AttnRewriteError
    from attnrewrite.errors import AttnRewriteWarning as AttnRewriteWarning
    from attnrewrite.explanation import explain as explain
    from attnrewrite.exporting import export as export
    from attnrewrite.memory import MemoryLoss as MemoryLoss
    from attnrewrite.passes.report import Report as Report
    from attnrewrite.patterns import list_patterns as list_patterns
    from attnrewrite.patterns import register_pattern as register_pattern
    from attnrewrite.patterns import unregister_pattern as unregister_pattern
    from attnrewrite.saving import load_pretrained as load_pretrained
    from attnrewrite.saving import save_pretrained as save_pretrained
    from attnrewrite.variants import RoutingConfig as RoutingConfig
    from attnrewrite.variants import SdpaConfig as SdpaConfig
    from attnrewrite.variants import SEAConfig as SEAConfig
    from attnrewrite.variants import SelectiveConfig as SelectiveConfig
    from attnrewrite.variants import SelectiveSSAConfig as SelectiveSSAConfig
    from attnrewrite.variants import SSAConfig as SSAConfig
    from attnrewrite.variants import SymmetricConfig as SymmetricConfig
    from attnrewrite.variants import VariantConfig as VariantConfig
    from attnrewrite.variants import list_variants as list_variants
    from attnrewrite.variants import register_variant as register_variant

_PUBLIC = {
    "AttnRewriteError": "errors",
    "AttnRewriteWarning": "errors",
    "Backend": "backend",
    "MemoryLoss": "memory",
    "Report": "passes.report",
    "RoutingConfig": "variants",
    "SEAConfig": "variants",
    "SSAConfig": "variants",
    "SdpaConfig": "variants",
    "SelectiveConfig": "variants",
    "SelectiveSSAConfig": "variants",
    "SymmetricConfig": "variants",
    "VariantConfig": "variants",
    "calibrate": "calibration",
    "conversion_of": "conversion",
    "convert": "conversion",
    "distance": "distances",
    "distill": "distillation",
    "explain": "explanation",
    "export": "exporting",
    "fit_errors": "conversion",
    "functional": "functional",
    "list_patterns": "patterns",
    "list_variants": "variants",
    "load_pretrained": "saving",
    "register_pattern": "patterns",
    "register_variant": "variants",
    "restore": "conversion",
    "save_pretrained": "saving",
    "unregister_pattern": "patterns",
    "update": "calibration",
    "with_commitment": "commitment",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'attnrewrite' has no attribute {name!r}")
    module = import_module(f"attnrewrite.{_PUBLIC[name]}")
    value = module if name == _PUBLIC[name] == "functional" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

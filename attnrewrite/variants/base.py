"""Variant configs: frozen dataclasses, JSON both ways; and the registry of variants."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from attnrewrite.kernels.diagnostics import closest, error

if TYPE_CHECKING:
    import torch

    from attnrewrite.observation import Observed
    from attnrewrite.passes.attention.form import Attention
    from attnrewrite.passes.graph.capture import Capture
    from attnrewrite.passes.report import Site


@dataclass(frozen=True, eq=False)
class Swap:
    """What a conversion puts in the place of a layer's own modules.

    ``modules`` by path, as in the model; ``details`` is JSON from which the config makes them again.
    """

    modules: Mapping[str, torch.nn.Module]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Calibrator(Protocol):
    """Sets the state of one converted layer from what it sees, in two passes over the same batches.

    Nothing of the layer changes before ``apply``.
    """

    @property
    def seen(self) -> bool:
        """Whether the first pass called ``collect``."""
        ...

    def collect(self, at: Observed, share: float, generator: torch.Generator) -> None:
        """Take samples from one call of the layer, in the first pass; ``share`` is 1 over the number of batches."""

    def fit(self, generator: torch.Generator) -> None:
        """Compute the state from the samples."""

    def measure(self, at: Observed) -> None:
        """Compare what the layer would give with what it gives, in the second pass."""

    def apply(self) -> None:
        """Write the state into the layer."""

    def rows(self) -> list[dict[str, Any]]:
        """Return what was measured, as rows of a table with plain data."""
        ...


@dataclass(frozen=True)
class VariantConfig:
    """Base of every variant's config.

    Subclasses set ``variant`` and, where they add parameters, override ``module``. Fields are numbers, strings,
    booleans, tuples of integers, or None; a string field that takes one of few values declares it with ``Literal``.
    """

    variant: ClassVar[str] = ""

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Refuse unknown fields with the closest known one. Raises VariantError AR302."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                names = closest(key, known) if known else "it has no fields"
                raise error("AR302", f"{cls.variant} has no config key {key!r}; {names}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        kinds = _types(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            _check(self.variant, field.name, value, kinds[field.name])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, with the variant's name under ``variant``."""
        return {"variant": self.variant, **dataclasses.asdict(self)}

    @property
    def adds_parameters(self) -> bool:
        """Whether this config needs ``convert``."""
        return False

    @property
    def starts_as_identity(self) -> bool:
        """Whether a converted model computes the same function before it is trained."""
        return False

    @property
    def learns_from_inputs(self) -> bool:
        """Whether a layer in training updates buffers from what it sees, apart from gradients."""
        return False

    @property
    def swaps_modules(self) -> bool:
        """Whether ``convert`` replaces modules of the model, by ``swaps``, and adds none with ``module``."""
        return False

    def swaps(
        self,
        model: torch.nn.Module,
        capture: Capture,
        sites: Mapping[str, tuple[Attention, Site]],
        run: Callable[[], object],
    ) -> dict[str, Swap]:
        """Return what to replace in each layer of ``sites``; a layer that is missing stays as it is.

        ``capture`` is the graph that the sites and their rows of the report come from; ``run`` runs the model, as it
        is, on the example inputs. The model is not changed. Raises VariantError where that is not possible.
        """
        raise NotImplementedError

    def swapped_modules(self, model: torch.nn.Module, details: Mapping[str, Any]) -> dict[str, torch.nn.Module]:
        """Return the modules of a Swap with these ``details``, to load values into.

        Raises SaveError AR603 where ``model`` has no such modules, AR604 where the details are incomplete.
        """
        raise NotImplementedError

    @property
    def state_names(self) -> tuple[str, ...]:
        """What a key-value cache holds beside keys and values: the names of ``new_state``."""
        return ()

    @property
    def state_is_optional(self) -> bool:
        """Whether a call may do without the state, for a cache of another kind or one that is filled already."""
        return False

    @property
    def summed_state(self) -> tuple[str, ...]:
        """Names of the state ``[B, S]`` of a key that later tokens change.

        Under ``NAME_after`` the rewrite finds room ``[B, K, S]`` for it as it is after each of the last K tokens of a
        call, so that a cache can take tokens back.
        """
        return ()

    @property
    def adds_to_output(self) -> bool:
        """Whether the rewrite also writes into ``added`` what the output gets added, of the shape of the input."""
        return False

    def new_state(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the cache holds for new tokens, ``[B, L, ...]`` by name; the rewrite writes into it.

        ``x`` ``[B, L, d]`` is the layer's input, ``holder`` the layer's new parameters.
        """
        return {}

    @property
    def summary_names(self) -> tuple[str, ...]:
        """What a key-value cache holds per sequence, beside ``state_names``: the names of ``new_summary``."""
        return ()

    def new_summary(self, holder: torch.nn.Module | None, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the cache holds of no tokens, ``[B, ...]`` by name; the rewrite writes into it.

        Arguments as in ``new_state``.
        """
        return {}

    @property
    def draft_names(self) -> tuple[str, ...]:
        """What is noted of the last tokens, so that they can be taken back: the names of ``new_drafts``."""
        return ()

    def new_drafts(self, holder: torch.nn.Module | None, x: torch.Tensor, room: int) -> dict[str, torch.Tensor]:
        """Return room for the last ``room`` tokens of a call, ``[B, room, ...]`` by name, or longer by a fixed lead.

        The rewrite writes into it. Other arguments as in ``new_state``.
        """
        return {}

    def taken_back(
        self, summary: Mapping[str, torch.Tensor], drafts: Mapping[str, torch.Tensor], count: int
    ) -> dict[str, torch.Tensor]:
        """Return the summary without the last ``count`` of the tokens that ``drafts`` tell of."""
        return dict(summary)

    def module(self, site: Attention, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """Return the module that holds the parameters and buffers of one layer, at their initial values."""
        raise NotImplementedError

    def empty_module(self, shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
        """Return the same module for state of known shapes, with names as in ``state_dict``, to load values into."""
        raise NotImplementedError

    def calibrator(self, layer: str, holder: torch.nn.Module) -> Calibrator | None:
        """Return what sets the state of one converted layer from activations; None where nothing is to be set."""
        return None

    def update(self, layer: str, holder: torch.nn.Module) -> None:
        """Advance what a converted layer learned apart from gradients, after an optimizer step."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> VariantConfig:
        """Rebuild a config from ``to_dict``. Raises VariantError AR301, AR302, AR303."""
        fields = dict(data)
        name = fields.pop("variant", cls.variant)
        return variant_info(name).config(**fields)


@dataclass(frozen=True)
class VariantInfo:
    """One row of the registry."""

    name: str
    summary: str
    changes_meaning: bool
    adds_parameters: bool
    paper: str
    config: type[VariantConfig]


_REGISTRY: dict[str, VariantInfo] = {}


def register_variant(info: VariantInfo, rule: object | None = None) -> None:
    """Add a variant: its config and, from another package, its rewrite rule (see ``attnrewrite.passes.rules.base``).

    Raises VariantError AR314 where the name is taken, differs between the parts, or has no rule.
    """
    if info.name in _REGISTRY:
        raise error("AR314", f"a variant named {info.name!r} is registered already")
    if info.config.variant != info.name:
        raise error("AR314", f"the config's variant is {info.config.variant!r}, the registration says {info.name!r}")
    from attnrewrite.passes.rules import RULES

    if rule is not None:
        RULES[info.name] = typing.cast("typing.Any", rule)
    if info.name not in RULES:
        raise error(
            "AR314", f"{info.name!r} has no rule", hint="pass rule=, an object like those in attnrewrite.passes.rules"
        )
    _REGISTRY[info.name] = info


def list_variants() -> list[VariantInfo]:
    """Return every registered variant, in order of registration."""
    return list(_REGISTRY.values())


def variant_info(name: str) -> VariantInfo:
    """Look a variant up by name. Raises VariantError AR301."""
    if name not in _REGISTRY:
        raise error("AR301", f"there is no variant {name!r}; {closest(str(name), _REGISTRY)}")
    return _REGISTRY[name]


def parse_config(name: str, settings: Mapping[str, str]) -> VariantConfig:
    """Build a config from text, as the command line gives it. Raises VariantError AR301, AR302, AR303."""
    config = variant_info(name).config
    known = _types(config)
    values = {key: _parse(name, key, text, known[key]) if key in known else text for key, text in settings.items()}
    return config(**values)


def config_fields(config: type[VariantConfig]) -> list[tuple[str, str, Any, str]]:
    """Return (name, type, default, description) of every field."""
    docs = _field_docs(config)
    kinds = _types(config)
    return [(f.name, _type_name(kinds[f.name]), f.default, docs.get(f.name, "")) for f in dataclasses.fields(config)]


def _types(config: type[VariantConfig]) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config)}


def _check(variant: str, name: str, value: Any, kind: Any) -> None:
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise error("AR303", f"{variant}.{name} is {value!r}; {closest(str(value), typing.get_args(kind))}")
        return
    accepted = [typing.get_origin(t) or t for t in _alternatives(kind)]
    if float in accepted:
        accepted.append(int)
    integers = isinstance(value, tuple) and all(type(n) is int for n in value)
    wrong = not integers if isinstance(value, tuple) else isinstance(value, bool) and bool not in accepted
    if wrong or not isinstance(value, tuple(accepted)):
        raise error("AR303", f"{variant}.{name} is {value!r}, a {type(value).__name__}; it takes {_type_name(kind)}")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _parse(variant: str, name: str, text: str, kind: Any) -> Any:
    if isinstance(kind, types.UnionType):
        if text.lower() == "none" and types.NoneType in typing.get_args(kind):
            return None
        kind = next(t for t in typing.get_args(kind) if t is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return tuple(_parse(variant, name, part, int) for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise error("AR303", f"{variant}.{name} is {text!r}; it takes true or false")
        return text.lower() in ("true", "1", "yes")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise error("AR303", f"{variant}.{name} is {text!r}; it takes {_type_name(kind)}") from None
    return text


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " | ".join(map(_type_name, typing.get_args(kind)))
    if kind is types.NoneType:
        return "None"
    return str(kind) if typing.get_origin(kind) else getattr(kind, "__name__", str(kind))


def _field_docs(config: type[VariantConfig]) -> dict[str, str]:
    """Read the ``name: text`` lines of the class's docstring."""
    docs: dict[str, str] = {}
    names = {f.name for f in dataclasses.fields(config)}
    last = ""
    for line in (config.__doc__ or "").splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name in names:
            docs[name] = last_text = text.strip()
            last = name if last_text else ""
        elif last and line.strip():
            docs[last] += " " + line.strip()
        else:
            last = ""
    return docs

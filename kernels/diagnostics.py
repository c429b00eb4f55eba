"""Errors and warnings that carry a diagnostic code; ``codes.py`` holds the table of the codes.

This module lies at the lowest room of the import order so that each room can raise coded errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from attnrewrite.kernels.codes import DIAGNOSTICS as DIAGNOSTICS
from attnrewrite.kernels.codes import Diagnostic as Diagnostic


class AttnRewriteError(Exception):
    """Base of every error of this library; ``code``, ``title`` and ``hint`` identify the cause.

    The message says what happened and where, then the reason, then what to do.
    """

    def __init__(self, code: str, detail: str, *, layer: str = "", source: str = "", hint: str | None = None) -> None:
        self.code = code
        self.title = DIAGNOSTICS[code].title
        self.detail = detail
        self.layer = layer
        self.source = source
        self.hint = DIAGNOSTICS[code].hint if hint is None else hint
        super().__init__(code, detail)

    def __str__(self) -> str:
        place = "  ".join(part for part in (self.layer, self.source) if part)
        lines = [f"{self.code} {self.title}" + (f" ({place})" if place else ""), self.detail]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n  ".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self)._rebuild, (self.code, self.detail, self.layer, self.source, self.hint))

    @classmethod
    def _rebuild(cls, code: str, detail: str, layer: str, source: str, hint: str) -> AttnRewriteError:
        return cls(code, detail, layer=layer, source=source, hint=hint)


class CaptureError(AttnRewriteError):
    """AR1xx: options, inputs and capture."""


class MatchError(AttnRewriteError):
    """AR2xx: finding and proving attention."""


class VariantError(AttnRewriteError):
    """AR3xx: variants, their configs and their parameters."""


class LoweringError(AttnRewriteError):
    """AR4xx: implementations and the arguments given to them."""


class TuningError(AttnRewriteError):
    """AR5xx: tuning and its store."""


class SaveError(AttnRewriteError):
    """AR6xx: saving and loading."""


class InternalError(AttnRewriteError):
    """AR9xx: a defect of this library."""


class AttnRewriteWarning(UserWarning):
    """Base of every warning of this library; the message begins with a code."""


_FAMILIES: dict[str, type[AttnRewriteError]] = {
    "AR1": CaptureError,
    "AR2": MatchError,
    "AR3": VariantError,
    "AR4": LoweringError,
    "AR5": TuningError,
    "AR6": SaveError,
    "AR9": InternalError,
}


def error(code: str, detail: str, *, layer: str = "", source: str = "", hint: str | None = None) -> AttnRewriteError:
    """Build the error of ``code``; its class follows from the code's family."""
    return _FAMILIES[code[:3]](code, detail, layer=layer, source=source, hint=hint)


def closest(name: str, valid: Iterable[str]) -> str:
    """Say which of ``valid`` is meant by ``name``, and list them all: `did you mean 'x'? valid: x, y`."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (f"did you mean {near[0]!r}? " if near else "") + f"valid: {', '.join(names)}"

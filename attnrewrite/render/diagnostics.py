"""The page of all diagnostics; ``python -m attnrewrite.render.diagnostics FILE`` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from attnrewrite.kernels.diagnostics import DIAGNOSTICS

FAMILIES = {
    "AR1": "Options, inputs, capture",
    "AR2": "Finding and proving attention",
    "AR3": "Variants and their parameters",
    "AR4": "Implementations",
    "AR5": "Tuning and its store",
    "AR6": "Saving and loading",
    "AR9": "Defects of this library",
}

_INTRODUCTION = """# Diagnostics

Every error, warning and rejection carries one of these codes. `attnrewrite code AR203` shows one offline.

<!-- Made from the table in kernels/codes.py by `make docs`; do not edit. -->
"""


def markdown() -> str:
    """Return the page."""
    parts = [_INTRODUCTION]
    for family, title in FAMILIES.items():
        parts.append(f"## {family}xx: {title}\n")
        for diagnostic in DIAGNOSTICS.values():
            if diagnostic.code.startswith(family):
                hint = diagnostic.hint[:1].upper() + diagnostic.hint[1:]
                parts.append(f"### {diagnostic.code}: {diagnostic.title}\n")
                nearest = f"**Nearest accepted form:** {diagnostic.nearest}.\n\n" if diagnostic.nearest else ""
                parts.append(f"{diagnostic.explanation}\n\n{nearest}**What to do:** {hint}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")

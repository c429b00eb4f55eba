"""Results as Markdown: one table per entry, one page per profile."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HEAD = (
    "| case | provider | metric | p50 | p20 to p80 | n | floor | over floor | goal |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
)


def page(profile: str, folder: Path, order: list[str]) -> str:
    """Write every result of ``folder`` as one page."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    parts = [
        f"# Benchmarks: profile `{profile}`",
        f"Written by `python benchmarks/run.py --profile {profile}`.",
    ]
    for name in (name for name in order if name in found):
        parts.append(section(found[name]))
        parts += [f"![{name}]({profile}/{name}.svg)"] if (folder / f"{name}.svg").exists() else []
    return "\n\n".join(parts) + "\n"


def section(result: Mapping[str, Any]) -> str:
    """Write one entry's result."""
    rows = [_row(figure) for figure in result["figures"]]
    tables = {name: value for name, value in result["facts"].items() if isinstance(value, list)}
    facts = [f"- {name}: {_plain(value)}" for name, value in result["facts"].items() if name not in tables]
    parts = [f"## {result['entry']}", result["question"], "\n".join([*_HEAD, *rows])]
    parts += [f"### {name}\n\n{_records(value)}" for name, value in tables.items() if value]
    parts += ["\n".join(facts)] if facts else []
    parts += [*result["notes"], _where(result["environment"])]
    return "\n\n".join(parts)


def _row(figure: Mapping[str, Any]) -> str:
    unit = "" if figure["unit"] == "1" else f" {figure['unit']}"
    goal = figure["goal"]
    held = "" if goal is None else f"{goal['sense']} {goal['value']:g}{unit}: {'met' if figure['met'] else 'MISSED'}"
    floor = "" if figure["floor"] is None else f"{figure['floor']:.3g}{unit}"
    over = "" if figure["over_floor"] is None else f"{figure['over_floor']:.3g} x"
    spread = f"{figure['p20']:.3g} to {figure['p80']:.3g}"
    cells = [figure["case"], figure["provider"], figure["metric"], f"{figure['p50']:.3g}{unit}", spread]
    return "| " + " | ".join([*cells, str(len(figure["samples"])), floor, over, held]) + " |"


def _records(records: list[Mapping[str, Any]]) -> str:
    """Write records as a table of all their fields."""
    fields = list(dict.fromkeys(name for record in records for name in record))
    lines = [[str(record.get(name, "")).replace("|", "/") for name in fields] for record in records]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (fields, ["---"] * len(fields), *lines))


def _plain(value: Any) -> str:
    return ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _where(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    gpu = f"; {', '.join(f'{k} {v}' for k, v in environment['gpu'].items())}" if "gpu" in environment else ""
    return (
        f"{environment['date']}; {environment['cpu']}, {environment['cores']} cores,"
        f" {environment['threads']} threads{gpu};"
        f" load per core at the start {environment['load_per_core_at_start']}; {versions}."
    )

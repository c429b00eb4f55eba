"""``attnrewrite env``: what this machine offers."""

from __future__ import annotations

from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb


@click.command(cls=Verb, examples=("env", "env --format json"))
@click.pass_obj
def command(output: Output) -> None:
    """Show versions, devices and settings."""
    from attnrewrite.env import environment

    facts = environment()
    output.result(facts, lambda: _view(facts))


def _view(facts: dict[str, Any]) -> RenderableType:
    versions = [(name, version or "not installed") for name, version in facts["versions"].items()]
    devices = [(device["kind"], _device(device)) for device in facts["devices"]]
    parts = [_table("versions", [*versions, ("platform", facts["platform"])]), _table("devices", devices)]
    if facts["variables"]:
        parts.append(_table("variables", list(facts["variables"].items())))
    return Group(*parts)


def _device(device: dict[str, Any]) -> str:
    facts = [f"{key} {value}" for key, value in device.items() if key not in ("kind", "name")]
    return ", ".join([device["name"], *facts])


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0), title_justify="left")
    table.title, table.title_style = title, "bold"
    for name, value in rows:
        table.add_row(Text(f"  {name}", style="dim"), Text(value))
    return table

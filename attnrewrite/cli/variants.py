"""``attnrewrite variants``: the registered variants and their fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb
from attnrewrite.kernels.diagnostics import closest, error

if TYPE_CHECKING:
    from attnrewrite.variants import VariantInfo


@click.command(cls=Verb, examples=("variants", "variants ssa", "variants --format json"))
@click.argument("name", required=False)
@click.pass_obj
def command(output: Output, name: str | None) -> None:
    """List the attention variants, or show one with its fields."""
    from attnrewrite.variants import list_variants

    known = {info.name: info for info in list_variants()}
    if name is None:
        data = {"variants": [_facts(info) for info in known.values()]}
        output.result(data, lambda: _list(list(known.values())))
    elif name in known:
        fields = _fields(known[name])
        output.result({**_facts(known[name]), "fields": fields}, lambda: _page(known[name], fields))
    else:
        raise error("AR301", f"{name!r}: {closest(name, known)}")


def _facts(info: VariantInfo) -> dict[str, Any]:
    names = ("name", "summary", "changes_meaning", "adds_parameters", "paper")
    return {name: getattr(info, name) for name in names}


def _fields(info: VariantInfo) -> list[dict[str, Any]]:
    from attnrewrite.variants import config_fields

    keys = ("name", "type", "default", "doc")
    return [dict(zip(keys, field, strict=True)) for field in config_fields(info.config)]


def _list(infos: list[VariantInfo]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("variant", "changes meaning", "adds parameters", "paper", "what it is"):
        table.add_column(title)
    for info in infos:
        marks = ("yes" if flag else "no" for flag in (info.changes_meaning, info.adds_parameters))
        table.add_row(Text(info.name, style="bold"), *marks, Text(info.paper), Text(info.summary))
    return table


def _page(info: VariantInfo, fields: list[dict[str, Any]]) -> RenderableType:
    changes = "changes what the model computes" if info.changes_meaning else "keeps what the model computes"
    adds = "adds parameters (use convert)" if info.adds_parameters else "adds no parameters"
    parts: list[RenderableType] = [
        Text.assemble((info.name, "bold"), f"  {info.summary}"),
        Text(f"{changes}; {adds}; {info.paper}", style="dim"),
    ]
    if fields:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for title in ("field", "type", "default", "meaning"):
            table.add_column(title)
        for field in fields:
            cells = (str(field["type"]), repr(field["default"]), str(field["doc"]))
            table.add_row(Text(field["name"], style="bold"), *(Text(cell) for cell in cells))
        parts += ["", table]
    return Group(*parts)

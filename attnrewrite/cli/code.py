"""``attnrewrite code``: the page of a diagnostic."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb
from attnrewrite.kernels.diagnostics import DIAGNOSTICS, Diagnostic, closest, error


@click.command(cls=Verb, examples=("code", "code AR203", "code AR203 --format json"))
@click.argument("code", required=False)
@click.pass_obj
def command(output: Output, code: str | None) -> None:
    """Explain a diagnostic code, or list them all.

    Works offline: the pages are part of the package.
    """
    if code is None:
        entries = {name: diagnostic.title for name, diagnostic in DIAGNOSTICS.items()}
        output.result({"codes": entries}, lambda: _list(entries))
        return
    diagnostic = DIAGNOSTICS.get(code.upper())
    if diagnostic is None:
        raise error("AR102", f"there is no diagnostic {code!r}; {closest(code.upper(), DIAGNOSTICS)}")
    output.result(asdict(diagnostic), lambda: _page(diagnostic))


def _list(entries: dict[str, str]) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for code, title in entries.items():
        table.add_row(Text(code, style="bold"), title)
    return table


def _page(diagnostic: Diagnostic) -> RenderableType:
    head = Text.assemble((diagnostic.code, "bold"), f"  {diagnostic.title}  ", (f"since {diagnostic.since}", "dim"))
    nearest = [Text(f"nearest accepted form: {diagnostic.nearest}")] if diagnostic.nearest else []
    body = Group(diagnostic.explanation, "", *nearest, Text(f"hint: {diagnostic.hint}", style="cyan"))
    return Group(head, "", Padding(body, (0, 0, 0, 2)))

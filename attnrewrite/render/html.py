"""The page view of a Report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from attnrewrite.passes.report import Report
from attnrewrite.render.groups import groups
from attnrewrite.render.rows import duration, rejections, short_source


def html_view(report: Report) -> str:
    """Return the page. Every text of the report is escaped: a layer name cannot become markup."""
    pages = Environment(
        loader=PackageLoader("attnrewrite", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pages.filters["short_source"] = short_source
    return pages.get_template("report.html").render(
        report=report,
        groups=groups(report),
        rejections=rejections(report),
        timings={step: duration(ms) for step, ms in report.timings_ms.items()},
    )


def write_html(report: Report, path: Path) -> None:
    """Write the page; a reader never sees half of it."""
    write_text(path, html_view(report))


def write_text(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` in one step, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files for the owner alone; a report is meant to be shown around.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise

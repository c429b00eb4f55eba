"""Run the benchmarks: ``python benchmarks/run.py [--profile cpu|gpu] [--only NAME] [--out FOLDER]``."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import click  # noqa: E402  # the suite is found through the path above
from rich.console import Console  # noqa: E402
from rich.markdown import Markdown  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from suite.environment import environment  # noqa: E402
from suite.registry import ENTRIES, PROFILES, Entry  # noqa: E402
from suite.table import page, section  # noqa: E402

EXIT_NO_DEVICE = 3
LIMITS = {"gpu": 540}
"""Seconds that a profile may take."""
SCHEMA_VERSION = 1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--profile", type=click.Choice(PROFILES), default="cpu", show_default=True)
@click.option("--only", "names", multiple=True, metavar="NAME", help="Run this entry; may be repeated.")
@click.option("--list", "listing", is_flag=True, help="List the entries and stop.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=HERE / "results",
    show_default="benchmarks/results",
    help="Folder for PROFILE/NAME.json and PROFILE.md.",
)
def main(profile: str, names: tuple[str, ...], listing: bool, out: Path) -> None:
    """Run the benchmarks of a profile and write what they find.

    `smoke` runs every entry at a tiny size: its figures mean nothing, but it shows that everything works.

    Exit codes: 0 done; 1 an entry failed; 2 wrong usage; 3 the profile needs a device that is not there.
    """
    chosen = [ENTRIES[name] for name in _known(names)]
    if listing:
        for entry in chosen:
            click.echo(f"{entry.name} ({', '.join(entry.sizes)}): {entry.question}")
        return
    wanted = [entry for entry in chosen if profile in entry.sizes]
    if not wanted:
        raise click.UsageError(f"{', '.join(e.name for e in chosen)} has no {profile} profile")
    if profile == "gpu" and not _has_cuda():
        click.echo("no CUDA device: the gpu profile was not run, and no result was written", err=True)
        sys.exit(EXIT_NO_DEVICE)
    sys.exit(_run_all(wanted, profile, out))


def _run_all(wanted: list[Entry], profile: str, out: Path) -> int:
    """Run what there is time for; an entry's size says how many ``seconds`` it takes at most."""
    start, worst = time.monotonic(), 0
    for entry in wanted:
        left = LIMITS.get(profile, math.inf) - (time.monotonic() - start)
        if entry.sizes[profile].get("seconds", 0) > left:
            click.echo(f"left out, as there is no time for it: --profile {profile} --only {entry.name}", err=True)
        else:
            worst = max(worst, _run(entry, profile, out))
    return worst


def _known(names: tuple[str, ...]) -> list[str]:
    for name in names:
        if name not in ENTRIES:
            near = difflib.get_close_matches(name, ENTRIES, 1, 0)
            raise click.BadParameter(f"there is no entry {name!r}; did you mean {near[0]!r}?", param_hint="--only")
    return list(names or ENTRIES)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _run(entry: Entry, profile: str, out: Path) -> int:
    """Run one entry and write its result; return 1 if it failed."""
    console = Console(stderr=True)
    facts = environment()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(entry.name)

        def tick(label: str, done: int, total: int) -> None:
            progress.update(bar, description=f"{entry.name}: {label}", completed=done, total=total)

        try:
            found = entry.run(profile, tick)
        except Exception:
            console.print_exception()
            return 1
    # A tiny size says nothing about a goal.
    judged = [replace(f, goal=None) for f in found.figures] if profile == "smoke" else found.figures
    result: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "entry": entry.name,
        "question": entry.question,
        "profile": profile,
        "size": dict(entry.sizes[profile]),
        "environment": facts,
        "figures": [figure.to_dict() for figure in judged],
        "facts": found.facts,
        "notes": found.notes,
    }
    folder = out / profile
    folder.mkdir(parents=True, exist_ok=True)
    if found.drawing:
        (folder / f"{entry.name}.svg").write_text(found.drawing, encoding="utf-8")
    (folder / f"{entry.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / f"{profile}.md").write_text(page(profile, folder, list(ENTRIES)), encoding="utf-8")
    Console().print(Markdown(section(result)))
    return 0


if __name__ == "__main__":
    main()

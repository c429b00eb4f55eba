"""The pack that comes with the library: ``make pack`` tunes the usual shapes on this machine's GPU, and adds them.

What the pack has is left alone, so that it can be made in several sittings, on several devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress

from attnrewrite.kernels.dense.catalogue import VARIANTS
from attnrewrite.kernels.dense.sample import Recipe
from attnrewrite.kernels.dense.space import SPACES
from attnrewrite.kernels.diagnostics import AttnRewriteError
from attnrewrite.kernels.store.bundled import FOLDER, bundled
from attnrewrite.kernels.store.key import Key
from attnrewrite.kernels.store.local import put_file
from attnrewrite.kernels.store.modes import Mode
from attnrewrite.kernels.store.pack import pack
from attnrewrite.kernels.store.tiers import Store
from attnrewrite.kernels.tuning.tasks import Task, of_recipe, recipes
from attnrewrite.tuning import Place, Result, Session, open_device

FAMILY = "dense"
TOKENS = 16384
"""Of a batch in training."""
LENGTHS = (4096, 8192, 2048, 1024)
CACHES = (4096, 32768)
"""Tokens in the cache of a step, and of the prompt before it."""
HEADS = ((16, 16), (32, 8))
WIDTHS = (128, 64)


def usual() -> Iterator[Recipe]:
    """Yield calls of every variant: training on a batch, symmetric attention also both ways; then prompts and steps."""
    call: dict[str, Any] = {"dtype": "bfloat16", "causal": True}
    for length in LENGTHS:
        for D, (H, Hkv), variant in _heads():
            sizes = {"B": TOKENS // length, "H": H, "Hkv": Hkv, "D": D, "Dv": D, "lengths": (length,)}
            yield from recipes(variant, **sizes, **call, learns=True, step=False)
            if variant == "symmetric" and Hkv == H:
                yield from recipes(variant, **sizes, **{**call, "causal": False}, learns=True, step=False)
    for D, (H, Hkv), variant in _heads():
        yield from recipes(variant, B=1, H=H, Hkv=Hkv, lengths=CACHES, D=D, Dv=D, **call, learns=False, step=True)


def _heads() -> Iterator[tuple[int, tuple[int, int], str]]:
    yield from ((D, heads, variant) for D in WIDTHS for heads in HEADS for variant in VARIANTS)


def tasks(place: Place) -> list[Task]:
    """Return every kernel that the usual calls launch, once for each key."""
    found: dict[Key, Task] = {}
    for recipe in usual():
        for task in of_recipe(recipe, place.device, place.where):
            found.setdefault(task.key, task)
    return list(found.values())


def fill(session: Session, wanted: Sequence[Task], folder: Path) -> list[Result]:
    """Tune what the pack in ``folder`` lacks, and write it anew, also where that is interrupted."""
    with Progress() as progress:
        bar = progress.add_task("tuning", total=len(wanted))
        try:
            return session.tune(wanted, lambda text, done: progress.update(bar, description=text, completed=done))
        finally:
            found = (session.store.find(task.key, SPACES[task.key.kernel]) for task in wanted)
            records = bundled(FAMILY, folder)
            records |= {each.record.key: each.record for each in found if each is not None and each.tier != "near"}
            folder.mkdir(exist_ok=True)
            put_file(folder / f"{FAMILY}.jsonl", pack(records.values()))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=FOLDER)
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Seconds in all. [default: no limit]")
@click.option("--effort", type=click.Choice(("quick", "full")), default="full", show_default=True)
@click.option("--device", default="cuda", show_default=True)
def main(folder: Path, budget: float | None, effort: str, device: str) -> None:
    """Add the usual shapes to the pack in FOLDER."""
    try:
        place = open_device(device)
    except AttnRewriteError as failure:
        raise click.ClickException(str(failure)) from failure
    session = Session(Store(mode=Mode(search="full"), packs=folder), place, effort, budget)
    results = fill(session, tasks(place), folder)
    for what in dict.fromkeys(result.what for result in results):
        click.echo(f"{sum(result.what == what for result in results)} {what}")


if __name__ == "__main__":
    main()

"""``attnrewrite tune``: find the fastest configuration of every kernel that a model or a variant runs."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb
from attnrewrite.kernels.diagnostics import closest, error

if TYPE_CHECKING:
    from attnrewrite.kernels.store.modes import Search
    from attnrewrite.kernels.store.tiers import Store
    from attnrewrite.kernels.tuning.tasks import Task

DTYPES = ("bfloat16", "float16", "float32")
_EXAMPLES = (
    "tune ./my-model-ssa --seq-len 2048 --seq-len 8192",
    "tune --variant selective --heads 32 --kv-heads 8 --head-dim 128 --seq-len 4096",
    "tune ./my-model-ssa --seq-len 2048 --dry-run",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@click.argument("model", required=False)
@click.option("--variant", help="Tune the kernels of a variant, in the place of those of MODEL.")
@click.option("--seq-len", "lengths", type=click.IntRange(min=1), multiple=True, help="Tokens; may be repeated.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences.")
@click.option("--heads", type=click.IntRange(min=1), default=16, show_default=True, help="With --variant.")
@click.option("--kv-heads", type=click.IntRange(min=1), help="With --variant. [default: --heads]")
@click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True, help="With --variant.")
@click.option("--causal/--bidirectional", default=True, show_default=True, help="With --variant.")
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True)
@click.option("--backward/--no-backward", default=True, show_default=True, help="Whether to tune for training too.")
@click.option(
    "--step/--no-step", default=True, show_default=True, help="With --variant: also one query, as in decoding."
)
@click.option("--effort", type=click.Choice(("quick", "full")), default="full", show_default=True, help="How thorough.")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Seconds in all. [default: no limit]")
@click.option("--refresh", is_flag=True, help="Tune again what is stored.")
@click.option("--verify", is_flag=True, help="Only compare stored winners with their runners-up once more.")
@click.option("--device", default="cuda", show_default=True, help="Such as cuda:1.")
@click.option("--dry-run", is_flag=True, help="Say what would be tuned; time nothing.")
@click.pass_obj
def command(
    output: Output,
    /,
    model: str | None,
    variant: str | None,
    lengths: tuple[int, ...],
    budget: float | None,
    verify: bool,
    refresh: bool,
    dry_run: bool,
    device: str,
    effort: str,
    **call: Any,
) -> int:
    """Find the fastest configuration of every kernel that MODEL, or a variant, runs, and store it.

    What is stored already is left as it is. Every kernel is compiled ahead of time in its most promising
    configurations, checked and timed in a process of its own. Interrupted, it keeps what was measured. Exits with 2
    where there is no GPU, and with 1 where a kernel could not be tuned.
    """
    if (model is None) == (variant is None):
        raise click.UsageError("Give either MODEL or --variant.")
    if refresh and verify:
        raise click.UsageError("--verify compares what is stored, and --refresh leaves that aside: give one of them.")
    from attnrewrite.render.tuning import results_view, tasks_view
    from attnrewrite.tuning import Session, open_device

    place = open_device(device)
    with output.step("looking for kernels"):
        found = _of_variant(variant, place, lengths, call) if variant else _of_model(str(model), place, lengths, call)
    store = _store(effort, refresh)
    if not found:
        output.note("no generated kernel is run, so that there is nothing to tune")
    if dry_run:
        known = [(task, _tier(store, task)) for task in found]
        data = {"tasks": [{"kernel": t.key.kernel, "key": t.key.digest, "stored": tier} for t, tier in known]}
        output.result(data, lambda: tasks_view(known))
        return 0
    output.untouched = f"what was measured is in {store.local.root if store.local else 'memory'}"
    session = Session(store, place, effort, budget, verify)
    with output.progress() as progress:
        bar = progress.add_task("tuning", total=len(found))

        def tell(text: str, done: int) -> None:
            progress.update(bar, description=text, completed=done)

        results = session.tune(found, tell)
    seconds = round(sum(result.seconds for result in results), 1)
    output.result(
        {"tuned": [result.to_json() for result in results], "seconds": seconds}, lambda: results_view(results)
    )
    return 1 if any(result.what == "failed" for result in results) else 0


def _of_variant(variant: str, place: Any, lengths: tuple[int, ...], call: dict[str, Any]) -> list[Task]:
    from attnrewrite.kernels.dense.catalogue import VARIANTS
    from attnrewrite.kernels.tuning.tasks import of_recipe, recipes

    if variant not in VARIANTS:
        raise error("AR403", f"{variant} has no generated kernels; {closest(variant, VARIANTS)}", hint="")
    heads, kv_heads = call["heads"], call["kv_heads"] or call["heads"]
    if heads % kv_heads:
        raise click.UsageError(f"{heads} heads cannot share {kv_heads} heads of keys.")
    wanted = recipes(
        variant,
        B=call["batch"],
        H=heads,
        Hkv=kv_heads,
        lengths=lengths or (2048,),
        D=call["head_dim"],
        Dv=call["head_dim"],
        dtype=call["dtype"],
        causal=call["causal"],
        learns=call["backward"],
        step=call["step"],
    )
    found = (task for recipe in wanted for task in of_recipe(recipe, place.device, place.where))
    return list({task.key: task for task in found}.values())


def _of_model(model: str, place: Any, lengths: tuple[int, ...], call: dict[str, Any]) -> list[Task]:
    from attnrewrite.loading import LoadOptions, load_model
    from attnrewrite.tuning import of_model

    found: dict[Any, Task] = {}
    for length in lengths or (512,):
        loaded = load_model(model, LoadOptions(call["batch"], length, call["dtype"]))
        found |= {task.key: task for task in of_model(loaded, place, learns=call["backward"])}
    return list(found.values())


def _store(effort: str, refresh: bool) -> Store:
    from attnrewrite.kernels.store.breaker import Breaker
    from attnrewrite.kernels.store.modes import VARIABLE, parse
    from attnrewrite.kernels.store.settings import open_store

    mode = parse(os.environ.get(VARIABLE, ""))
    if mode.readonly:
        raise error("AR102", f"{VARIABLE} says readonly, so that nothing could be stored")
    search: Search = "full" if effort == "full" else "quick"
    patient = Breaker(in_vain=10, in_all=120)  # here waiting for a store costs less than timing does
    return open_store(replace(mode, search=search, refresh=refresh, strict=False), patient)


def _tier(store: Store, task: Task) -> str | None:
    from attnrewrite.kernels.dense.space import SPACES

    found = store.find(task.key, SPACES[task.key.kernel])
    return None if found is None else found.tier

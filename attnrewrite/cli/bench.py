"""``attnrewrite bench``: time, memory and error of variants beside what others offer, over sweeps of sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb, check_out

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType

    from attnrewrite.bench.attentions import Attention
    from attnrewrite.bench.run import Bench

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
PASSES = ("forward", "backward", "forward+backward", "decode")
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULTS = {
    "cpu": {"batch": 1, "heads": 8, "seq_len": 512, "head_dim": 64},
    "cuda": {"batch": 4, "heads": 16, "seq_len": 4096, "head_dim": 64},
}
_EXAMPLES = (
    "bench",
    "bench --variant selective --variant ssa --sweep seq_len=512:4k:x2 --csv times.csv",
    "bench --variant routing:clusters=8 --baseline sdpa-flash --pass backward --pass decode",
)
_file = click.Path(path_type=Path, dir_okay=False)


class _Size(click.ParamType[int]):
    """A size as in a sweep: 512, or 4k."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it."""
        from attnrewrite.bench.sweep import size_of

        try:
            return size_of(str(value), str(value))
        except ValueError as cause:
            self.fail(f"{cause}.", param, ctx)


_size = _Size()


@click.command(cls=Verb, examples=_EXAMPLES)
@click.option(
    "--variant", "variants", multiple=True, metavar="NAME[:K=V,…]", help="Measure this variant. [default: all]"
)
@click.option(
    "--baseline", "baselines", multiple=True, metavar="NAME", help="Measure this beside them. [default: sdpa]"
)
@click.option("--sweep", "sweeps", multiple=True, metavar="AXIS=SIZES", help="Vary a size; several make the product.")
@click.option("--pass", "passes", multiple=True, type=click.Choice(PASSES), help="What is timed. [default: forward]")
@click.option("--device", type=click.Choice(("cpu", "cuda")), help="[default: cuda where there is a GPU]")
@click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16", "float64")),
    help="[default: float32; bfloat16 on a GPU]",
)
@click.option("--kernels", type=click.Choice(("auto", "reference", "triton")), default="auto", show_default=True)
@click.option("--batch", type=_size, help="[default: 1; 4 on a GPU]")
@click.option("--heads", type=_size, help="Query heads. [default: 8; 16 on a GPU]")
@click.option("--kv-heads", type=_size, help="Heads of keys and values. [default: as many]")
@click.option("--seq-len", type=_size, help="Keys, and queries but in decode. [default: 512; 4096 on a GPU]")
@click.option("--head-dim", type=_size, help="Features of a head. [default: 64]")
@click.option("--causal/--no-causal", default=True, show_default=True, help="Who sees whom.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Begin nothing later.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the CPU. [default: torch's]")
@click.option("--csv", "csv_file", type=_file, help="Write a line for each measurement.")
@click.option("--json", "json_file", type=_file, help="Write the result as JSON.")
@click.option("--svg", "svg_file", type=_file, help="Draw milliseconds over the first sweep.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@click.pass_obj
def command(
    output: Output,
    /,
    variants: tuple[str, ...],
    baselines: tuple[str, ...],
    sweeps: tuple[str, ...],
    passes: tuple[str, ...],
    device: str | None,
    dtype: str | None,
    kernels: Any,
    causal: bool,
    seconds: float,
    csv_file: Path | None,
    json_file: Path | None,
    svg_file: Path | None,
    overwrite: bool,
    threads: int | None,
    **sizes: int | None,
) -> int:
    """Measure variants and what others offer for the same, side by side.

    SIZES are numbers (64,128), a factor (1k:32k:x2) or a step (512:2k:+512), of seq_len, head_dim, batch, heads or
    kv_heads; k is 1024. Options of a variant are fields of its config, as in `attnrewrite variants NAME`. Ctrl-C
    ends the run; what was measured is shown and written.
    """
    if svg_file and not sweeps:
        raise click.UsageError("--svg draws over a sweep, and there is no --sweep.")
    files = _files(output, {"csv": csv_file, "json": json_file, "svg": svg_file}, overwrite)
    for axis, size in sizes.items():
        if size and any(text.partition("=")[0].strip().replace("-", "_") == axis for text in sweeps):
            raise click.UsageError(f"{axis} is given and swept.")
    _points(DEFAULTS["cpu"], sizes, sweeps)  # before torch is imported, which takes its time
    with output.step("importing torch"):
        import torch

        from attnrewrite.bench.run import Bench

    place = _device(device)
    names = baselines or ("sdpa",)
    bench = Bench(
        _points(DEFAULTS[place.type], sizes, sweeps),
        _attentions(variants, names),
        names[0],
        list(dict.fromkeys(passes)) or ["forward"],
        place,
        getattr(torch, dtype or DTYPES[place.type]),
        causal,
        seconds,
        kernels,
    )
    interrupted = _run(output, bench, threads)
    data = _data(bench, interrupted, threads)
    for form, file in files.items():
        _write(file, form, bench, data, sweeps)
    output.result(data, lambda: _view(bench, data))
    for file in files.values():
        output.note(f"wrote {file}")
    if interrupted:
        output.note("interrupted; what was measured before is kept")
        return EXIT_INTERRUPTED
    return 0 if any(row.ms is not None for row in bench.rows) else EXIT_ERROR


def _files(output: Output, wanted: dict[str, Path | None], overwrite: bool) -> dict[str, Path]:
    files = {form: file for form, file in wanted.items() if file}
    if len(set(files.values())) < len(files):
        raise click.UsageError("Two formats go into one file.")
    for file in files.values():
        check_out(output, file, overwrite)
    output.untouched = "nothing was measured"
    return files


def _points(
    defaults: Mapping[str, int], given: Mapping[str, int | None], sweeps: Sequence[str]
) -> list[dict[str, int]]:
    """Return the points of all sweeps, the sizes in the order of the axes."""
    from attnrewrite.bench.sweep import AXES, points

    fixed = {axis: size for axis in AXES if (size := given.get(axis) or defaults.get(axis))}
    try:
        found = points(fixed, sweeps)
    except ValueError as cause:
        raise click.BadParameter(f"{cause}.", param_hint="--sweep") from cause
    for point in found:
        if point["heads"] % point.setdefault("kv_heads", point["heads"]):
            raise click.UsageError(f"{point['heads']} heads cannot share {point['kv_heads']} kv_heads evenly.")
    return [{axis: point[axis] for axis in AXES} for point in found]


def _device(wanted: str | None) -> torch.device:
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise click.BadParameter(
            "this machine has no GPU that torch can use; nothing was measured.", param_hint="--device"
        )
    return torch.device(wanted or ("cuda" if there else "cpu"))


def _attentions(variants: Sequence[str], baselines: Sequence[str]) -> dict[str, Attention]:
    """Return what is measured by name, the baselines first."""
    from attnrewrite.bench.peers import peer
    from attnrewrite.bench.variants import names, variant

    found = {name: peer(name) for name in baselines}
    for text in variants or names():
        found[f"{text} (variant)" if text in found else text] = variant(text)
    return found


def _run(output: Output, bench: Bench, threads: int | None) -> bool:
    """Measure, and return whether that was interrupted."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    with output.progress() as progress:
        bar = progress.add_task("")
        try:
            bench.run(lambda label, done, total: progress.update(bar, description=label, completed=done, total=total))
        except KeyboardInterrupt:
            return True
        finally:
            torch.set_num_threads(before)
    return False


def _data(bench: Bench, interrupted: bool, threads: int | None) -> dict[str, Any]:
    import torch

    from attnrewrite.env import environment

    facts = environment()
    name = next(device["name"] for device in facts["devices"] if device["kind"] == bench.device.type)
    settings = {
        "device": bench.device.type,
        "device_name": name,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "causal": bench.causal,
        "kernels": bench.kernels,
        "baseline": bench.baseline,
        "threads": threads or torch.get_num_threads(),
        "seconds": bench.seconds,
    }
    rows = [row.to_dict() for row in bench.rows]
    return {"settings": settings, "versions": facts["versions"], "interrupted": interrupted, "rows": rows}


def _write(file: Path, form: str, bench: Bench, data: Mapping[str, Any], sweeps: Sequence[str]) -> None:
    from attnrewrite.bench.sweep import sweep
    from attnrewrite.kernels.store.local import put_file
    from attnrewrite.render.bench import to_csv, to_svg

    if form == "csv":
        text = to_csv(bench.rows, data["settings"])
    elif form == "svg":
        text = to_svg(bench.rows, data["settings"], sweep(sweeps[0])[0])
    else:
        text = json.dumps(data, indent=1) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    put_file(file, text.encode())


def _view(bench: Bench, data: Mapping[str, Any]) -> RenderableType:
    from attnrewrite.render.bench import bench_view

    return bench_view(bench.rows, data["settings"])

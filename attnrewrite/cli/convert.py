"""``attnrewrite convert``: put a variant into a model and save the result."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb, check_out, model_argument, out_argument, overwrite_option, seq_len_option
from attnrewrite.kernels.diagnostics import error

if TYPE_CHECKING:
    from attnrewrite.distances import Distance
    from attnrewrite.loading import LoadedModel
    from attnrewrite.variants import VariantConfig

_EXAMPLES = (
    "convert ./my-model ./my-model-ssa --variant ssa",
    "convert ./my-model ./out --variant selective --target 'model.layers.1*' --dry-run",
    "convert ./my-model ./out --variant ssa --set position=sigmoid --overwrite",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@model_argument
@out_argument
@click.option("--variant", help="The variant; see `attnrewrite variants`.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="JSON: one config, or a plan of globs on layers to configs.",
)
@click.option("--set", "settings", multiple=True, metavar="K=V", help="Set a field of the variant's config.")
@click.option("--target", "targets", multiple=True, metavar="GLOB", help="Convert these layers. [default: all]")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these layers as they are.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare outputs before and after.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@overwrite_option
@seq_len_option(32, "Tokens of the example sequence.")
@click.pass_obj
def command(
    output: Output,
    model: str,
    out: Path,
    variant: str | None,
    config: Path | None,
    settings: tuple[str, ...],
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    verify: bool,
    dry_run: bool,
    overwrite: bool,
    seq_len: int,
) -> None:
    """Put a variant into MODEL and write it to OUT.

    OUT holds the files of MODEL untouched, plus the conversion: its config, the new weights, a report.
    """
    from attnrewrite.conversion import conversion_of, convert, fit_errors, new_parameters
    from attnrewrite.loading import LoadOptions, load_model

    if not dry_run:
        check_out(output, out, overwrite)
    plan = _plan(variant, config, settings)
    with output.step(f"loading {model}"):
        loaded = load_model(model, LoadOptions(seq_len=seq_len))
    before = sum(parameter.numel() for parameter in loaded.model.parameters())
    with output.step(f"converting {loaded.name}"):
        convert(
            loaded.model,
            plan,
            example_inputs=loaded.example_inputs,
            example_kwargs=loaded.example_kwargs,
            targets=targets or "*",
            exclude=exclude,
            verify=verify,
        )
    conversion = conversion_of(loaded.model)
    assert conversion is not None  # convert raises where nothing was done
    added = sum(parameter.numel() for _, parameter in new_parameters(loaded.model))
    data = {
        "model": loaded.name,
        "out": str(out),
        "sites": {layer: config.to_dict() for layer, config in conversion.sites.items()},
        "new_parameters": added,
        "removed_parameters": before + added - sum(parameter.numel() for parameter in loaded.model.parameters()),
        "fit_errors": fit_errors(loaded.model),
        "distance": None if conversion.distance is None else asdict(conversion.distance),
        "needs_calibration": any(config.learns_from_inputs for config in conversion.sites.values()),
        "verified": verify,
        "dry_run": dry_run,
    }
    if not dry_run:
        _save(loaded, out, overwrite)
    data["files"] = [] if dry_run else sorted(entry.name for entry in out.iterdir())
    output.result(data, lambda: _view(data, conversion.distance))


def _plan(
    variant: str | None, file: Path | None, settings: tuple[str, ...]
) -> VariantConfig | dict[str, VariantConfig]:
    """Build the plan from ``--variant`` with ``--set``, or from ``--config``."""
    from attnrewrite.variants import VariantConfig, parse_config

    if (variant is None) == (file is None):
        raise click.UsageError("Name either --variant or --config; `attnrewrite variants` lists the variants.")
    if file is not None:
        if settings:
            raise click.UsageError("--set goes with --variant; put the fields into the file.")
        data = _read_json(file)
        if "variant" in data:
            return VariantConfig.from_dict(data)
        return {layer: VariantConfig.from_dict(entry) for layer, entry in data.items()}
    fields = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.BadParameter(f"{setting!r} is not of the form K=V.", param_hint="--set")
        fields[key] = value
    return parse_config(str(variant), fields)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error("AR602", f"{file} cannot be read as JSON: {cause}") from cause
    plan = isinstance(data, dict) and ("variant" in data or all(isinstance(entry, dict) for entry in data.values()))
    if not plan or not data:
        detail = 'it must be {"variant": ...} or a plan {"model.layers.*": {"variant": ...}, ...}'
        raise error("AR602", f"{file} is no config: {detail}")
    return dict(data)


def _save(loaded: LoadedModel, out: Path, overwrite: bool) -> None:
    from attnrewrite.saving import save_conversion, save_pretrained

    if loaded.source is None:
        save_pretrained(loaded.model, out, overwrite=overwrite)
    elif loaded.source.is_dir():
        save_conversion(loaded.model, loaded.source, out, overwrite=overwrite)
    else:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy2(loaded.source, folder)
            save_conversion(loaded.model, Path(folder), out, overwrite=overwrite)


def _view(data: dict[str, Any], distance: Distance | None) -> RenderableType:
    from attnrewrite.render.rows import fold_paths

    by_config: dict[str, list[str]] = {}
    for layer, config in data["sites"].items():
        by_config.setdefault(_changed(config), []).append(layer)
    total = len(data["sites"])
    verb = "would be converted" if data["dry_run"] else "converted"
    same = data["verified"] and not data["needs_calibration"]
    verified = ", outputs not compared" if not same else ", outputs compared" if distance is None else ", measured"
    lines = [Text(f"{data['model']} · {total} site{'' if total == 1 else 's'} {verb}{verified}", style="bold")]
    for config, layers in by_config.items():
        lines += [Text(f"  {path} → {config}") for path, _ in fold_paths(layers)]
    removed = f", {data['removed_parameters']:,} removed" if data["removed_parameters"] else ""
    lines.append(Text(f"  {data['new_parameters']:,} new parameters{removed}"))
    lines += [Text(f"  {line}") for line in _measured(data["fit_errors"], distance)]
    lines.append(Text("nothing was written" if data["dry_run"] else f"wrote {data['out']}", style="dim"))
    if data["needs_calibration"] and not data["dry_run"]:
        lines.append(Text(f"next: attnrewrite calibrate {data['out']} CALIBRATED", style="bold"))
    return Group(*lines)


def _changed(config: dict[str, Any]) -> str:
    """Name the variant, and the fields that differ from their defaults."""
    from attnrewrite.variants import variant_info

    defaults = {field.name: field.default for field in fields(variant_info(config["variant"]).config)}
    changed = [f"{key}={config[key]}" for key in defaults if config[key] != defaults[key]]
    return "  ".join([config["variant"], *([", ".join(changed)] if changed else [])])


def _measured(errors: dict[str, dict[str, list[float] | None]], distance: Distance | None) -> Iterator[str]:
    from attnrewrite.render.distances import distance_lines, spread

    if errors:
        heads = {layer: found["weighted"] or found["frobenius"] or [0.0] for layer, found in errors.items()}
        yield spread("relative error of the scores", heads)
    if distance is not None:
        yield from distance_lines(distance)

"""Save and load conversions: the base untouched, JSON for the configs, safetensors for the new weights, no pickle.

A saved conversion is a folder with ``attnrewrite_config.json``, ``attnrewrite_model.safetensors``,
``attnrewrite_report.json`` and ``README.md``, beside the base model's files where it holds them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import attnrewrite
from attnrewrite.compiled import compile_in_place
from attnrewrite.conversion import (
    Conversion,
    conversion_of,
    fit_errors,
    install,
    new_parameters,
    new_state,
    original_parameters,
)
from attnrewrite.errors import AttnRewriteWarning
from attnrewrite.kernels.diagnostics import closest, error
from attnrewrite.variants import Swap, VariantConfig

CONFIG = "attnrewrite_config.json"
WEIGHTS = "attnrewrite_model.safetensors"
REPORT = "attnrewrite_report.json"
CARD = "README.md"
SCHEMA_VERSION = 1
_KEYS = {"schema_version", "attnrewrite_version", "torch_version", "base", "sites"}


def save_pretrained(model: torch.nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Save a converted model to the folder ``path``, whole or not at all.

    A transformers model is saved with its base weights, without those that the conversion replaced; of any other module
    only the conversion is saved, to be loaded into the base with ``load_pretrained(model, path)``. Returns the folder.

    Raises VariantError AR310 where the model is not converted, SaveError AR601 where ``path`` exists.
    """
    conversion = _conversion(model)
    with new_folder(Path(path), overwrite) as folder:
        _write_base(model, folder)
        _write(model, conversion, folder)
    return Path(path)


def save_conversion(model: torch.nn.Module, source: Path, out: Path, *, overwrite: bool = False) -> Path:
    """Save the conversion of ``model`` beside a copy of the base files in the folder (or file) ``source``.

    Where the conversion replaced modules, safetensors files are written anew with what is left; a GGUF file is copied
    whole. Raises as ``save_pretrained``.
    """
    conversion = _conversion(model)
    with new_folder(Path(out), overwrite) as folder:
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        left_out = {CONFIG, WEIGHTS, REPORT}
        if conversion.details and (weights := [f.name for f in files if ".safetensors" in f.suffixes]):
            from attnrewrite.loading import quiet

            left_out |= set(weights)
            with quiet():
                _write_base(model, folder)
        for file in files:
            if file.is_file() and file.name not in left_out:
                shutil.copy2(file, folder / file.name)
        _write(model, conversion, folder)
    return Path(out)


def load_pretrained(model: torch.nn.Module | str | Path, path: str | Path | None = None) -> torch.nn.Module:
    """Load a saved conversion into its base ``model``, in place; or, given a folder alone, base and conversion.

    Nothing is traced: the folder names the layers. The model is compiled in place as ``convert`` does.

    Raises:
        SaveError: AR602 for missing or damaged files, AR603 where the model is not the base, AR604 for another format.
        VariantError: AR302 for unknown config keys, AR305 where the model is converted already.
    """
    if not isinstance(model, torch.nn.Module):
        from attnrewrite.loading import load_model

        if not is_conversion(model):
            raise error("AR602", f"{model} holds no {CONFIG}")
        return load_model(str(model)).model
    if path is None:
        raise error("AR102", "the folder of the conversion is missing", hint="load_pretrained(model, path)")
    if conversion_of(model) is not None:
        raise error("AR305", f"{type(model).__name__} carries a conversion")
    folder = Path(path)
    data = _read_config(folder)
    weights = _read_weights(folder)
    expected = data.get("base", {}).get("fingerprint")
    if expected not in (None, fingerprint(model)):
        raise error(
            "AR603",
            f"{folder} was made from another {data['base'].get('class', 'model')}: names or shapes differ",
        )
    saved = [_saved(model, entry, weights) for entry in data["sites"]]
    if weights:
        raise error("AR603", f"{folder / WEIGHTS} holds weights of no site: {', '.join(sorted(weights)[:3])}")
    for layer, config, holder, swap in saved:
        install(model, layer, config, holder, swap)
    compile_in_place(model)
    return model


def replaced_modules(folder: Path) -> tuple[str, ...]:
    """Return the paths of the base's modules that a saved conversion replaces: the base files may lack their weights.

    Raises SaveError AR602, AR604.
    """
    try:
        swaps = [entry.get("swap", {}) for entry in _read_config(folder)["sites"]]
        return tuple(str(path) for swap in swaps for path in swap.get("modules", []))
    except (AttributeError, TypeError) as failure:
        raise error("AR604", f"a site of the saved conversion in {folder} is incomplete: {failure!r}") from None


def is_conversion(path: str | Path) -> bool:
    """Whether the folder holds a saved conversion."""
    return (Path(path) / CONFIG).is_file()


def fingerprint(model: torch.nn.Module) -> str:
    """Return a hash of the base's parameter names and shapes."""
    rows = sorted(f"{name} {list(p.shape)}" for name, p in original_parameters(model))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _conversion(model: torch.nn.Module) -> Conversion:
    found = conversion_of(model)
    if found is None:
        raise error("AR310", f"{type(model).__name__} carries no conversion")
    return found


def check_free(path: Path, overwrite: bool) -> None:
    """Raise SaveError AR601 where ``path`` exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise error("AR601", f"{path} exists")


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the place of a file that becomes ``path`` in one step when the block succeeds."""
    check_free(path, overwrite)
    if path.is_dir():
        raise error("AR601", f"{path} is a folder", hint="choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        yield Path(folder) / path.name
        (Path(folder) / path.name).replace(path)


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its name in one step when the block succeeds."""
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    folder.chmod(0o755)
    try:
        yield folder
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
            path.rename(old / path.name)
            try:
                folder.rename(path)
            except BaseException:
                (old / path.name).rename(path)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_base(model: torch.nn.Module, folder: Path) -> None:
    """Save a transformers model's own weights, as far as it still has them."""
    save = getattr(model, "save_pretrained", None)
    if callable(save):
        added = {name for name, _ in new_state(model)}
        save(folder, state_dict={key: value for key, value in model.state_dict().items() if key not in added})


def _write(model: torch.nn.Module, conversion: Conversion, folder: Path) -> None:
    state = dict(new_state(model))
    sites = []
    for layer, config in conversion.sites.items():
        prefix = ".".join(filter(None, (layer, config.variant))) + "."
        shapes = {k.removeprefix(prefix): list(v.shape) for k, v in state.items() if k.startswith(prefix)}
        entry = {"layer": layer, "config": config.to_dict(), "parameters": shapes}
        if layer in conversion.details:
            entry["swap"] = conversion.details[layer]
        sites.append(entry)
    data = {
        "schema_version": SCHEMA_VERSION,
        "attnrewrite_version": attnrewrite.__version__,
        "torch_version": str(torch.__version__),
        "base": {"class": type(model).__name__, "fingerprint": fingerprint(model)},
        "sites": sites,
    }
    (folder / CONFIG).write_text(json.dumps(data, indent=2) + "\n")
    distance = asdict(conversion.distance) if conversion.distance is not None else None
    report = {"sites": [s["layer"] for s in sites], "fit_errors": fit_errors(model), "distance": distance}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors keeps it from all but the owner
    if not (folder / CARD).exists():
        (folder / CARD).write_text(_card(model, conversion))


def _card(model: torch.nn.Module, conversion: Conversion) -> str:
    counts: dict[str, int] = {}
    for config in conversion.sites.values():
        counts[config.variant] = counts.get(config.variant, 0) + 1
    what = ", ".join(f"{name} in {n} layers" for name, n in counts.items())
    added = sum(p.numel() for _, p in new_parameters(model))
    removed = added + sum(p.numel() for _, p in original_parameters(model)) - sum(p.numel() for p in model.parameters())
    changed = f"{added:,} parameters were added" + (f", {removed:,} removed" if removed else "")
    return (
        "---\nlibrary_name: attnrewrite\n---\n"
        f"# {type(model).__name__} with {what}\n\n"
        f"Converted by attnrewrite {attnrewrite.__version__}; {changed}. Load it with\n\n"
        '```python\nimport attnrewrite\nmodel = attnrewrite.load_pretrained("this folder")\n```\n'
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise error("AR602", f"{folder} holds no {CONFIG}") from None
    except (ValueError, UnicodeDecodeError) as failure:
        raise error("AR602", f"{file} is no JSON: {failure}") from None
    if not isinstance(data, dict) or not isinstance(data.get("sites"), list) or "schema_version" not in data:
        raise error("AR604", f"{file} has no schema_version or sites")
    if data["schema_version"] != SCHEMA_VERSION:
        raise error(
            "AR604",
            f"{file} has schema version {data['schema_version']}, this library knows {SCHEMA_VERSION}",
        )
    strange = sorted(set(data) - _KEYS)
    if strange:
        warnings.warn(f"AR604 {file} has unknown entries: {', '.join(strange)}", AttnRewriteWarning, stacklevel=3)
    return data


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    try:
        return load_file(file)
    except FileNotFoundError:
        raise error("AR602", f"{folder} holds no {WEIGHTS}") from None
    except (SafetensorError, OSError) as failure:
        raise error("AR602", f"{file} is no whole safetensors file: {failure}") from None


def _saved(
    model: torch.nn.Module, entry: Mapping[str, Any], weights: dict[str, torch.Tensor]
) -> tuple[str, VariantConfig, torch.nn.Module | None, Swap | None]:
    """Build the modules of one site from the file's entry; take their weights out of ``weights``."""
    try:
        layer, shapes = str(entry["layer"]), {k: tuple(v) for k, v in entry["parameters"].items()}
        config, details = VariantConfig.from_dict(entry["config"]), dict(entry.get("swap", {}))
    except (KeyError, TypeError, AttributeError, ValueError) as failure:
        raise error("AR604", f"a site of the saved conversion is incomplete: {failure!r}") from None
    modules = dict(model.named_modules())
    if layer not in modules:
        raise error("AR603", f"{type(model).__name__} has no layer {layer!r}; {_near(layer, modules)}")
    if hasattr(modules[layer], config.variant):
        raise error("AR311", f"the layer has an attribute {config.variant!r}", layer=layer)
    if config.swaps_modules:
        swapped = config.swapped_modules(model, details)
        for path, module in swapped.items():
            _assign(module, path, modules[path], weights)
        return layer, config, None, Swap(swapped, details)
    return layer, config, _holder(layer, config, modules[layer], shapes, weights) if shapes else None, None


def _holder(
    layer: str,
    config: VariantConfig,
    owner: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    weights: dict[str, torch.Tensor],
) -> torch.nn.Module:
    holder = config.empty_module(shapes)
    for name, kept in holder.state_dict(keep_vars=True).items():
        value = _taken(weights, ".".join(filter(None, (layer, config.variant, name))), kept)
        with torch.no_grad():
            kept.copy_(value)
    return holder.to(_device(owner))


def _assign(module: torch.nn.Module, path: str, old: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give ``module``, which has no values yet, those of the file, on the device and in the dtype of ``old``."""
    device = _device(old)
    device = torch.device("cpu") if device.type == "meta" else device
    state = {name: (_taken(weights, f"{path}.{name}", kept), kept) for name, kept in module.state_dict().items()}
    module.load_state_dict({name: value.to(device, kept.dtype) for name, (value, kept) in state.items()}, assign=True)
    module.train(old.training)


def _device(module: torch.nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _taken(weights: dict[str, torch.Tensor], key: str, kept: torch.Tensor) -> torch.Tensor:
    value = weights.pop(key, None)
    if value is None:
        raise error("AR603", f"{WEIGHTS} lacks {key}")
    if value.shape != kept.shape:
        raise error("AR603", f"{key} is {list(value.shape)} in {WEIGHTS} and {list(kept.shape)} in {CONFIG}")
    return value


def _near(layer: str, modules: Mapping[str, object]) -> str:
    text = closest(layer, modules)
    return text.split(" valid:")[0] if "?" in text else "its layers are named otherwise"

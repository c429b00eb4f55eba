"""From a MODEL reference to a model and inputs to try it on; nothing is fetched, no folder's code is run."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from attnrewrite.inputs import example_kwargs
from attnrewrite.kernels.diagnostics import AttnRewriteError, closest, error
from attnrewrite.weights import check_gguf, check_safetensors

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Attention = Literal["eager", "sdpa"]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadOptions:
    """How to load: sizes of the example inputs, dtype and attention of the model (None: the model's own)."""

    batch: int = 1
    seq_len: int = 32
    dtype: str | None = None
    attention: Attention | None = None
    with_tokenizer: bool = False


@dataclass
class LoadedModel:
    """A model in eval mode and example inputs; ``source`` is its folder or file, None for a function."""

    model: nn.Module
    name: str
    example_inputs: tuple[Any, ...] = ()
    example_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    source: Path | None = None


def load_model(reference: str, options: LoadOptions | None = None) -> LoadedModel:
    """Load MODEL: a folder in the transformers layout, a ``.gguf`` file, a conversion, ``module:function``.

    Raises AR102 for options that do not fit, AR103 for what cannot be found or loaded, AR106 for a missing
    package, AR602 for damaged files.
    """
    options = options or LoadOptions()
    if options.dtype is not None and options.dtype not in DTYPES:
        raise error("AR102", f"dtype {options.dtype!r}: {closest(options.dtype, DTYPES)}")
    path = Path(reference)
    if path.is_dir():
        return _load_folder(path, options)
    if path.is_file():
        return _load_file(path, options)
    if ":" in reference and not any(sign in reference for sign in "/\\"):
        return _load_function(reference, options)
    raise _nowhere(path)


def is_program(reference: str) -> bool:
    """Tell whether MODEL is an exported program (a ``.pt2`` file)."""
    return Path(reference).suffix == ".pt2"


def load_program(reference: str) -> ExportedProgram:
    """Load a ``.pt2`` file, which can be explained and exported, but not converted."""
    import attnrewrite.functional
    import attnrewrite.passes.rewriting.enter  # noqa: F401  # both define operators that the program may hold

    path = Path(reference)
    if not path.is_file():
        raise _nowhere(path)
    try:
        return torch.export.load(path)
    except Exception as cause:
        raise error("AR602", f"{path} is not a program saved by torch.export.save: {_first_line(cause)}") from cause


# --- folders and files -----------------------------------------------------------------------------------


def _load_folder(folder: Path, options: LoadOptions) -> LoadedModel:
    ggufs = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file():
        loaded = _load_transformers(folder, options)
    elif len(ggufs) == 1:
        loaded = _load_gguf(ggufs[0], options)
    elif ggufs:
        names = ", ".join(path.name for path in ggufs)
        raise error("AR103", f"{folder} holds several GGUF files ({names})", hint="name one of the files itself")
    else:
        raise error("AR103", f"{folder} holds neither config.json nor a .gguf file")
    loaded.source = folder
    return _with_conversion(loaded, folder)


def _load_file(path: Path, options: LoadOptions) -> LoadedModel:
    if path.suffix == ".gguf":
        return _load_gguf(path, options)
    if path.suffix == ".pt2":
        detail = (
            f"{path} is an exported program: its layers are gone, so that it can be explained and exported, not changed"
        )
        raise error("AR103", detail, hint="name the model that the program was exported from")
    raise error("AR103", f"{path} is a {path.suffix or 'plain'} file", hint="name its folder, or a .gguf file")


def _load_gguf(path: Path, options: LoadOptions) -> LoadedModel:
    transformers = _require("transformers")
    _require("gguf")
    check_gguf(path)
    where = {"gguf_file": path.name}
    return _load_weights(transformers.AutoModelForCausalLM, path.parent, path, options, where)


def _load_transformers(folder: Path, options: LoadOptions) -> LoadedModel:
    transformers = _require("transformers")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or ["AutoModel"]
    except (ValueError, AttributeError) as cause:
        raise error("AR602", f"{folder / 'config.json'} is not a JSON object: {_first_line(cause)}") from cause
    cls = getattr(transformers, str(architectures[0]), None)
    if cls is None:
        own = "; the folder brings its own code, which is never run" if "auto_map" in config else ""
        library = f"transformers {transformers.__version__}"
        detail = f"{folder} has architecture {architectures[0]}, unknown to {library}"
        raise error("AR103", detail + own, hint="write a function that returns the model: package.module:function")
    for file in _weight_files(folder):
        check_safetensors(file)
    from attnrewrite.saving import is_conversion, replaced_modules

    replaced = replaced_modules(folder) if is_conversion(folder) else ()
    return _load_weights(cls, folder, folder, options, {}, replaced)


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model of ``folder``."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as cause:
            raise error("AR602", f"{index} is no index of safetensors files: {_first_line(cause)}") from cause
        return [folder / name for name in sorted(names)]
    file = folder / "model.safetensors"
    if not file.is_file() and any(folder.glob("pytorch_model*.bin")):
        detail = f"{folder} holds its weights as pickles (pytorch_model*.bin), which are never opened"
        raise error("AR602", detail, hint="save the model as safetensors: model.save_pretrained(folder)")
    return [file]


def _load_weights(
    cls: Any,
    folder: Path,
    shown: Path,
    options: LoadOptions,
    where: dict[str, str],
    replaced: tuple[str, ...] = (),
) -> LoadedModel:
    """Load with transformers; a weight that the files lack is an error, never a random number.

    Modules that a conversion has ``replaced`` may be missing from the files; they are put on the meta device.
    """
    keywords: dict[str, Any] = {**where, "local_files_only": True, "output_loading_info": True}
    keywords["dtype"] = DTYPES[options.dtype or "float32"] if where else DTYPES.get(options.dtype or "", "auto")
    if options.attention:
        keywords["attn_implementation"] = options.attention
    try:
        with quiet():
            model, info = cls.from_pretrained(str(folder), **keywords)
    except Exception as cause:
        raise _load_failure(shown, options, cause) from cause
    gone = {key.rpartition(".")[0] for key in info["missing_keys"]} & set(replaced)
    for path in gone:
        model.get_submodule(path).to("meta")
    if missing := sorted(key for key in info["missing_keys"] if key.rpartition(".")[0] not in gone):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise error("AR602", f"{shown} lacks {len(missing)} weights of {type(model).__name__}: {some}")
    loaded = LoadedModel(model.eval(), shown.name or str(shown.resolve()), source=shown)
    if options.with_tokenizer:
        loaded.tokenizer = _load_tokenizer(folder, where)
    loaded.example_kwargs = example_kwargs(model, options.batch, options.seq_len)
    return loaded


def _load_failure(shown: Path, options: LoadOptions, cause: Exception) -> AttnRewriteError:
    if options.attention and "does not support" in str(cause):
        detail = f"{shown} has no {options.attention!r} attention: {_first_line(cause)}"
        return error("AR102", detail, hint="leave the option out, or choose eager")
    return error("AR103", f"{shown}: transformers says: {type(cause).__name__}: {_first_line(cause)}")


def _load_tokenizer(folder: Path, where: dict[str, str]) -> Any:
    """Return the tokenizer of ``folder``, None where there is none."""
    transformers = _require("transformers")
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **where)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _with_conversion(loaded: LoadedModel, folder: Path) -> LoadedModel:
    from attnrewrite.saving import is_conversion, load_pretrained

    if is_conversion(folder):
        loaded.model = load_pretrained(loaded.model, folder).eval()
    return loaded


# --- functions -------------------------------------------------------------------------------------------


def _load_function(reference: str, options: LoadOptions) -> LoadedModel:
    if options.attention:
        detail = "the attention of a function's model is the function's choice"
        raise error("AR102", f"attention {options.attention!r} with {reference}: {detail}", hint="leave it out")
    module_name, _, name = reference.partition(":")
    module = _import(module_name, reference)
    function = getattr(module, name, None)
    if not callable(function):
        held = [key for key, value in vars(module).items() if isinstance(value, FunctionType) and key[0] != "_"]
        names = held or [key for key in dir(module) if key[0] != "_"]  # a lazy module holds nothing yet
        raise error("AR103", f"module {module_name!r} has no function {name!r}: {closest(name, names)}")
    try:
        made = function()
    except Exception as cause:
        raise error("AR103", f"{reference}() raised {type(cause).__name__}: {_first_line(cause)}") from cause
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    if not isinstance(model, nn.Module):
        detail = f"{reference}() returned {type(made).__name__}, not a model or (model, example inputs)"
        raise error("AR103", detail)
    loaded = LoadedModel(model.eval(), reference)
    if isinstance(inputs, dict):
        loaded.example_kwargs = inputs
    else:
        loaded.example_inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not loaded.example_inputs and not loaded.example_kwargs and hasattr(model, "config"):
        loaded.example_kwargs = example_kwargs(model, options.batch, options.seq_len)
    return _cast(loaded, options)


def _cast(loaded: LoadedModel, options: LoadOptions) -> LoadedModel:
    if options.dtype is None:
        return loaded
    dtype = DTYPES[options.dtype]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    loaded.model = loaded.model.to(dtype)
    loaded.example_inputs = tuple(cast(value) for value in loaded.example_inputs)
    loaded.example_kwargs = {key: cast(value) for key, value in loaded.example_kwargs.items()}
    return loaded


def _import(name: str, reference: str) -> ModuleType:
    """Import a module from the path, or from the folder the user stands in."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        if cause.name and name.split(".")[: len(cause.name.split("."))] == cause.name.split("."):
            raise error("AR103", f"{reference}: there is no module {cause.name!r} on the path or in {here}") from cause
        raise error("AR103", f"{reference}: importing {name} needs module {cause.name!r}") from cause
    except Exception as cause:
        detail = f"{reference}: importing {name} raised {type(cause).__name__}: {_first_line(cause)}"
        raise error("AR103", detail) from cause


# --- helpers ---------------------------------------------------------------------------------------------


def _require(package: str) -> ModuleType:
    if importlib.util.find_spec(package) is None:
        detail = f"loading this model needs the package {package!r}"
        raise error("AR106", detail, hint="pip install 'attnrewrite[hf]'")
    return importlib.import_module(package)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the loader's bars and reports off the terminal: what matters of them is raised.

    The GGUF reader's bar knows no switch, so that stderr itself is taken away for the while.
    """
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _nowhere(path: Path) -> AttnRewriteError:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    also = f"; near it: {', '.join(str(folder / name) for name in near)}" if near else ""
    return error("AR103", f"there is no {path}{also}")


def _first_line(cause: BaseException) -> str:
    lines = str(cause).strip().splitlines()
    return lines[0] if lines else type(cause).__name__

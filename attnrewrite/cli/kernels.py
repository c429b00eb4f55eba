"""``attnrewrite kernels``: the generated kernels, as text or as files."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.syntax import Syntax
from rich.text import Text

from attnrewrite.cli.output import Output
from attnrewrite.cli.verb import Verb
from attnrewrite.kernels.diagnostics import closest, error

if TYPE_CHECKING:
    from attnrewrite.kernels.generation.emit import Emitted, Flag


_EXAMPLES = (
    "kernels show forward",
    "kernels show backward_keys --variant ssa --head-dim 128",
    "kernels emit ./kernels --variant selective --set WINDOW=True",
)


@click.command(cls=Verb, examples=_EXAMPLES)
@click.argument("action", type=click.Choice(("show", "emit")))
@click.argument("what")
@click.option("--variant", default="sdpa", show_default=True, help="A variant with kernels.")
@click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True, help="Of queries and keys.")
@click.option("--value-dim", type=click.IntRange(1, 256), help="Features of a value. [default: --head-dim]")
@click.option("--causal/--bidirectional", default=True, show_default=True, help="Who sees whom.")
@click.option("--set", "settings", multiple=True, metavar="FLAG=VALUE", help="A flag, such as WINDOW=True.")
@click.pass_obj
def command(
    output: Output,
    action: str,
    what: str,
    variant: str,
    head_dim: int,
    value_dim: int | None,
    causal: bool,
    settings: tuple[str, ...],
) -> None:
    """Show the generated kernel WHAT, or emit all of a variant to the folder WHAT.

    Kernels are forward, delta, backward_keys, backward_queries, decode, merge; for more than 128 features also
    backward_values; for selective attention votes, live, backward_logits and backward_votes; for symmetric attention
    backward_shared. Neither a GPU nor triton is needed.
    """
    from attnrewrite.kernels.dense.catalogue import KERNELS, OF_SYMMETRY, OF_VOTES, made_apart, users

    if action == "show":
        if what not in KERNELS:
            raise error("AR102", f"there is no kernel {what!r}; {closest(what, KERNELS)}")
        made = _made([what], variant, head_dim, value_dim, causal, settings)[what]
        output.result({"name": what, "digest": made.digest, "text": made.text}, lambda: Syntax(made.text, "python"))
        return
    names = [name for name in KERNELS if name not in (*OF_VOTES, *OF_SYMMETRY) or variant in users(name)]
    if not made_apart(head_dim, value_dim or head_dim):
        names.remove("backward_values")
    _emit(output, Path(what), _made(names, variant, head_dim, value_dim, causal, settings))


def _emit(output: Output, folder: Path, made: dict[str, Emitted]) -> None:
    from attnrewrite.kernels.generation.loading import write

    try:
        paths = {name: str(write(kernel, folder)) for name, kernel in made.items()}
    except OSError as cause:
        raise error("AR602", f"{folder} cannot be written to: {cause}") from cause
    output.result({"files": paths}, lambda: Text("\n".join(paths.values())))


def _made(
    names: list[str], variant: str, head_dim: int, value_dim: int | None, causal: bool, settings: tuple[str, ...]
) -> dict[str, Emitted]:
    from attnrewrite.kernels.dense.catalogue import VARIANTS, flags, kernel, used

    if variant not in VARIANTS:
        raise error("AR403", f"{variant} has no generated kernels; {closest(variant, VARIANTS)}", hint="")
    given: dict[str, Flag] = {}
    for setting in settings:
        flag, equals, value = setting.partition("=")
        if not equals:
            raise click.BadParameter(f"{setting!r} is not of the form FLAG=VALUE.", param_hint="--set")
        given[flag] = _value(value)
    try:
        return {
            name: kernel(name, flags(head_dim, value_dim or head_dim, {**used(name, variant, causal=causal), **given}))
            for name in names
        }
    except ValueError as cause:
        raise click.BadParameter(f"{cause}.", param_hint="--set") from cause


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

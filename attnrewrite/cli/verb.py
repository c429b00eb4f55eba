"""What all verbs share: the common options and the examples that end each help."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from attnrewrite.cli.output import FORMATS, Output
from attnrewrite.kernels.diagnostics import error

Function = TypeVar("Function", bound=Callable[..., Any])


class Verb(click.Command):
    """A command whose help ends with examples."""

    def __init__(self, *args: Any, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        add_common_options(self)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Close the help with the examples, one a line."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write_text(f"\b\nattnrewrite {example}")


class VerbGroup(Verb, click.Group):
    """A verb with verbs of its own."""


def add_common_options(command: click.Command) -> None:
    """Give a command ``--format`` and ``-v``, so that they may stand before or after the verb."""
    choice = click.Choice(FORMATS)
    text = "How to print the result. [default: human]"
    command.params.append(click.Option(["--format"], type=choice, callback=_set_format, expose_value=False, help=text))
    text = "Print more; on errors the traceback."
    command.params.append(
        click.Option(["-v", "--verbose"], is_flag=True, callback=_set_verbose, expose_value=False, help=text)
    )


def _set_format(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    output = ctx.find_object(Output)
    if output is not None and value is not None:
        output.format = value  # type: ignore[assignment]  # click.Choice has checked it


def _set_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    output = ctx.find_object(Output)
    if output is not None and value:
        output.verbose = True


def model_argument(function: Function) -> Function:
    """Take MODEL as an argument."""
    return click.argument("model")(function)


def out_argument(function: Function) -> Function:
    """Take OUT as an argument."""
    return click.argument("out", type=click.Path(path_type=Path))(function)


def overwrite_option(function: Function) -> Function:
    """Take ``--overwrite``."""
    return click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")(function)


def check_out(output: Output, out: Path, overwrite: bool) -> None:
    """Find out before the work begins that OUT cannot be written: SaveError AR601 where it exists, or OSError."""
    output.untouched = f"{out} was not written"
    if out.exists() and not overwrite:
        raise error("AR601", f"{out} exists")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def seq_len_option(default: int, what: str) -> Callable[[Function], Function]:
    """Take ``--seq-len``."""
    return click.option("--seq-len", type=click.IntRange(min=2), default=default, show_default=True, help=what)

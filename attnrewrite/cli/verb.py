"""What all verbs share: the common options and the examples that end each help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from attnrewrite.cli.output import FORMATS, Output

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


def seq_len_option(default: int, what: str) -> Callable[[Function], Function]:
    """Take ``--seq-len``."""
    return click.option("--seq-len", type=click.IntRange(min=2), default=default, show_default=True, help=what)

"""The command line: one file per verb, loaded when the verb is used.

Neither this module nor ``--help`` imports torch, so that help appears at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from attnrewrite import __version__
from attnrewrite.cli.output import Output, format_in
from attnrewrite.cli.verb import add_common_options
from attnrewrite.kernels.diagnostics import AttnRewriteError, closest

EXIT_ERROR, EXIT_USAGE, EXIT_NOTHING, EXIT_VERIFICATION, EXIT_INTERRUPTED = 1, 2, 3, 4, 130
_EXIT_CODES = dict.fromkeys(("AR201", "AR306"), EXIT_NOTHING) | dict.fromkeys(("AR205", "AR313"), EXIT_VERIFICATION)
_EXIT_CODES |= {"AR501": EXIT_USAGE}

VERBS = {
    "variants": "List the attention variants, or show one with its fields.",
    "explain": "Find the attention in MODEL and say what can be rewritten.",
    "convert": "Put a variant into MODEL and write it to OUT.",
    "calibrate": "Set what a conversion of MODEL learns from real inputs, and write it to OUT.",
    "distill": "Train what a conversion added to MODEL, and write it to OUT.",
    "export": "Write MODEL with its attention rewritten, for other compilers.",
    "kernels": "Show the generated kernel WHAT, or emit all of a variant to the folder WHAT.",
    "tune": "Find the fastest configuration of every kernel that MODEL, or a variant, runs, and store it.",
    "bench": "Measure variants and what others offer for the same, side by side.",
    "cache": "Look into tuning records, and share them.",
    "eval": "Measure the perplexity of MODEL on a text: lower is better.",
    "env": "Show versions, devices and settings.",
    "code": "Explain a diagnostic code, or list them all.",
    "demo": "Convert a small language model and train what was added.",
}


class Verbs(click.Group):
    """The table of verbs; a verb's module is imported when the verb is used, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of their use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"attnrewrite.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or name the closest."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"There is no command {args[0]!r}; {closest(args[0], VERBS)}.", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Close the help with examples."""
        with formatter.section("Examples"):
            formatter.write_text("\b\nattnrewrite explain ./my-model")
            formatter.write_text("\b\nattnrewrite convert ./my-model ./my-model-ssa --variant ssa")
            formatter.write_text("\b\nattnrewrite code AR203")


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="attnrewrite", message="%(prog)s %(version)s")
def cli() -> None:
    """Find the attention in a PyTorch model and rewrite it.

    MODEL is a folder in the transformers layout (safetensors or GGUF), a .gguf file, a .pt2 file
    (explain and export), or package.module:function, where the function returns a model or (model, example
    inputs).
    """


add_common_options(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: error; 2: wrong usage; 3: nothing matched, or something was rejected under --strict;
    4: verification failed; 130: interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    output = Output(format=format_in(words), verbose="-v" in words or "--verbose" in words)
    try:
        with output.plain_warnings():
            code = cli.main(words, prog_name="attnrewrite", standalone_mode=False, obj=output)
    except click.ClickException as error:
        return _usage(output, error)
    except (click.Abort, KeyboardInterrupt):
        output.failure("interrupted", "interrupted", output.untouched)
        return EXIT_INTERRUPTED
    except AttnRewriteError as error:
        output.diagnostic(error)
        return _EXIT_CODES.get(error.code, EXIT_ERROR)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        output.failure("system", "the system refused", f"{place}{error.strerror or error}")
        return EXIT_ERROR
    except Exception as error:
        # Dynamo wraps what a backend raises.
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, AttnRewriteError):
            output.diagnostic(inner)
            return _EXIT_CODES.get(inner.code, EXIT_ERROR)
        output.defect(error)
        return EXIT_ERROR
    return code if isinstance(code, int) else 0


def _usage(output: Output, error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    hint = f"try '{context.command_path} --help'" if context else ""
    output.failure("usage", "wrong usage", error.format_message(), hint)
    return error.exit_code

"""What the command line prints: results on stdout; notes, progress and errors on stderr."""

from __future__ import annotations

import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from attnrewrite.kernels.diagnostics import DIAGNOSTICS, AttnRewriteError, AttnRewriteWarning

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

Format = Literal["human", "json", "quiet"]
FORMATS = ("human", "json", "quiet")
# Wide enough that nothing is cut or wrapped when the output goes into a file or a pipe.
_PIPE_WIDTH = 1000


@dataclass
class Output:
    """The one place that prints, in the format asked for.

    ``untouched`` is what an interrupted command tells the user about its output.
    """

    format: Format = "human"
    verbose: bool = False
    untouched: str = "nothing was written"

    @cached_property
    def out(self) -> Console:
        """The console of results."""
        from rich.console import Console

        return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, emoji=False)

    @cached_property
    def err(self) -> Console:
        """The console of notes and errors."""
        from rich.console import Console

        return Console(width=None if sys.stderr.isatty() else _PIPE_WIDTH, stderr=True, highlight=False, emoji=False)

    def result(self, data: Mapping[str, Any], view: Callable[[], RenderableType]) -> None:
        """Print the result of a command: ``data`` as JSON, or ``view`` for people."""
        if self.format == "json":
            self._json(data)
        elif self.format == "human":
            self.show(view())

    def show(self, view: RenderableType) -> None:
        """Print for people; a pipe gets no padding at the ends of lines."""
        if self.out.is_terminal:
            self.out.print(view)
            return
        with self.out.capture() as captured:
            self.out.print(view)
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def note(self, text: str) -> None:
        """Tell a person something that is no result."""
        if self.format == "human":
            self.err.print(text, style="dim", markup=False)

    @contextmanager
    def plain_warnings(self) -> Iterator[None]:
        """Print this library's warnings for people, without the line of code that gave them; others as they are."""

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, AttnRewriteWarning) and self.format == "human":
                self.err.print(f"warning: {message}", style="yellow", markup=False)
            else:
                as_before(message, category, *place, **more)

        with warnings.catch_warnings():
            as_before, warnings.showwarning = warnings.showwarning, show
            yield

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that something is going on, where somebody is watching."""
        if self.format == "human" and self.err.is_terminal:
            with self.err.status(text):
                yield
        else:
            yield

    def progress(self) -> Progress:
        """Return a progress display, silent unless somebody is watching."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        watched = self.format == "human" and self.err.is_terminal
        return Progress(*columns, console=self.err, transient=True, disable=not watched)

    def diagnostic(self, error: AttnRewriteError) -> None:
        """Print a coded error, with the traceback only under ``-v``."""
        fields = ("code", "title", "detail", "layer", "source", "hint")
        self._error({name: getattr(error, name) for name in fields}, str(error))
        self._traceback(error)

    def failure(self, code: str, title: str, detail: str, hint: str = "") -> None:
        """Print an error that has no diagnostic code: usage, interruption, the system."""
        text = f"{title}: {detail}" + (f"\n  hint: {hint}" if hint else "")
        self._error({"code": code, "title": title, "detail": detail, "hint": hint}, text)

    def defect(self, error: Exception) -> None:
        """Print an unexpected exception as AR901."""
        known = DIAGNOSTICS["AR901"]
        detail = f"{type(error).__name__}: {error}".strip()
        hint = known.hint if self.verbose else "run again with -v for the traceback, and please report it"
        fields = {"code": known.code, "title": known.title, "detail": detail, "hint": hint}
        self._error(fields, f"{known.code} {known.title}\n  {detail}\n  hint: {hint}")
        self._traceback(error)

    def _error(self, fields: Mapping[str, str], text: str) -> None:
        if self.format == "json":
            self._json({"error": dict(fields)})
            return
        first, _, rest = text.partition("\n")
        self.err.print(first, style="bold red", markup=False)
        if rest:
            self.err.print(rest, markup=False)

    def _traceback(self, error: BaseException) -> None:
        if self.verbose:
            self.err.print("".join(traceback.format_exception(error)), markup=False)

    def _json(self, data: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(_plain(data), indent=2, sort_keys=True, default=str) + "\n")


def format_in(words: Sequence[str]) -> Format:
    """Find the output format among unparsed words, so that even a usage error takes it."""
    found = "human"
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word == "--format":
            found = following
        elif word.startswith("--format="):
            found = word.partition("=")[2]
    return cast(Format, found) if found in FORMATS else "human"


def _plain(value: Any) -> Any:
    """Spell infinities as text: JSON has no number for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

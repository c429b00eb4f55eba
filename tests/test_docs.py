"""What the pages show is run: every Python block, page by page and in order, and every command is parsed."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import click
import pytest
import tiny
import torch

from attnrewrite.cli import cli
from attnrewrite.passes.rules import RULES
from attnrewrite.variants import base

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "kernels/*/*.md") for path in ROOT.glob(pattern))


def tokens() -> torch.Tensor:
    return torch.randint(tiny.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))


def model_in_a_folder() -> dict[str, Any]:
    tiny.llama_folder(Path("my-model"))
    return {"ids": tokens()}


def model_and_batches() -> dict[str, Any]:
    import attnrewrite

    return {"attnrewrite": attnrewrite, "model": tiny.llama(), "ids": tokens(), "batches": [tokens()]}


def model_and_tensors() -> dict[str, Any]:
    return {**model_and_batches(), **{name: torch.randn(1, 2, 8, 16) for name in ("query", "key", "value")}}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": model_in_a_folder,
    "docs/adding_a_variant.md": dict,
    "docs/kernels.md": model_and_tensors,
    "docs/recipes.md": dict,
    "docs/variants.md": model_and_batches,
}
"""The pages with Python blocks, all of which run, and the names that a reader has already."""


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of a language, with the lines on which they begin."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


@contextmanager
def settings_restored() -> Iterator[None]:
    """Undo what a page registers and sets."""
    registries = mock.patch.dict(RULES), mock.patch.dict(base._REGISTRY)
    with registries[0], registries[1], torch._dynamo.config.patch(optimize_ddp=True):
        yield


def test_every_page_with_python_is_run() -> None:
    with_python = [page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "python")]
    assert with_python == list(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
def test_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of one block are there in the next; a traceback shows the line of the page."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    page = ROOT / name
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and Dynamo look for names
    vars(module).update(GIVEN[name]())
    with settings_restored():
        for line, code in blocks(page, "python"):
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), vars(module))


def commands() -> list[str]:
    lines = [line for page in PAGES for _, code in blocks(page, "sh") for line in code.splitlines()]
    return [line for line in lines if line.startswith("attnrewrite ")]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_parse(line: str) -> None:
    _, verb, *words = shlex.split(line.partition(" >")[0])
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    with command.make_context(verb, words) as context:
        assert context.command is command

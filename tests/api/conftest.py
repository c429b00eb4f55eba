import json

import pytest
from tiny import llama_folder

from attnrewrite.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(llama_folder(tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture
def run(capsys):
    """Run a command; return its exit code, stdout and stderr."""

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    """Run a command with ``--format json``; return its exit code and the one object it prints."""

    def call(*words):
        code, out, err = run(*words, "--format", "json")
        assert err == ""
        return code, json.loads(out)

    return call

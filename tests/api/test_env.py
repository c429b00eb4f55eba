import json
from importlib import metadata

import torch

from attnrewrite.env import environment


def test_environment_is_plain_data_about_this_machine():
    facts = json.loads(json.dumps(environment()))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["attnrewrite"] == metadata.version("attnrewrite")
    assert facts["devices"][0]["kind"] == "cpu"
    assert facts["devices"][0]["threads"] == torch.get_num_threads()


def test_missing_package_is_none(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert environment()["versions"]["triton"] is None


def test_device_that_cannot_be_asked_is_named(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    assert environment()["devices"][-1]["name"] == "cannot be asked: driver too old"


def test_only_variables_that_matter_are_shown(monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_PROBE", "1")
    monkeypatch.setenv("SOME_SECRET", "x")
    variables = environment()["variables"]
    assert variables["ATTNREWRITE_PROBE"] == "1"
    assert "SOME_SECRET" not in variables

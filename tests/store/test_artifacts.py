"""torch's cache artifacts carry records from one machine to another."""

import pytest
import torch
from store_support import SPACE, key, record, run_python
from torch.compiler._cache import CacheArtifactManager

from attnrewrite.errors import AttnRewriteWarning
from attnrewrite.kernels.store import artifacts
from attnrewrite.kernels.store.settings import default_store


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that goes on on another machine, as far as stores are concerned."""

    def go_to(name, **variables):
        monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / name))
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        default_store.cache_clear()
        return default_store()

    with CacheArtifactManager.with_fresh_cache():
        yield go_to


@pytest.fixture
def saved(machine):
    machine("first").put(record())
    data, info = torch.compiler.save_cache_artifacts()
    assert info.attnrewrite_tuning_artifacts == [record().path]
    return data


def test_records_travel_with_compiled_code(saved, machine):
    second = machine("second")
    info = torch.compiler.load_cache_artifacts(saved)
    assert info.attnrewrite_tuning_artifacts == [record().path]
    assert second.find(key(), SPACE).tier == "local"


def test_loaded_records_are_checked_like_any_other(saved, machine):
    signing = machine("third", ATTNREWRITE_CACHE_SECRET="secret")
    with pytest.warns(AttnRewriteWarning, match="AR513"):
        torch.compiler.load_cache_artifacts(saved)
    assert signing.find(key(), SPACE) is None


def test_readonly_loads_nothing(saved, machine, tmp_path):
    reading = machine("fourth", ATTNREWRITE_AUTOTUNE="readonly")
    torch.compiler.load_cache_artifacts(saved)
    assert reading.find(key(), SPACE) is None
    assert not (tmp_path / "fourth").exists()


def test_found_records_travel_too(machine):
    machine("first").put(record())
    machine("first").find(key(), SPACE)
    with CacheArtifactManager.with_fresh_cache():
        machine("first").find(key(), SPACE)
        _, info = CacheArtifactManager.serialize()
    assert info.artifacts[artifacts.KIND] == [record().path]


def test_backend_makes_them_known_to_torch():
    code = "import attnrewrite.backend, torch.compiler._cache as c; print(*c.CacheArtifactFactory._artifact_types)"
    assert artifacts.KIND in run_python(code).split()

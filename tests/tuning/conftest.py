import pytest

from attnrewrite.kernels.dense import tuned
from attnrewrite.kernels.store.settings import default_store


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Keep the user's own store and settings out of the tests."""
    for name in ("ATTNREWRITE_CACHE_URL", "ATTNREWRITE_CACHE_SECRET", "ATTNREWRITE_AUTOTUNE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "cache"))
    default_store.cache_clear()
    tuned._CHOSEN.clear()
    yield
    default_store.cache_clear()
    tuned._CHOSEN.clear()

import shutil
import sys

import pytest
from store_support import free_port, redis_server, server

from attnrewrite.kernels.store.settings import default_store


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Keep the user's own store and settings out of the tests."""
    for name in ("URL", "SECRET"):
        monkeypatch.delenv(f"ATTNREWRITE_CACHE_{name}", raising=False)
    for name in ("ATTNREWRITE_AUTOTUNE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "cache"))
    default_store.cache_clear()
    yield
    default_store.cache_clear()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server on this machine")
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def s3_server():
    """Start a server that speaks S3 and return its address."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    port = free_port()
    code = "import sys; from moto.server import main; main(['-p', sys.argv[1]])"
    with server([sys.executable, "-P", "-c", code, str(port)], port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def s3_url(s3_server, monkeypatch, request):
    """A bucket of its own."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{abs(hash(request.node.nodeid)) % 10**9}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    yield f"s3://{bucket}/tuning"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["folder", "file", "memory", "redis", "s3"])
def shared_url(request, tmp_path):
    """The address of an empty shared store, of every kind."""
    if request.param == "redis":
        import redis

        url = request.getfixturevalue("redis_url")
        redis.Redis.from_url(url).flushall()
        return url
    if request.param == "s3":
        return request.getfixturevalue("s3_url")
    folder = tmp_path / "shared"
    return {"folder": str(folder), "file": f"file://{folder}", "memory": f"memory://{tmp_path.name}"}[request.param]

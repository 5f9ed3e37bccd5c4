"""A server that speaks S3 on loopback (moto's), and what is put into it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from lorabridge.files import placeholders, stores

KEYS = {"key": "tester", "secret": "none", "client_kwargs": {"region_name": "eu-central-1"}}
_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Return the address of the server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def options(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Let fsspec know the server, as its configuration would; a store of its own to every test."""
    given = {**KEYS, "endpoint_url": endpoint}
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    stores.store.cache_clear()
    monkeypatch.setattr(placeholders, "_PLACED", placeholders._Placed())
    yield given
    stores.store.cache_clear()


@pytest.fixture
def s3(options: dict[str, object]) -> S3FileSystem:
    """Return a client of its own, so that nothing is taken from another's cache."""
    return S3FileSystem(**options, use_listings_cache=False, skip_instance_cache=True)


@pytest.fixture
def bucket(s3: S3FileSystem) -> str:
    """Return the name of an empty bucket."""
    name = f"models-{next(_NUMBERS)}"
    s3.mkdir(name)
    return name


@pytest.fixture
def send(s3: S3FileSystem, bucket: str) -> Callable[[Path, str], str]:
    """Return what puts a file or a directory into the bucket and returns its name there."""

    def put(path: Path, key: str) -> str:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            inside = "" if file == path else f"/{file.relative_to(path)}"
            s3.put_file(str(file), f"{bucket}/{key}{inside}")
        return f"s3://{bucket}/{key}"

    return put

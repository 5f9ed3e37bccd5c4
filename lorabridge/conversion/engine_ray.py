"""Shares of a run on a Ray cluster; the one module that knows Ray, which it imports when it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import LorabridgeError, StorageError, UsageError
from .shares import Refused, Share, do

RETRIES = 5
"""How often Ray starts a share again, on another machine if it can, after the worker that had it was lost."""


@contextmanager
def cluster(address: str | None) -> Iterator[int]:
    """Join a Ray cluster, or what this process has joined already; gives its number of CPUs.

    A UsageError when nothing answers at ``address``.
    """
    import ray

    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False,
                     logging_level=logging.ERROR)  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            where = address or "the local machine"
            hint = "start it with `ray start --head`, and name the address that it prints"
            raise UsageError(f"no Ray cluster could be joined: {_first_line(error)}", where=where, hint=hint) from error
    try:
        yield max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        if not joined:
            ray.shutdown()


def results(shares: Sequence[Share], window: int) -> Iterator[int]:
    """Yield the bytes of each share as it is done, at most ``window`` of them under way.

    Raises what a worker refused, StorageError when a share's workers were lost too often.
    """
    import ray

    remote = ray.remote(do).options(
        num_cpus=1, max_retries=RETRIES, retry_exceptions=False, scheduling_strategy="SPREAD"
    )
    waiting = list(reversed(shares))
    running: list[object] = []
    try:
        while waiting or running:
            while waiting and len(running) < window:
                running.append(remote.remote(waiting.pop()))
            ready, running = ray.wait(running)
            yield _result(ray.get, ready[0])
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _result(get: Callable[[object], int | Refused], reference: object) -> int:
    from ray.exceptions import RayError, RayTaskError

    try:
        done = get(reference)
    except RayTaskError as error:
        raise LorabridgeError(
            f"a worker failed: {_first_line(error.cause or error)}",
            hint="install the same lorabridge, with its dependencies, on every machine of the cluster",
        ) from error
    except RayError as error:
        raise StorageError(
            f"workers were lost {RETRIES + 1} times: {_first_line(error)}",
            hint="look at `ray status`: machines that leave, or too little memory",
        ) from error
    if isinstance(done, Refused):
        raise done.error()
    return done


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

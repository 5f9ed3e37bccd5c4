"""Shares of a run on a Ray cluster; the one module that knows Ray, which it imports when it is used."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..errors import LorabridgeError, StorageError, UsageError, first_line
from . import endpoint
from .shares import Done, Refused, Share, Stamps, do
from .survey import Reply, judge, probing, reply

RETRIES = 5
"""How often Ray starts a share again, on another machine if it can, after the worker that had it was lost."""
ANSWER = 120.0
"""Seconds for every machine to start a worker and look at its files."""
EAR = 0.5
"""Seconds for which nothing is heard of a signal while Ray waits."""
GONE = 60.0
"""Seconds without a single machine that works after which a run is given up."""
STORE = 80 << 20
"""Bytes of the object store of a cluster that is started here: tensors never pass through it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A node of the cluster: Ray's id, its host's name and address, and how many CPUs it gives."""

    node: str
    name: str
    cpus: int


@contextmanager
def cluster(address: str | None) -> Iterator[list[Machine]]:
    """Join a Ray cluster, or what this process has joined already, or start one here; gives the machines that work.

    A UsageError when no cluster can be joined at ``address``, when it runs another Ray or Python, or has no CPUs.
    """
    import ray

    if ray.is_initialized():
        yield _working()
        return
    _join(address)
    with _TERMINATION.kept():
        try:
            yield _working()
        finally:
            ray.shutdown()


class _Termination:
    """SIGTERM, kept until Ray's code is left: of what a handler raises there, Ray makes an internal error."""

    def __init__(self) -> None:
        self._arrived: Callable[[], None] | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        handler = signal.getsignal(signal.SIGTERM)
        if not callable(handler) or threading.current_thread() is not threading.main_thread():
            yield
            return
        known = handler

        def keep(number: int, frame: FrameType | None) -> None:
            self._arrived = lambda: known(number, frame)

        signal.signal(signal.SIGTERM, keep)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)
        self.deliver()

    def deliver(self) -> None:
        """Let the handler have what has arrived."""
        arrived, self._arrived = self._arrived, None
        if arrived is not None:
            arrived()


_TERMINATION = _Termination()


def _wait(references: list[object], *, number: int = 1, seconds: float) -> tuple[list[object], list[object]]:
    """Wait as ``ray.wait`` does, with an ear for SIGTERM."""
    import ray

    until = time.monotonic() + seconds
    while True:
        left = max(0.0, until - time.monotonic())
        ready, rest = ray.wait(references, num_returns=number, timeout=min(left, EAR))
        _TERMINATION.deliver()
        if len(ready) >= number or left <= EAR:
            return ready, rest


def _working() -> list[Machine]:
    machines = _machines()
    if not machines:
        raise UsageError("no machine of the cluster has a CPU for this", hint="look at `ray status`")
    return machines


def _machines() -> list[Machine]:
    import ray

    found = []
    for node in ray.nodes():
        cpus = int(node["Resources"].get("CPU", 0))
        if node["Alive"] and cpus:
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            found.append(Machine(node["NodeID"], name, cpus))
    return sorted(found, key=lambda machine: (machine.name, machine.node))


def _join(address: str | None) -> None:
    place, told_by = _place(address)
    if place is None:
        with _own_environment():
            _initialize(
                "this machine", address="local", num_cpus=len(os.sched_getaffinity(0)), object_store_memory=STORE,
                include_dashboard=False,
            )  # fmt: skip
        return
    host, port = endpoint.parsed(place)
    reason = endpoint.refusal(host, port)
    if reason:
        raise UsageError(
            f"no Ray cluster answers: {reason}",
            where=f"{place}, {told_by}",
            hint="start one with `ray start --head` and give the address that it prints; without --address (and "
            "RAY_ADDRESS) one is started for the run; `ray stop` forgets a cluster that is gone",
        )
    _initialize(place, address=place)


def _place(address: str | None) -> tuple[str | None, str]:
    """Return HOST:PORT of the cluster that is meant, None to start one, and who says so; Ray's own rules decide."""
    if address not in (None, "", "auto"):
        return (None if address == "local" else address), "given with --address"
    if os.environ.get("RAY_ADDRESS", "auto") not in ("", "auto"):
        stated = os.environ["RAY_ADDRESS"]
        return (None if stated == "local" else stated), "given in RAY_ADDRESS"
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address(address or None)
    except ConnectionError as error:
        raise UsageError(
            "no Ray cluster runs on this machine", where=f"--address {address}",
            hint="start one with `ray start --head`, or leave --address out to have one for the run",
        ) from error  # fmt: skip
    return found, "which `ray start` noted on this machine"


@contextmanager
def _own_environment() -> Iterator[None]:
    """Start a cluster that reports its use to nobody, and whose workers have this process's priority."""
    added = {name: "0" for name in ("RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness") if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _initialize(where: str, **arguments: object) -> None:
    """Call ``ray.init`` and leave the handling of SIGTERM as it was."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines and lines[0].startswith("Version mismatch"):
            raise UsageError(
                "the cluster runs another Ray or Python than this process", where=[where, *_versions(lines)],
                hint="install the same ray under the same Python on every machine, this one included",
            ) from error  # fmt: skip
        raise UsageError(
            f"no Ray cluster could be joined: {_cause(error)}", where=where,
            hint="run on a machine of the cluster (`ray start --address` makes this one join), and see `ray status`",
        ) from error  # fmt: skip
    except SystemExit:  # what Ray's own handler makes of SIGTERM
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _versions(lines: Sequence[str]) -> list[str]:
    """Put Ray's account of the versions on two lines: the cluster's and this process's."""
    said: list[str] = []
    for line in lines:
        text = line.removeprefix("Version mismatch: ")
        if text.startswith(("Ray:", "Python:")) and said:
            said[-1] += f"{'' if said[-1].endswith(':') else ','} {text}"
        else:
            said.append(text)
    return said


def ask(machines: Sequence[Machine], folder: Path, stamps: Stamps) -> None:
    """Make every machine look for the inputs and for what is written in ``folder``; raises as ``survey.judge`` does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with probing(folder, len(machines)) as probe:
        pending = {}
        for number, machine in enumerate(machines):
            here = NodeAffinitySchedulingStrategy(machine.node, soft=False)
            remote = ray.remote(reply).options(num_cpus=0, max_retries=2, scheduling_strategy=here)
            pending[remote.remote(probe.inquiry(number, stamps))] = number
        ready, late = _wait(list(pending), number=len(pending), seconds=ANSWER)
        replies: dict[int, Reply | str] = {pending[one]: _reply(ray.get, one) for one in ready}
        for one in late:
            replies[pending[one]] = f"did not answer within {ANSWER:g} seconds"
            ray.cancel(one, force=True)
        judge(probe, dict(sorted(replies.items())), [machine.name for machine in machines])


def _reply(get: Callable[[object], Reply], reference: object) -> Reply | str:
    from ray.exceptions import RayError, RayTaskError

    try:
        return get(reference)
    except RayTaskError as error:
        return f"lorabridge does not run there: {_cause(error.cause or error)}"
    except RayError as error:
        return f"no answer: {_cause(error)}"


def results(shares: Iterator[Share], window: int) -> Iterator[Done]:
    """Yield what came of each share as it is done, at most ``window`` of them under way.

    Raises what a worker refused, StorageError when a share's workers were lost too often, or all machines for good.
    """
    import ray

    remote = ray.remote(do).options(
        num_cpus=1, max_retries=RETRIES, retry_exceptions=False, scheduling_strategy="SPREAD"
    )
    running: list[object] = []
    more = True
    try:
        while more or running:
            while more and len(running) < window:
                share = next(shares, None)
                more = share is not None
                if share is not None:
                    running.append(remote.remote(share))
            if running:
                ready, running = _next(running)
                yield _result(ray.get, ready)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _next(running: list[object]) -> tuple[object, list[object]]:
    """Wait for one of the shares that are under way; a StorageError when no machine is left to do them."""
    since = time.monotonic()
    while True:
        ready, rest = _wait(running, seconds=GONE / 6)
        if ready:
            return ready[0], rest
        if _machines():
            since = time.monotonic()
        elif time.monotonic() - since > GONE:
            raise StorageError("every machine of the cluster with a CPU is gone", hint="look at `ray status`")


def _result(get: Callable[[object], Done | Refused], reference: object) -> Done:
    from ray.exceptions import RayError, RayTaskError

    try:
        done = get(reference)
    except RayTaskError as error:
        raise LorabridgeError(
            f"a worker failed: {_cause(error.cause or error)}",
            hint="install the same lorabridge, with its dependencies, on every machine of the cluster",
        ) from error
    except RayError as error:
        raise StorageError(
            f"workers were lost {RETRIES + 1} times: {_cause(error)}",
            hint="look at `ray status`: machines that leave, or too little memory",
        ) from error
    if isinstance(done, Refused):
        raise done.error()
    return done


def _cause(error: BaseException) -> str:
    return first_line(error) or type(error).__name__

"""Do the machines of a cluster see the files that this one sees? Each is asked before anything is written.

The driver writes a probe file where the output will be staged. Every machine must find the driver's words in it and
answer in the file itself, so that both directions of a shared file system are known to work.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..errors import InputError, LorabridgeError, StorageError, UsageError, counted
from ..files.syscalls import calls, refusals, sync, write_all
from .shares import Stamps, stamp

WORD = 32
"""Bytes of what the driver writes, and of each answer."""
_SHARED = "keep inputs and output on one file system that every machine of the cluster mounts under the same path"


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What one machine is asked. ``answer``: what it is to write, and the place in the file for it."""

    version: str
    probe: str
    word: bytes
    answer: bytes
    place: int
    stamps: Stamps


@dataclass(frozen=True, slots=True)
class Reply:
    """What a machine found, in clauses: about its software, the output's place, the inputs."""

    machine: str
    software: tuple[str, ...] = ()
    output: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


def reply(inquiry: Inquiry) -> Reply:
    """Look, on the machine that is asked."""
    here = platform.node()
    if inquiry.version != __version__:
        return Reply(here, (f"has lorabridge {__version__}, the driver has {inquiry.version}",))
    return Reply(here, (), tuple(_written(inquiry)), tuple(_unlike(inquiry.stamps)))


def _written(inquiry: Inquiry) -> Iterator[str]:
    folder = os.path.dirname(inquiry.probe)
    try:
        fd = calls.open(inquiry.probe, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield f"does not see what the driver wrote in {folder}"
        return
    except OSError as error:
        yield f"cannot write in {folder}: {(error.strerror or str(error)).lower()}"
        return
    try:
        if os.pread(fd, WORD, 0) != inquiry.word:
            yield f"sees something else in {folder} than the driver wrote"
            return
        write_all(fd, memoryview(inquiry.answer), inquiry.place)
        sync(fd)
    except OSError as error:
        yield f"cannot write in {folder}: {(error.strerror or str(error)).lower()}"
    finally:
        os.close(fd)


def _unlike(stamps: Stamps) -> Iterator[str]:
    for path, held in stamps.items():
        mine = stamp(path)
        if held is not None and mine is None:
            yield f"does not see {path}"
        elif mine != held:
            yield f"sees another {path}"


class Probe:
    """The file that the driver writes and machines answer in."""

    def __init__(self, path: Path, machines: int) -> None:
        self._path = path
        self._words = [secrets.token_bytes(WORD) for _ in range(machines + 1)]

    def inquiry(self, machine: int, stamps: Stamps) -> Inquiry:
        """Return what to ask a machine, counted from 0."""
        place = WORD * (machine + 1)
        return Inquiry(__version__, str(self._path), self._words[0], self._words[machine + 1], place, stamps)

    def write(self) -> None:
        """Write the driver's word and leave room for the answers; on disk then."""
        with refusals(self._path):
            fd = calls.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                write_all(fd, memoryview(self._words[0] + bytes(WORD * (len(self._words) - 1))), 0)
                sync(fd)
            finally:
                os.close(fd)

    def answered(self, machine: int) -> bool:
        """Say whether a machine's answer has arrived. The file is opened anew, as network file systems ask for."""
        with refusals(self._path), open(self._path, "rb", buffering=0) as file:
            file.seek(WORD * (machine + 1))
            return file.read(WORD) == self._words[machine + 1]

    def remove(self) -> None:
        """Take the file away."""
        with refusals(self._path):
            calls.unlink(self._path)


@contextmanager
def probing(folder: Path, machines: int) -> Iterator[Probe]:
    """Keep a probe file in a folder for the length of a block."""
    probe = Probe((folder / f"probe-{secrets.token_hex(8)}").absolute(), machines)
    probe.write()
    try:
        yield probe
    finally:
        probe.remove()


def judge(probe: Probe, replies: Mapping[int, Reply | str], names: Sequence[str]) -> None:
    """Refuse a cluster one of whose machines has anything to say against the run.

    ``replies``: per machine what it found, or why it did not answer. Raises UsageError about software, StorageError
    about the output's place, InputError about inputs, with every machine.
    """
    lost = [f"{names[i]}: {said}" for i, said in replies.items() if isinstance(said, str)]
    found = {i: said for i, said in replies.items() if isinstance(said, Reply)}
    lost += [f"{names[i]}: {clause}" for i, said in found.items() for clause in said.software]
    output = [f"{names[i]}: {clause}" for i, said in found.items() for clause in said.output]
    output += [
        f"{names[i]}: what it writes does not arrive here"
        for i, said in found.items()
        if not said.software and not said.output and not probe.answered(i)
    ]
    inputs = [f"{names[i]}: {clause}" for i, said in found.items() for clause in said.inputs]
    error: LorabridgeError
    if lost:
        hint = "install the same lorabridge, with its dependencies, on every machine of the cluster"
        error = UsageError(f"{_machines(lost)} cannot take part", where=lost, hint=hint)
    elif output:
        error = StorageError(f"{_machines(output)} cannot write the output", where=[*output, *inputs], hint=_SHARED)
    elif inputs:
        error = InputError(f"{_machines(inputs)} cannot read the inputs", where=inputs, hint=_SHARED)
    else:
        return
    raise error


def _machines(said: Sequence[str]) -> str:
    return counted(len({clause.partition(": ")[0] for clause in said}), "machine") + " of the cluster"

"""Describe the environment, for bug reports: versions, machine, and combinations known not to work."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

from .. import __version__
from ..reports import plain

CORE = ("numpy", "ml_dtypes", "safetensors", "click", "tqdm")
OPTIONAL = ("torch", "mindspore", "peft", "loralib", "transformers", "mindformers", "mindpet", "protobuf")


@dataclass(frozen=True, slots=True)
class EnvReport:
    """Versions by distribution name (None: not installed), the machine, and problems with their cure.

    ``memory_bytes`` and ``available_bytes`` are physical memory, None where the system does not say.
    """

    lorabridge: str
    python: str
    platform: str
    packages: dict[str, str | None]
    cpus: int
    memory_bytes: int | None
    available_bytes: int | None
    encoding: str
    variables: dict[str, str]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge env --json``."""
        return {"schema": "lorabridge/env/1", **asdict(self)}

    def text(self, *, width: int | None = None) -> str:
        """Return the report for people."""
        rows = [("lorabridge", self.lorabridge), ("python", self.python), ("platform", self.platform)]
        rows += [(name, version or "not installed") for name, version in self.packages.items()]
        rows.append(("cpus", str(self.cpus)))
        if self.memory_bytes is not None:
            free = f", {plain.size(self.available_bytes)} available" if self.available_bytes is not None else ""
            rows.append(("memory", plain.size(self.memory_bytes) + free))
        rows += [("encoding", self.encoding), *self.variables.items()]
        label = max(len(name) for name, _ in rows) + 2
        lines = [plain.escape(f"{name.ljust(label)}{value}") for name, value in rows]
        return "\n".join(lines + [f"problem: {plain.escape(text)}" for text in self.problems])


def environment() -> EnvReport:
    """Return the versions and the machine without importing any framework."""
    packages = {name: _version(name) for name in (*CORE, *OPTIONAL)}
    memory, available = _memory()
    return EnvReport(
        lorabridge=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages=packages,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory,
        available_bytes=available,
        encoding=f"stdout {getattr(sys.stdout, 'encoding', None)}, files {sys.getfilesystemencoding()}",
        variables={k: v for k, v in sorted(os.environ.items()) if k.startswith("LORABRIDGE_") and k != "LORABRIDGE_"},
        problems=tuple(problems(packages)),
    )


def problems(packages: dict[str, str | None]) -> list[str]:
    """Return what is known not to work together, each with its cure."""
    found = []
    numpy, mindspore = packages.get("numpy"), packages.get("mindspore")
    if numpy and mindspore and _major(numpy) >= 2:
        found.append(
            f"mindspore {mindspore} next to numpy {numpy}: mindspore needs numpy 1; "
            "run pip install 'numpy<2', or pip install 'lorabridge[mindspore]'"
        )
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _major(version: str) -> int:
    match = re.match(r"\d{1,9}", version)
    return int(match[0]) if match else 0


def _memory() -> tuple[int | None, int | None]:
    """Return total and available bytes of memory from /proc/meminfo (proc(5): values in kB of 1024 bytes)."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file if ":" in line)
        total, available = (int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    return total, available

"""The plan of a conversion: independent steps, built from headers alone, run in any order on any number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..axes import Expr, Read, byte_ranges, computes, reads
from ..inversion import Inverse, invert
from ..tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work: outputs that share source tensors, made together so that each source is read once.

    ``reads``: source names. ``writes``: (output name, expression over the source), in the plan's order.
    """

    reads: tuple[str, ...]
    writes: tuple[tuple[str, Expr], ...]

    @property
    def copies(self) -> bool:
        """Every output is a sequence of byte ranges of the source: no tensor passes through memory."""
        return all(byte_ranges(expr) is not None for _, expr in self.writes)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run reads, makes and leaves out.

    ``specs``: the outputs in file order. ``unused``: (source name, reason) of what is left out on purpose; together
    with the steps' reads it covers every source tensor.
    """

    sources: Mapping[str, TensorSpec]
    specs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    unused: tuple[tuple[str, str], ...]
    digest: str

    def outputs(self) -> dict[str, Expr]:
        """Return every output's expression."""
        return {name: expr for step in self.steps for name, expr in step.writes}

    def inverse(self) -> Inverse:
        """Return how the source tensors come back from the outputs."""
        return invert(self.outputs())

    def step_bytes(self, step: Step) -> int:
        """Return an upper bound of the memory one step holds: its sources, and its outputs where it computes."""
        if step.copies:
            return 0
        size = sum(self.sources[name].nbytes for name in step.reads)
        made = sum(_nbytes(expr) for _, expr in step.writes if computes(expr))
        return size + made

    def peak_bytes(self, workers: int) -> int:
        """Return an upper bound of tensor memory for that many workers."""
        return sum(sorted((self.step_bytes(step) for step in self.steps), reverse=True)[:workers])

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(spec.nbytes for spec in self.specs)


def _nbytes(expr: Expr) -> int:
    return TensorSpec("", expr.dtype, expr.shape).nbytes


def build(
    sources: Mapping[str, TensorSpec],
    outputs: Sequence[tuple[str, Expr]],
    unused: Sequence[tuple[str, str]] = (),
    *,
    seed: str = "",
) -> Plan:
    """Group outputs into steps; ``seed`` names what else the result depends on (container, metadata) for the digest.

    Raises ValueError when a source tensor is neither read nor in ``unused``, or an output name repeats: dialects and
    tables account for every tensor, so that is a defect of lorabridge.
    """
    names = [name for name, _ in outputs]
    if len(set(names)) != len(names):
        raise ValueError(f"outputs repeat: {sorted({n for n in names if names.count(n) > 1})[:3]}")
    specs = tuple(TensorSpec(name, expr.dtype, expr.shape) for name, expr in outputs)
    steps = _group(outputs)
    used = {name for step in steps for name in step.reads}
    missing = sorted(set(sources) - used - {name for name, _ in unused})
    if missing:
        raise ValueError(f"{len(missing)} source tensors are not accounted for, first {missing[0]}")
    digest = hashlib.sha256(seed.encode())
    for name, spec in sorted(sources.items()):
        digest.update(f"<{name!r} {spec.dtype} {spec.shape}".encode())
    spelled: dict[int, str] = {}  # ranks with copies share an expression
    for name, expr in outputs:
        if id(expr) not in spelled:
            spelled[id(expr)] = canonical(expr)
        digest.update(f">{name!r} {spelled[id(expr)]}".encode())
    return Plan(dict(sources), specs, steps, tuple(unused), digest.hexdigest())


def _group(outputs: Sequence[tuple[str, Expr]]) -> tuple[Step, ...]:
    """Join outputs that read a common source tensor into one step (a union-find over source names)."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    known = {key: reads(expr) for key, expr in {id(expr): expr for _, expr in outputs}.items()}
    needs = [known[id(expr)] for _, expr in outputs]
    for names in needs:
        for name in names[1:]:
            parent[root(name)] = root(names[0])
    groups: dict[str, list[int]] = {}
    for i, names in enumerate(needs):
        groups.setdefault(root(names[0]) if names else f"\0{i}", []).append(i)
    return tuple(
        Step(tuple(dict.fromkeys(n for i in members for n in needs[i])), tuple(outputs[i] for i in members))
        for members in groups.values()
    )


def canonical(expr: Expr) -> str:
    """Spell an expression, the same way in every process."""
    if isinstance(expr, Read):
        return repr(expr.name)
    kind = type(expr).__name__
    fields = [f"{k}={_value(getattr(expr, k))}" for k in expr.__slots__]
    return f"{kind}({','.join(fields)})"


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(_value(v) for v in value) + "]"
    if hasattr(value, "dtype"):
        return canonical(value)  # type: ignore[arg-type]
    return str(value)

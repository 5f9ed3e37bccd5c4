"""Select modules and layers while converting; what is not selected is reported as such, never as lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from ..axes import reads
from ..dialects.adapter import Adapter, Extra, LoraModule
from ..errors import MappingError, UsageError


@dataclass(frozen=True, slots=True)
class Selection:
    """``include`` and ``exclude``: globs on module paths or full parameter names; ``layers``: see :func:`layer_set`.

    A module is kept when some include matches (or none is given), no exclude matches, and its layer number, the
    first whole number in its path, is in the set; modules without a number are not affected by ``layers``.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str | None = None

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude or self.layers)


def layer_set(text: str) -> frozenset[int]:
    """Parse ``0-11:2,23``: numbers and inclusive ranges with an optional step, separated by commas."""
    chosen: set[int] = set()
    for part in text.split(","):
        span, _, step = part.strip().partition(":")
        first, dash, last = span.partition("-")
        numbers = (first, last if dash else first, step or "1")
        if not all(n.isascii() and n.isdigit() for n in numbers) or int(numbers[2]) == 0:
            raise UsageError(f"cannot read layers {text!r}", where=part, hint="write for example 0-11:2 or 0,3,8-10")
        low, high, stride = (int(n) for n in numbers)
        if high < low or high > 100_000:
            raise UsageError(f"layers {part!r} is an empty or oversized range", hint="write the lower number first")
        chosen.update(range(low, high + 1, stride))
    return frozenset(chosen)


def layer_of(path: str) -> int | None:
    """Return the first component of a dotted path that is a whole number."""
    return next((int(p) for p in path.split(".") if p.isascii() and p.isdigit()), None)


def select(adapter: Adapter, selection: Selection) -> tuple[Adapter, tuple[str, ...]]:
    """Return the selected part of an adapter and the source tensors that are not selected.

    Raises MappingError when a pattern matches nothing or nothing is left.
    """
    if not selection:
        return adapter, ()
    layers = layer_set(selection.layers) if selection.layers else None
    names = [(m.path, m.path) for m in adapter.modules] + [(e.path, e.name) for e in adapter.extras]
    idle = [p for p in (*selection.include, *selection.exclude) if not any(_hit(p, *n) for n in names)]
    if idle:
        raise MappingError(
            f"{len(idle)} of the selection's patterns matches no module",
            where=[f"{p!r}" for p in idle],
            hint="patterns are globs on module paths, for example '*.query'; `lorabridge inspect` lists the paths",
        )
    if layers is not None and not any(layer_of(path) in layers for path, _ in names):
        known = sorted({number for path, _ in names if (number := layer_of(path)) is not None})
        raise MappingError(
            f"no module is in the layers {selection.layers}",
            where=f"layers in the file: {known[0]} to {known[-1]}" if known else "no path holds a number",
            hint="correct --layers",
        )
    modules = tuple(m for m in adapter.modules if _kept(selection, layers, m.path, m.path))
    extras = tuple(e for e in adapter.extras if _kept(selection, layers, e.path, e.name))
    if not modules and not extras:
        raise MappingError("the selection leaves nothing to convert", hint="widen --include, --exclude or --layers")
    kept = set(tensors_of(modules, extras))
    gone = [name for name in tensors_of(adapter.modules, adapter.extras) if name not in kept]
    return replace(adapter, modules=modules, extras=extras), tuple(gone)


def tensors_of(modules: Sequence[LoraModule], extras: Sequence[Extra]) -> tuple[str, ...]:
    """Return the source tensors that modules and extras read, each once."""
    exprs = [e for m in modules for t in m.terms for e in (t.a, t.b)]
    exprs += [e for m in modules for e in (m.magnitude, m.lora_bias) if e is not None]
    exprs += [extra.value for extra in extras]
    return tuple(dict.fromkeys(name for expr in exprs for name in reads(expr)))


def _hit(pattern: str, path: str, name: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(name, pattern)


def _kept(selection: Selection, layers: frozenset[int] | None, path: str, name: str) -> bool:
    if selection.include and not any(_hit(p, path, name) for p in selection.include):
        return False
    if any(_hit(p, path, name) for p in selection.exclude):
        return False
    number = layer_of(path)
    return layers is None or number is None or number in layers

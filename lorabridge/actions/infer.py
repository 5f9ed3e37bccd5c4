"""Match the tensors of two checkpoints of one network: by contents where the values agree, else by shapes and names."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..conversion.repository import open_input
from ..dialects.adapter import Json
from ..errors import InputError
from ..tensors import Source

if TYPE_CHECKING:
    from ..tensors import Bits

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
HOLES = "ijk"
Evidence = Literal["contents", "equal contents", "shapes"]


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors of one checkpoint whose names differ in numbers only.

    ``names``: the numbers to the full name. ``shape``: of all of them.
    """

    template: str
    names: Mapping[tuple[int, ...], str]
    shape: tuple[int, ...]

    @property
    def first(self) -> str:
        """The name with the smallest numbers."""
        return self.names[min(self.names)]

    @property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """The numbers that each hole takes."""
        return tuple(tuple(sorted(set(column))) for column in zip(*self.names, strict=True))


@dataclass(frozen=True, slots=True)
class Found:
    """One correspondence. One side has one tensor, the other as many as are fused into it, in the order of their rows.

    ``turned``: whether the sides' matrices are transposed against each other (a fused tensor: against its parts).
    ``groups``: blocks of rows in which the parts interleave; 1: one after another. ``others``: what would fit as well.
    """

    hf: tuple[Kind, ...]
    ms: tuple[Kind, ...]
    evidence: Evidence
    turned: bool = False
    groups: int = 1
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Inference:
    """What was found: correspondences in the order of the Hugging Face file, and what is left over on either side.

    ``tied``: (parameter, the one it equals) on the Hugging Face side. ``config``: of the Hugging Face model.
    """

    found: tuple[Found, ...]
    tied: tuple[tuple[Kind, Kind], ...]
    hf_left: tuple[Kind, ...]
    ms_left: tuple[Kind, ...]
    config: Json = field(default_factory=dict)


def infer(hf: Path | str, ms: Path | str) -> Inference:
    """Match the tensors of a Hugging Face model's directory with those of a MindSpore checkpoint.

    Where the two hold the same values, contents decide, fused and transposed tensors included; equal contents (norms
    that are all ones) and different models are matched by shapes and names, and said to be. Reads the first tensor of
    every kind. Raises InputError for what is no checkpoint.
    """
    torch, mindspore = open_input(Path(hf)), open_input(Path(ms))
    try:
        if not torch.source.specs or not mindspore.source.specs:
            raise InputError("a checkpoint holds no tensors", where=f"{hf}, {ms}", hint="give two whole models")
        matching = _Matching(torch.source, mindspore.source)
        return replace(matching.run(), config=torch.model_config or {})
    finally:
        torch.source.close()
        mindspore.source.close()


def kinds(source: Source) -> list[Kind]:
    """Group a checkpoint's tensors by their names without numbers; kinds whose shapes differ stay apart."""
    groups: dict[tuple[str, tuple[int, ...]], dict[tuple[int, ...], str]] = {}
    for name, spec in source.specs.items():
        numbers = tuple(int(text) for text in _NUMBER.findall(name))
        if len(numbers) > len(HOLES):
            numbers, template = (), name
        else:
            holes = iter(HOLES)
            template = _NUMBER.sub(lambda _: f"{{{next(holes)}}}", name)  # noqa: B023
        groups.setdefault((template, spec.shape), {})[numbers] = name
    return [Kind(template, names, shape) for (template, shape), names in groups.items()]


class _Matching:
    """The work of matching: what is open on either side, and what was found."""

    def __init__(self, hf: Source, ms: Source) -> None:
        self.hf, self.ms = hf, ms
        self.open_hf, self.open_ms = kinds(hf), kinds(ms)
        self.found: list[Found] = []

    def run(self) -> Inference:
        self._fused()
        self._by_contents()
        tied = self._tied()
        self._by_shapes()
        order = {name: i for i, name in enumerate(self.hf.specs)}
        self.found.sort(key=lambda one: order[one.hf[0].first])
        return Inference(tuple(self.found), tuple(tied), tuple(self.open_hf), tuple(self.open_ms))

    def _take(self, one: Found) -> None:
        self.found.append(one)
        self.open_hf = [kind for kind in self.open_hf if kind not in one.hf]
        self.open_ms = [kind for kind in self.open_ms if kind not in one.ms]

    def _by_contents(self) -> None:
        """Pair tensors with equal bits, straight or transposed; of several with the same bits, the likest names."""
        held: dict[str, list[tuple[Kind, bool]]] = {}
        for kind in self.open_hf:
            bits = self.hf.read(kind.first)
            held.setdefault(_digest(bits.reshape(-1)), []).append((kind, False))
            if bits.ndim == 2 and 1 not in bits.shape:
                held.setdefault(_digest(bits.T), []).append((kind, True))
        pairs = []
        for kind in self.open_ms:
            bits = self.ms.read(kind.first)
            fits = [
                (one, turned)
                for one, turned in held.get(_digest(bits.reshape(-1)), [])
                if one.counts == kind.counts and _shaped(one.shape, kind.shape, turned)
            ]
            pairs += [(_likeness(one, kind), one, kind, turned) for one, turned in fits]
        for _, one, kind, turned in sorted(pairs, key=lambda pair: -pair[0]):
            if one in self.open_hf and kind in self.open_ms:
                rivals = tuple(p[1].template for p in pairs if p[2] is kind and p[1] is not one)
                rivals = tuple(dict.fromkeys(rivals))
                self._take(Found((one,), (kind,), "equal contents" if rivals else "contents", turned, others=rivals))

    def _fused(self) -> None:
        """Find tensors whose rows are those of several on the other side."""
        for whole in list(self.open_ms):
            found = _parts(self.ms.read(whole.first), self._rows(self.hf, self.open_hf, whole))
            if found is not None:
                parts, groups, turned = found
                self._take(Found(parts, (whole,), "contents", turned, groups))
        for whole in list(self.open_hf):
            found = _parts(self.hf.read(whole.first), self._rows(self.ms, self.open_ms, whole))
            if found is not None:
                parts, groups, turned = found
                self._take(Found((whole,), parts, "contents", turned, groups))

    def _rows(self, source: Source, open_kinds: Iterable[Kind], whole: Kind) -> list[tuple[Kind, Bits]]:
        return [
            (kind, source.read(kind.first))
            for kind in open_kinds
            if kind.counts == whole.counts and len(kind.shape) == len(whole.shape) == 2
        ]

    def _tied(self) -> list[tuple[Kind, Kind]]:
        """Find leftovers of the Hugging Face side that equal a parameter that is matched."""
        tied = []
        for kind in list(self.open_hf):
            for one in self.found:
                other = one.hf[0]
                alike = len(one.hf) == 1 and other.shape == kind.shape and len(kind.shape) == 2
                if alike and _whole(self.hf, kind) == _whole(self.hf, other):
                    tied.append((kind, other))
                    self.open_hf.remove(kind)
                    break
        return tied

    def _by_shapes(self) -> None:
        """Pair what is left by shape and likeness of names; whatever else has the shape is named."""
        pairs = [
            (_likeness(one, kind), one, kind)
            for one in self.open_hf
            for kind in self.open_ms
            if one.counts == kind.counts and (_shaped(one.shape, kind.shape, False) or one.shape == kind.shape[::-1])
        ]
        for _, one, kind in sorted(pairs, key=lambda pair: -pair[0]):
            if one in self.open_hf and kind in self.open_ms:
                others = tuple(other.template for _, other, same in pairs if same is kind and other is not one)
                self._take(Found((one,), (kind,), "shapes", one.shape != kind.shape, others=others))


def _whole(source: Source, kind: Kind) -> str:
    return _digest(source.read(kind.first).reshape(-1))


def _digest(bits: Bits) -> str:
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(bits).tobytes()).hexdigest()


def _shaped(one: tuple[int, ...], other: tuple[int, ...], turned: bool) -> bool:
    """Say whether shapes agree but for axes of length one, or are each other's transposes."""
    if turned:
        return one == other[::-1]
    return [n for n in one if n != 1] == [n for n in other if n != 1]


def _likeness(one: Kind, other: Kind) -> float:
    return difflib.SequenceMatcher(None, _words(one.template), _words(other.template)).ratio()


def _words(template: str) -> str:
    """Spell what both worlds call differently alike, so that only real differences count."""
    text = template.lower()
    for old, new in (("gamma", "weight"), ("beta", "bias"), ("embedding_table", "weight"), ("layernorm", "ln"),
                     ("layer_norm", "ln"), ("norm", "ln")):  # fmt: skip
        text = text.replace(old, new)
    return text


def _parts(whole: Bits, parts: Sequence[tuple[Kind, Bits]]) -> tuple[tuple[Kind, ...], int, bool] | None:
    """Return the tensors whose rows make up ``whole``, the blocks they interleave in, and whether it is transposed."""
    for turned in (False, True):
        rows = _positions(whole.T if turned else whole)
        if rows is None:
            continue
        held: list[tuple[list[int], Kind]] = []
        for kind, bits in parts:
            places = [rows.get(row.tobytes(), -1) for row in bits] if bits.dtype == whole.dtype else [-1]
            if places and min(places) >= 0:
                held.append((places, kind))
        held.sort(key=lambda one: one[0][0])
        if len(held) > 1 and sorted(place for places, _ in held for place in places) == list(range(len(rows))):
            groups = {_runs(places) for places, _ in held}
            if len(groups) == 1 and None not in groups:
                return tuple(kind for _, kind in held), groups.pop() or 1, turned
    return None


def _positions(matrix: Bits) -> dict[bytes, int] | None:
    """Return where each row lies, or None where rows repeat and tell nothing."""
    import numpy as np

    rows = {row.tobytes(): number for number, row in enumerate(np.ascontiguousarray(matrix))}
    return rows if len(rows) == matrix.shape[0] else None


def _runs(places: Sequence[int]) -> int | None:
    """Return in how many runs of equal length consecutive rows lie, or None for another order."""
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
    lengths = {stop - start for start, stop in zip(starts, [*starts[1:], len(places)], strict=True)}
    ascending = all(places[a] < places[b] for a, b in itertools.pairwise(starts))
    return len(starts) if len(lengths) == 1 and ascending else None

"""Which parameters two models differ in, and what of an adapter can hold each change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

import numpy as np

from ..arithmetic import floats
from ..arithmetic.floats import Bits
from ..axes import Expr
from ..dialects.adapter import Adapter, Extra, Facts, Json, ModuleKind
from ..dialects.pairs import EMBEDDING_WEIGHTS
from ..dialects.readings import EMBEDDING_WORDS
from ..errors import InputError, MappingError
from ..families import tables
from ..families.rules import SideName, Slot, Table
from ..families.variants import Index
from ..tensors import Source
from .sides import Rows

WEIGHTS = ("weight", *EMBEDDING_WEIGHTS)
CURE = "leave them out with --exclude GLOB, or take their modules over whole with --save GLOB"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models under common names, each over its own source."""

    base: Adapter
    base_source: Source
    tuned: Adapter
    tuned_source: Source
    names: str
    family: str | None
    mappings: Path | None
    config: Json | None


@dataclass(frozen=True, slots=True)
class Changed:
    """A matrix that changed; ``turned``: it is stored as the transpose of ``B @ A`` (embeddings, ``[in, out]``)."""

    path: str
    parameter: str
    kind: ModuleKind
    turned: bool
    base: Expr
    tuned: Expr

    @property
    def name(self) -> str:
        """The parameter's name."""
        return f"{self.path}.{self.parameter}"


@dataclass(frozen=True, slots=True)
class Changes:
    """What two models differ in; ``left_out``: (tensor, reason); ``extras`` read the tuned model."""

    matrices: tuple[Changed, ...]
    extras: tuple[Extra, ...]
    unchanged: int
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def find_changes(
    pair: Pair, include: Sequence[str], exclude: Sequence[str], save: Sequence[str], facts: Facts
) -> Changes:  # fmt: skip
    """Compare two models parameter by parameter and say how each change can be carried.

    Raises MappingError with every parameter that no adapter holds, InputError where nothing differs.
    """
    before, after = ({extra.name: extra for extra in side.extras} for side in (pair.base, pair.tuned))
    _check_patterns(before.keys() | after.keys(), (*include, *exclude, *save))
    left_out = [(name, "outside the selection") for name in after if not _chosen(name, include, exclude)]
    problems = _unpaired(pair, before, after, include, exclude, left_out)
    changed, rounded, unchanged = [], [], 0
    for name in after.keys() & before.keys():
        if not _chosen(name, include, exclude):
            continue
        one, two = before[name].value, after[name].value
        if one.shape != two.shape:
            problems.append(f"{name}: {list(one.shape)} in BASE, {list(two.shape)} in TUNED")
            continue
        if not _differs(one, pair.base_source, two, pair.tuned_source):
            unchanged += 1
            rounded += [name] if one.dtype != two.dtype else []
        else:
            changed.append(after[name])
    sorting = _Sorting(pair, before, after, save, facts, problems)
    matrices, extras = sorting.sort(changed)
    if problems:
        raise MappingError(
            f"{len(problems)} differences have no place in an adapter", where=sorted(problems), hint=CURE
        )
    if not changed:
        raise InputError("the models do not differ", where=pair.tuned_source.path.name, hint="check the inputs")
    if not matrices:
        raise MappingError(
            "no matrix changed that would get factors, and an adapter without any is none",
            where=sorted({extra.name for extra in extras}),
            hint="copy these parameters instead, with lorabridge convert --include",
        )  # fmt: skip
    warnings = list(sorting.warnings)
    if rounded:
        warnings.append(
            f"{len(rounded)} tensors have another type in TUNED and are equal but for its rounding; "
            "the changed ones hold that rounding too"
        )
    return Changes(matrices, extras, unchanged, tuple(left_out), tuple(warnings))


def _check_patterns(names: Sequence[str] | set[str], patterns: Sequence[str]) -> None:
    idle = [repr(p) for p in patterns if not any(_hit(name, p) for name in names)]
    if idle:
        raise MappingError(
            "a pattern matches no parameter", where=idle, hint="`lorabridge inspect --tensors` lists the names"
        )


def _hit(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def _chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    wanted = not include or any(_hit(name, p) for p in include)
    return wanted and not any(_hit(name, p) for p in exclude)


def _unpaired(
    pair: Pair, before: Mapping[str, Extra], after: Mapping[str, Extra], include: Sequence[str],
    exclude: Sequence[str], left_out: list[tuple[str, str]],
) -> list[str]:  # fmt: skip
    """Return problems with parameters that only one model has; copies of another parameter are left out."""
    problems = []
    for mine, other, source, missing in (
        (before, after, pair.base_source, "TUNED"), (after, before, pair.tuned_source, "BASE"),
    ):  # fmt: skip
        for name in mine.keys() - other.keys():
            if not _chosen(name, include, exclude):
                continue
            twin = _twin(mine[name], mine, other, source)
            if twin:
                left_out.append((name, f"a copy of {twin}, which {missing} does not store twice"))
            else:
                problems.append(f"{name}: {missing} does not have it")
    return problems


def _twin(extra: Extra, mine: Mapping[str, Extra], other: Mapping[str, Extra], source: Source) -> str | None:
    value = extra.value
    for name, candidate in mine.items():
        same = (candidate.value.dtype, candidate.value.shape) == (value.dtype, value.shape)
        if name in other and same and len(value.shape) > 1 and not _differs(candidate.value, source, value, source):
            return name
    return None


def _differs(one: Expr, first: Source, two: Expr, second: Source) -> bool:
    """Say whether two tensors differ by more than the rounding of one of them to the other's type."""
    old, new = Rows(one, first), Rows(two, second)
    return any(not _equal(old.take(i, j), one, new.take(i, j), two) for i, j in new.spans())


def _equal(old: Bits, one: Expr, new: Bits, two: Expr) -> bool:
    if one.dtype == two.dtype:
        return bool(np.array_equal(old, new)) if one.dtype.bits < 128 else old.tobytes() == new.tobytes()
    if one.dtype.kind != "float" or two.dtype.kind != "float":
        return False
    x, y = floats.values(old, one.dtype), floats.values(new, two.dtype)
    narrow = min((one.dtype, two.dtype), key=lambda dtype: floats.LAYOUTS[dtype.name].mantissa)
    return bool(np.array_equal(floats.rounded(x, narrow), floats.rounded(y, narrow), equal_nan=True))


class _Sorting:
    """Decide for each changed parameter what of an adapter carries it."""

    def __init__(
        self, pair: Pair, before: Mapping[str, Extra], after: Mapping[str, Extra], save: Sequence[str], facts: Facts,
        problems: list[str],
    ) -> None:  # fmt: skip
        self._before, self._after = before, after
        self._save = save
        self._facts = facts
        self._problems = problems
        self._side: SideName = "hf" if pair.names == "hf" else "ms"
        self._tables = _tables(pair, self._side)
        self._indexes = [Index(table, self._side, table.prefix(self._side).answers) for table in self._tables]
        self.warnings: list[str] = []

    def sort(self, changed: Sequence[Extra]) -> tuple[tuple[Changed, ...], tuple[Extra, ...]]:
        """Return the matrices to factorize, and the parameters that go beside them."""
        matrices: dict[str, Changed] = {}
        whole: dict[str, None] = {}
        rest: list[Extra] = []
        for extra in changed:
            if any(_hit(extra.name, p) for p in self._save):
                whole[extra.path] = None
            elif extra.value.dtype.kind != "float":
                self._problems.append(f"{extra.name}: {extra.value.dtype} values changed")
            elif extra.parameter in WEIGHTS and 2 <= len(extra.value.shape) <= 5 and extra.path:
                found = self._matrix(extra)
                if found is not None:
                    matrices[extra.path] = found
            else:
                rest.append(extra)
        extras = []
        for extra in rest:
            if extra.path in matrices and extra.parameter == "bias":
                extras.append(Extra(extra.path, "bias", extra.value, "bias"))
            elif extra.path and extra.path not in matrices and len(extra.value.shape) < 2:
                whole[extra.path] = None
            elif extra.path not in whole:
                self._problems.append(f"{extra.name}: {list(extra.value.shape)} is no layer's weight")
        for path in whole:
            if path in matrices or not path:
                self._problems.append(f"{path or 'a parameter without a module'}: cannot be saved as a module")
            own = [e for e in self._after.values() if e.path == path]
            extras += [Extra(e.path, e.parameter, e.value, "modules_to_save") for e in own]
        return tuple(matrices.values()), tuple(extras)

    def _matrix(self, extra: Extra) -> Changed | None:
        axes = len(extra.value.shape)
        slot = self._slot(extra.path)
        base = self._before[extra.name].value
        if axes > 2:
            if self._facts.get(extra.path, "groups") not in (None, 1):
                self._problems.append(f"{extra.name}: a grouped convolution")
                return None
            kind = cast(ModuleKind, f"conv{axes - 2}d")
            return Changed(extra.path, extra.parameter, kind, False, base, extra.value)
        kind = self._kind(extra, slot)
        turned = kind == "embedding"
        if kind == "linear":
            stated = self._facts.get(extra.path, "fan_in_fan_out")
            order = slot.rule.side(self._side).order if slot is not None else "out in"
            turned = stated is True or (stated is None and order == "in out")
        return Changed(extra.path, extra.parameter, kind, turned, base, extra.value)

    def _kind(self, extra: Extra, slot: Slot | None) -> ModuleKind:
        stated = self._facts.get(extra.path, "kind")
        if stated in ("linear", "embedding"):
            return cast(ModuleKind, stated)
        if slot is not None and slot.rule.kind in ("linear", "embedding"):
            return cast(ModuleKind, slot.rule.kind)
        last = extra.path.rpartition(".")[2].lower()
        table = extra.parameter in EMBEDDING_WEIGHTS or any(word in last for word in EMBEDDING_WORDS)
        if table:
            self.warnings.append(f"{extra.path} is taken for an embedding by its name; --kind says otherwise")
        return "embedding" if table else "linear"

    def _slot(self, path: str) -> Slot | None:
        """Return what the table says of a module; a problem where tables that fit equally well disagree."""
        found: list[Slot] = []
        for index in self._indexes:
            slots = [hit.what for hit in index.find(path) if isinstance(hit.what, Slot) and hit.what.field == "module"]
            found += slots[:1]
        said = {(slot.rule.kind, slot.rule.side(self._side).order) for slot in found}
        if len(said) > 1 and self._facts.get(path, "fan_in_fan_out") is None:
            fitting = ", ".join(table.family for table in self._tables)
            self._problems.append(f"{path}: the tables that fit ({fitting}) store it differently; choose with --family")
        return found[0] if found else None


def _tables(pair: Pair, side: SideName) -> list[Table]:
    """Return the tables that know the models' names: as told, else those that fit, the config's model_type deciding."""
    if pair.family is not None:
        told = tables.load_family(pair.family, pair.mappings)
        return [] if told.identity else [told]
    known = tables.load_tables(pair.mappings)
    names = [extra.name for extra in pair.tuned.extras]
    fitting = [known[name] for name in tables.detect_family(known, names, side) if not known[name].identity]
    model_type = (pair.config or {}).get("model_type")
    typed = [table for table in fitting if model_type in table.model_types]
    return typed or fitting

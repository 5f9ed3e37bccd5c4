"""One run of a table over a checkpoint: where names go, what sizes are known, and what went wrong so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import product

from ..errors import SHOWN, MappingError
from ..names import Template
from ..sizes import SizeError
from .completeness import CONFIG
from .rules import Buffer, Face, Field, Rule, SideName, Slot, Stack, Table, slots
from .stacks import Stacks
from .variants import Hit, Index, Owner, Variant

MERGE = "merge the adapter into the base model first"


@dataclass(frozen=True, slots=True)
class Work:
    """``source`` and ``to``: the sides. ``targets``: slot by rule, field and face of the target side."""

    table: Table
    source: SideName
    to: SideName
    variant: Variant
    sizes: Mapping[str, int] | None
    targets: Mapping[tuple[int, Field, int], Slot]
    index: Index
    stacks: Mapping[SideName, Stacks]
    numbers: Mapping[SideName, Mapping[str, range]]
    problems: list[str] = field(default_factory=list)
    hints: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(
        cls, table: Table, source: SideName, to: SideName, variant: Variant, sizes: Mapping[str, int] | None
    ) -> Work:
        """Prepare a run."""
        targets = {(id(s.rule), s.field, s.face): s for s in slots(table, to)}
        numbers: dict[SideName, dict[str, range]] = {source: {}, to: {}}
        for hole, span in table.holes if sizes is not None else ():
            for side in (source, to):
                numbers[side][hole] = span.numbers(side, sizes or {})
        stacks = {side: Stacks.of(table, side, variant) for side in (source, to)}
        index = Index(table, source, (variant.prefix(source),))
        return cls(table, source, to, variant, sizes, targets, index, stacks, numbers)

    @property
    def counts(self) -> dict[str, int]:
        """How many numbers every hole has; empty without sizes."""
        return {hole: len(numbers) for hole, numbers in self.numbers[self.to].items()}

    def complain(self, problem: str, hint: str = "") -> None:
        """Note what does not fit, and the cure."""
        self.problems.append(problem)
        if hint:
            self.hints[hint] = None

    def fail(self, name: str, error: ValueError) -> None:
        """Note why a name cannot be converted; where sizes are missing, the config is the cure."""
        self.complain(f"{name}: {error}", CONFIG if isinstance(error, SizeError) and error.missing else "")

    def unmapped(self, name: str) -> None:
        """Note a name without a rule, with the nearest one."""
        near = ""
        if len(self.problems) < SHOWN:
            known = [str(slot.template) for slot in slots(self.table, self.source)]
            plain = ".".join("{i}" if part.isdigit() else part for part in name[:300].split("."))
            near = next(iter(get_close_matches(plain, known, 1, 0.5)), "")
        self.complain(f"{name}: no rule in {self.table.file}" + (f" (nearest: {near})" if near else ""))

    def find(self, name: str, *, modules: bool) -> tuple[Owner, Mapping[str, int]] | None:
        """Return what a name belongs to, and its numbers on the target side; problems are noted.

        The load-time proofs leave at most one reading under the chosen variant and a known config.
        """
        hits = [
            hit
            for hit in self.index.find(name)
            if not isinstance(hit.what, Stack)
            and (isinstance(hit.what, Slot) and hit.what.field == "module") == modules
            and self.variant.holds(hit.when)
        ]
        if len(hits) > 1:
            near = [hit for hit in hits if self._inside(hit)]
            if len(near) != 1:
                whats = [hit.what.rule if isinstance(hit.what, Slot) else hit.what for hit in hits]
                refs = " and ".join(str(what.ref) for what in whats)
                self.complain(f"{name}: its number decides between {refs}", CONFIG)
                return None
            hits = near
        if not hits or (self.sizes is not None and isinstance(hits[0].what, Buffer) and not self._inside(hits[0])):
            self.unmapped(name)
            return None
        return (hits[0].what, hits[0].bindings) if self._counts_fit(name, hits[0]) else None

    def _inside(self, hit: Hit) -> bool:
        known = self.numbers[self.source]
        return self.sizes is not None and all(value in known.get(h, (value,)) for h, value in hit.bindings.items())

    def _counts_fit(self, name: str, hit: Hit) -> bool:
        """Check numbers against the config; what is left out because of its number needs one."""
        before = len(self.problems)
        if isinstance(hit.what, Buffer) and self.sizes is None:
            spans = [span.start(self.source).text for hole, span in self.table.holes if hole in hit.bindings]
            if any(start != "0" for start in spans):
                self.complain(f"{name}: its number decides whether {hit.what.ref} leaves it out", CONFIG)
        for hole, numbers in self.numbers[self.source].items() if isinstance(hit.what, Slot) else ():
            value = hit.bindings.get(hole)
            if value is not None and value not in numbers:
                self.complain(f"{name}: number {value}, but {self._span(hole)} in the config")
        return len(self.problems) == before

    def _span(self, hole: str) -> str:
        span, numbers = self.table.span(hole), self.numbers[self.source][hole]
        start = span.start(self.source)
        size = span.stop or span.count
        assert size is not None
        if start.text == "0":
            return f"{size} = {len(numbers)}"
        return f"the numbers {{{hole}}} are {numbers.start} ... {numbers.stop - 1}"

    def target(self, rule: Rule, what: Field, face: int, bindings: Mapping[str, int]) -> str:
        """Return the name of a face on the target side; SizeError where numbers shift by a size that is not known."""
        return self.variant.name(self.targets[id(rule), what, face], self.to, self.moved(bindings))

    def every(self, template: Template) -> list[dict[str, int]]:
        """Return all numbers of a template on the target side; none where they are not known."""
        holes = template.holes
        ranges = [range(n) if n else self.numbers[self.to].get(hole, range(0)) for hole, n in holes.items()]
        return [dict(zip(holes, values, strict=True)) for values in product(*ranges)]

    def moved(self, bindings: Mapping[str, int]) -> dict[str, int]:
        """Return numbers as the target side counts them."""
        moved = dict(bindings)
        for hole, span in self.table.holes:
            if hole in moved and span.shifted:
                if self.sizes is None:
                    raise SizeError(f"the number of {{{hole}}} needs the sizes {span.hf} and {span.ms}")
                moved[hole] += self.numbers[self.to][hole].start - self.numbers[self.source][hole].start
        return moved

    def rows(self, rule: Rule, face: Face, known: Mapping[int, int], total: int | None, where: str) -> list[int] | None:
        """Return the rows of each part of a face from the config, or from shapes when all are equal or known."""
        sizes = [rule.out[part] for part in face.parts]
        if self.sizes is not None:
            return [size.value(self.sizes) for size in sizes]
        if all(part in known for part in face.parts):
            return [known[part] for part in face.parts]
        equal = len({size.text for size in sizes}) == 1
        if equal and total is not None and total % len(sizes) == 0:
            return [total // len(sizes)] * len(sizes)
        if equal and known and len({known[part] for part in face.parts if part in known}) == 1:
            return [next(known[part] for part in face.parts if part in known)] * len(sizes)
        needed = dict.fromkeys(name for size in sizes for name in size.fields)
        self.complain(f"{where}: the rows of its parts need {', '.join(needed)} ({rule.ref})", CONFIG)
        return None

    def groups(self, rule: Rule, face: Face, where: str) -> int | None:
        """Return a face's number of row groups."""
        if not face.groups.fields or self.sizes is not None:
            return face.groups.value(self.sizes or {})
        self.complain(f"{where}: its row layout needs {', '.join(face.groups.fields)} ({rule.ref})", CONFIG)
        return None

    def finish(self, given: Sequence[str]) -> None:
        """Raise what was noted."""
        if not self.problems:
            return
        problem = f"{len(self.problems)} of {len(given)} names do not fit the table {self.table.family}"
        there = Index(self.table, self.to, self.table.prefix(self.to).answers)
        if all(there.find(name) for name in given):
            problem = f"every name is already on the {self.to} side of the table {self.table.family}"
            self.hints["convert in the other direction, or use --family identity to keep the names"] = None
        raise MappingError(
            problem, where=self.problems, hint="; ".join(self.hints) or f"lorabridge tables show {self.table.family}"
        )


def untouched(rule: Rule, source: SideName, to: SideName, face: Face) -> int | None:
    """Return the target face that holds the same rows in the same order as a source face; None where there is none."""
    mine, theirs = rule.side(source), rule.side(to)
    for k, other in enumerate(theirs.faces):
        same = other.parts == face.parts and (len(face.parts) == 1 or other.groups.text == face.groups.text)
        if same and all(mine.rows_of(part) == theirs.rows_of(part) for part in face.parts):
            return k
    return None

"""Take a table's TOML apart, and collect what is wrong with it, each with file and line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..names import Template, TemplateError
from ..sizes import Size, SizeError
from .rules import RuleRef

MOST_RULES = 200

Item = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Reader:
    """Where the text stands, and what is wrong with it so far."""

    file: str
    lines: list[str]
    problems: list[str] = field(default_factory=list)
    headers: dict[str, list[int]] = field(default_factory=dict)

    def complain(self, ref: RuleRef, problem: str) -> None:
        """Note a problem."""
        self.problems.append(f"{ref}: {problem}")

    def header(self, section: str, nth: int | None = None) -> RuleRef:
        """Find the nth ``[[section]]``, or the ``[section]``."""
        if not self.headers:
            for k, line in enumerate(self.lines, 1):
                if line.lstrip().startswith("["):
                    self.headers.setdefault(line.split("#")[0].replace(" ", "").strip(), []).append(k)
        at = self.headers.get(f"[[{section}]]" if nth is not None else f"[{section}]", [])
        return RuleRef(self.file, at[nth or 0] if len(at) > (nth or 0) else 0)

    def key(self, ref: RuleRef, name: str) -> RuleRef:
        """Find the line of a key below a header; the header's own line where it cannot be seen."""
        for k, line in enumerate(self.lines[ref.line :], ref.line + 1):
            if line.startswith("["):
                break
            if line.split("=")[0].strip().strip('"') == name:
                return RuleRef(self.file, k)
        return ref

    def known(self, ref: RuleRef, item: Item, allowed: Iterable[str]) -> None:
        """Refuse keys that mean nothing."""
        allowed = tuple(allowed)
        for name in item:
            if name not in allowed:
                self.complain(self.key(ref, name), f"unknown key {name[:40]!r}; known are {', '.join(allowed)}")

    def text(self, ref: RuleRef, item: Item, name: str, default: str | None = None) -> str:
        """Return a text that is not empty."""
        value = item.get(name, default)
        if not isinstance(value, str) or not value.strip():
            self.complain(self.key(ref, name), f"{name} must be given as a text that is not empty")
            return ""
        return value

    def pairs(self, ref: RuleRef, item: Item, name: str) -> tuple[tuple[str, str], ...]:
        """Return a table of texts."""
        value = item.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            self.complain(self.key(ref, name), f"{name} must be a table of texts")
            return ()
        return tuple(value.items())

    def words(self, ref: RuleRef, item: Item, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        value = item.get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.complain(self.key(ref, name), f"{name} must be a list of texts")
            return ()
        return tuple(value)

    def flag(self, ref: RuleRef, item: Item, name: str, default: bool) -> bool:
        """Return a truth value."""
        value = item.get(name, default)
        if not isinstance(value, bool):
            self.complain(self.key(ref, name), f"{name} must be true or false")
        return bool(value)

    def size(self, ref: RuleRef, name: str, text: str) -> Size:
        """Read an expression; 1 stands for one that cannot be read."""
        try:
            return Size.parse(text)
        except SizeError as error:
            self.complain(self.key(ref, name), str(error))
            return Size.parse("1")

    def template(self, ref: RuleRef, name: str, text: str) -> Template:
        """Read a template; one that matches nothing stands for one that cannot be read."""
        try:
            return Template.parse(text)
        except TemplateError as error:
            self.complain(self.key(ref, name), str(error))
            return Template("?", ("?",))

    def optional(self, ref: RuleRef, item: Item, name: str) -> Template | None:
        """Return a template where one is given."""
        return self.template(ref, name, self.text(ref, item, name)) if name in item else None

    def items(self, data: Item, section: str, allowed: Iterable[str]) -> list[tuple[RuleRef, Item]]:
        """Return every ``[[section]]`` with its place."""
        value = data.get(section, [])
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            self.complain(RuleRef(self.file, 0), f"{section} must be written as [[{section}]]")
            return []
        if len(value) > MOST_RULES:
            self.complain(RuleRef(self.file, 0), f"more than {MOST_RULES} [[{section}]] entries")
            return []
        found = [(self.header(section, k), item) for k, item in enumerate(value)]
        for ref, item in found:
            self.known(ref, item, allowed)
        return found

    def section(self, data: Item, name: str) -> tuple[RuleRef, Item]:
        """Return the ``[section]`` with its place."""
        value = data.get(name, {})
        ref = self.header(name)
        if not isinstance(value, dict):
            self.complain(self.key(RuleRef(self.file, 0), name), f"{name} must be a table")
            return ref, {}
        return ref, value

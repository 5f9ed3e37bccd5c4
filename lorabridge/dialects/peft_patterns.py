"""Match module paths by regular expression as peft does, in time linear in pattern times path.

The keys of ``rank_pattern`` and ``alpha_pattern`` come from a file that may be hostile, so what is more than a literal
goes to an automaton of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..errors import MappingError
from .automaton import Accepts, Refused, automaton_of

MAX_PATTERN = 1000
"""Characters in one pattern."""
_PLAIN = re.compile(r"\^?(?:[^\\.^$*+?{}\[\]()|]|\\?\.|\\[^\w\s])*\$?")


@lru_cache(maxsize=4096)
def _matcher(pattern: str, *, key: bool) -> Accepts:
    if len(pattern) > MAX_PATTERN:
        raise MappingError(
            f"a pattern has {len(pattern)} characters, more than {MAX_PATTERN}",
            where=f"adapter_config.json: {pattern[:60]!r} ...",
            hint="list the modules by name instead",
        )
    whole = rf"(.*\.)?({pattern})$"
    if key and _PLAIN.fullmatch(pattern):  # no repetition and no branches: re takes linear time per dot of the path
        return lambda text: re.match(whole, text) is not None
    try:
        if key:
            return automaton_of(whole).matches
        return automaton_of(pattern, whole=True).matches
    except Refused as error:
        raise MappingError(
            f"a pattern cannot be matched safely: {error}",
            where=f"adapter_config.json: {pattern!r}",
            hint="rewrite it with literals, classes, groups, |, repetition and anchors, or list the modules by name",
        ) from None


def key_matches(key: str, path: str) -> bool:
    """Say whether a key of rank_pattern or alpha_pattern matches a module path.

    Source: peft 0.21.2, ``peft.utils.other.get_pattern_key``. MappingError: the key is too long, not a regular
    expression, or uses lookaround, backreferences, flags or word boundaries.
    """
    return _matcher(key, key=True)(path)


def pattern_matches(pattern: str, path: str) -> bool:
    """Say whether a regular expression matches a whole module path, as ``target_modules`` given as a string does.

    Source: peft 0.21.2, ``match_target_against_key``. MappingError as for :func:`key_matches`.
    """
    return _matcher(pattern, key=False)(path)


@dataclass(frozen=True, slots=True)
class _Literal:
    """A key without repetition and branches: its characters, and where any character may stand."""

    length: int
    wild: tuple[int, ...]
    anchored: bool

    def form(self, text: str) -> str:
        """Blank out the places where any character may stand."""
        chars = list(text)
        for place in self.wild:
            chars[place] = "\n"
        return "".join(chars)

    def part(self, path: str) -> str | None:
        """Return the blanked end of a path that such a key is compared with, or None where none can match."""
        at = len(path) - self.length
        if at < 0 or (at > 0 and (self.anchored or path[at - 1] != ".")):
            return None
        return self.form(path[at:])


class KeyTable:
    """Find which keys of rank_pattern or alpha_pattern match a path, without trying each literal key.

    MappingError on building: a key that :func:`key_matches` refuses.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = tuple(keys)
        self._literals: dict[_Literal, dict[str, list[int]]] = {}
        self._others: list[tuple[int, Accepts]] = []
        for number, key in enumerate(self.keys):
            matcher = _matcher(key, key=True)
            if _PLAIN.fullmatch(key) and "\n" not in key:
                literal, text = _literal(key)
                self._literals.setdefault(literal, {}).setdefault(literal.form(text), []).append(number)
            else:
                self._others.append((number, matcher))

    def matching(self, path: str) -> list[str]:
        """Return the keys that match, in their order; peft takes the first."""
        if "\n" in path:
            return [key for key in self.keys if key_matches(key, path)]
        found = [number for number, matcher in self._others if matcher(path)]
        for literal, forms in self._literals.items():
            part = literal.part(path)
            if part is not None:
                found += forms.get(part, [])
        return [self.keys[number] for number in sorted(found)]


def _literal(key: str) -> tuple[_Literal, str]:
    """Take a literal key apart: its shape, and its text with escapes resolved."""
    anchored = key.startswith("^")
    body = key[1:] if anchored else key
    body = body[:-1] if body.endswith("$") and not body.endswith("\\$") else body
    text, wild, at = "", [], 0
    while at < len(body):
        if body[at] == "\\":
            at += 1
        elif body[at] == ".":
            wild.append(len(text))
        text += body[at]
        at += 1
    return _Literal(len(text), tuple(wild), anchored), text

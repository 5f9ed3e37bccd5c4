"""Name templates: literal text with integer holes ``{i}`` and choices ``{t:weight|bias}``.

A template reads a name in one way or not at all, so what it reads it can write back. That is not left to the author
of a table: :meth:`Template.parse` refuses every text for which it would not hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise

_LITERAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_DIGITS = frozenset("0123456789")
_MOST_DIGITS = 9
_LONGEST = 400
_MOST_OPTIONS = 64
_MOST_NAMES = 1024


class TemplateError(ValueError):
    """A template's text is not in the grammar, or would read some name in two ways."""


@dataclass(frozen=True, slots=True)
class Hole:
    """A place that varies: a canonical integer (``0|[1-9][0-9]*``), or one of several literal options."""

    name: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Template:
    """A family of names. ``pieces`` alternates literals and holes; no two holes are neighbours."""

    text: str
    pieces: tuple[str | Hole, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template; raise TemplateError naming the first thing that is wrong."""
        if not text or len(text) > _LONGEST:
            raise TemplateError(f"template {text[:40]!r} must have 1 to {_LONGEST} characters")
        pieces = _pieces(text)
        _prove_unambiguous(pieces, text)
        return cls(text, tuple(pieces))

    @property
    def holes(self) -> dict[str, int]:
        """Name of each hole and its number of options, 0 for an integer."""
        return {piece.name: len(piece.options) for piece in self.pieces if isinstance(piece, Hole)}

    @property
    def head(self) -> str:
        """The literal text every matching name begins with."""
        return self.pieces[0] if isinstance(self.pieces[0], str) else ""

    @property
    def tail(self) -> str:
        """The literal text every matching name ends with."""
        return self.pieces[-1] if isinstance(self.pieces[-1], str) else ""

    def match(self, name: str) -> dict[str, int] | None:
        """Return each hole's integer, or the index of its option; None where the name does not fit."""
        if not name.endswith(self.tail):
            return None
        at, found = 0, {}
        for k, piece in enumerate(self.pieces):
            if isinstance(piece, str):
                if not name.startswith(piece, at):
                    return None
                at += len(piece)
                continue
            after = self.pieces[k + 1] if k + 1 < len(self.pieces) else ""
            assert isinstance(after, str)
            value, at = _integer(name, at) if not piece.options else _option(name, at, piece.options, after)
            if value < 0:
                return None
            found[piece.name] = value
        return found if at == len(name) else None

    def fill(self, bindings: Mapping[str, int]) -> str:
        """Return the name for these values; ValueError where a hole has none or an impossible one."""
        out = []
        for piece in self.pieces:
            if isinstance(piece, str):
                out.append(piece)
                continue
            value = bindings.get(piece.name, -1)
            if value < 0 or (piece.options and value >= len(piece.options)):
                raise ValueError(f"hole {piece.name!r} of {self.text!r} cannot be {value}")
            out.append(piece.options[value] if piece.options else str(value))
        return "".join(out)

    def overlap(self, other: Template) -> bool:
        """Say whether some name fits both templates."""
        all_mine, all_theirs = _names(self.text), _names(other.text)
        if all_mine is not None and all_theirs is not None:
            return not all_mine.isdisjoint(all_theirs)
        mine, theirs = _segments(self), _segments(other)
        if mine is None or theirs is None:
            return _meet(self.pieces, other.pieces)
        return len(mine) == len(theirs) and all(map(_segments_meet, mine, theirs))

    def between(self, before: str, after: str = "") -> Template:
        """Return the template with literal text before and after it."""
        return Template.parse(f"{before}{self.text}{after}") if before or after else self

    def __str__(self) -> str:
        return self.text


def natural_key(name: str) -> tuple[tuple[int, int, str, str], ...]:
    """Return a sort key that puts ``layer.2`` before ``layer.10``; different names have different keys."""
    key = []
    for digits, run in groupby(name, _DIGITS.__contains__):
        text = "".join(run)
        value = text.lstrip("0")
        key.append((0, len(value), value, text) if digits else (1, 0, text, ""))
    return tuple(key)


def _pieces(text: str) -> list[str | Hole]:
    pieces: list[str | Hole] = []
    rest = text
    while rest:
        literal, brace, rest = rest.partition("{")
        if set(literal) - _LITERAL:
            raise TemplateError(f"template {text!r} has a character other than letters, digits, '_', '.', '-'")
        if literal:
            pieces.append(literal)
        if brace:
            inside, end, rest = rest.partition("}")
            if not end:
                raise TemplateError(f"template {text!r} has an open brace")
            pieces.append(_hole(inside, text))
    return pieces


def _hole(inside: str, text: str) -> Hole:
    name, colon, options = inside.partition(":")
    if not name.isidentifier() or not name.isascii():
        raise TemplateError(f"template {text!r} has a hole without a name: {{{inside}}}")
    if not colon:
        return Hole(name)
    choices = tuple(options.split("|"))
    if len(choices) > _MOST_OPTIONS:
        raise TemplateError(f"template {text!r} has more than {_MOST_OPTIONS} options in one hole")
    if any(not choice or set(choice) - _LITERAL for choice in choices):
        raise TemplateError(f"template {text!r} has an empty or unreadable option in {{{inside}}}")
    if len(set(choices)) != len(choices):
        raise TemplateError(f"template {text!r} repeats an option in {{{inside}}}")
    return Hole(name, choices)


def _prove_unambiguous(pieces: list[str | Hole], text: str) -> None:
    names = [piece.name for piece in pieces if isinstance(piece, Hole)]
    if len(set(names)) != len(names):
        raise TemplateError(f"template {text!r} uses a hole twice")
    for k, piece in enumerate(pieces):
        if isinstance(piece, str):
            continue
        after = pieces[k + 1] if k + 1 < len(pieces) else "\0"
        if isinstance(after, Hole):
            raise TemplateError(f"template {text!r} has two holes without text between them")
        if not piece.options and after[0] in _DIGITS:
            raise TemplateError(f"template {text!r} has a digit after the integer {{{piece.name}}}")
        ends = sorted(option + after for option in piece.options)
        for first, second in pairwise(ends):
            if second.startswith(first):
                raise TemplateError(f"template {text!r} has options of {{{piece.name}}} that begin alike")


def _integer(name: str, at: int) -> tuple[int, int]:
    end = at
    while end < len(name) and name[end] in _DIGITS:
        end += 1
    digits = name[at:end]
    if not 0 < len(digits) <= _MOST_DIGITS or (digits[0] == "0" and len(digits) > 1):
        return -1, at
    return int(digits), end


def _option(name: str, at: int, options: tuple[str, ...], after: str) -> tuple[int, int]:
    for k, option in enumerate(options):
        if name.startswith(option + after, at) and (after or at + len(option) == len(name)):
            return k, at + len(option)
    return -1, at


@lru_cache(maxsize=4096)
def _names(text: str) -> frozenset[str] | None:
    """Return every name that fits a template, where there are not too many: options only, no integers."""
    found = [""]
    for piece in _pieces(text):
        options = (piece,) if isinstance(piece, str) else piece.options
        if not options or len(found) * len(options) > _MOST_NAMES:
            return None
        found = [name + option for name in found for option in options]
    return frozenset(found)


def _segments(template: Template) -> tuple[str, ...] | None:
    """Split at the dots, or return None where an option has a dot, so that dots do not align."""
    holes = (piece for piece in template.pieces if isinstance(piece, Hole))
    dotted = any("." in option for hole in holes for option in hole.options)
    return None if dotted else tuple(template.text.split("."))


@lru_cache(maxsize=4096)
def _segments_meet(one: str, two: str) -> bool:
    if "{" not in one and "{" not in two:
        return one == two
    return _meet(tuple(_pieces(one)), tuple(_pieces(two)))


def _meet(one: tuple[str | Hole, ...], two: tuple[str | Hole, ...]) -> bool:
    """Say whether the product of the two automata reaches both ends."""
    mine, end = _automaton(one)
    theirs, other_end = _automaton(two)
    seen = {(0, 0)}
    todo = [(0, 0)]
    while todo:
        here, there = todo.pop()
        if (here, there) == (end, other_end):
            return True
        for letters, to in mine.get(here, ()):
            for others, onto in theirs.get(there, ()):
                if (to, onto) not in seen and letters & others:
                    seen.add((to, onto))
                    todo.append((to, onto))
    return False


@lru_cache(maxsize=1024)
def _automaton(pieces: tuple[str | Hole, ...]) -> tuple[dict[int, list[tuple[frozenset[str], int]]], int]:
    """Build a nondeterministic automaton from state 0; the second result is its accepting state."""
    edges: dict[int, list[tuple[frozenset[str], int]]] = {}
    last = state = 0

    def chain(text: str, start: int, end: int) -> None:
        nonlocal last
        for k, letter in enumerate(text):
            if k == len(text) - 1:
                to = end
            else:
                last += 1
                to = last
            edges.setdefault(start, []).append((frozenset(letter), to))
            start = to

    for piece in pieces:
        last += 1
        end = last
        if isinstance(piece, str):
            chain(piece, state, end)
        elif piece.options:
            for option in piece.options:
                chain(option, state, end)
        else:
            last += 1
            edges.setdefault(state, []).extend([(_DIGITS, end), (_DIGITS - {"0"}, last)])
            edges.setdefault(last, []).extend([(_DIGITS, last), (_DIGITS, end)])
        state = end
    return edges, state

"""Match regular expressions in time linear in pattern times text.

Python's ``re`` takes exponential time on some patterns. This matcher simulates a finite automaton instead. It knows
literals, escapes, classes, groups, alternation, repetition and anchors, and refuses the rest by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MAX_PROGRAM = 1000
"""States of one automaton; counted repetition multiplies them."""
MAX_MOVES = 500
"""Transitions an automaton remembers."""
MAX_DEPTH = 40
"""Groups inside groups."""

Accepts = Callable[[str], bool]

_CLASSES: dict[str, Accepts] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
    "s": str.isspace,
    "S": lambda c: not c.isspace(),
}
_BOUNDS = re.compile(r"\{(?!\})(\d{0,6})(?:(,)(\d{0,6}))?\}", re.ASCII)


class Refused(ValueError):
    """The pattern is wrong or uses what this matcher does not have."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A piece of pattern: ``one`` character, ``start``, ``end``, ``stop``, ``cat``, ``alt`` or ``repeat``.

    ``end`` is ``$``, which also holds before a last newline; ``stop`` only where nothing follows.
    """

    kind: str
    accepts: Accepts | None = None
    parts: tuple[_Node, ...] = ()
    least: int = 0
    most: int | None = None


class _Reader:
    """Read a pattern by recursive descent."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise Refused("it ends too early")
        self.at += 1
        return char

    def whole(self) -> _Node:
        node = self.alternatives()
        if self.peek():
            raise Refused("a ')' has no '('")
        return node

    def alternatives(self) -> _Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused(f"groups are nested more than {MAX_DEPTH} deep")
        options = [self.sequence()]
        while self.peek() == "|":
            self.take()
            options.append(self.sequence())
        self.depth -= 1
        return options[0] if len(options) == 1 else _Node("alt", parts=tuple(options))

    def sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated(self.atom()))
        return _Node("cat", parts=tuple(parts))

    def repeated(self, node: _Node) -> _Node:
        bounds = self.bounds()
        if bounds is None:
            return node
        if node.kind in ("start", "end"):
            raise Refused("an anchor is repeated")
        if self.peek() == "?":
            self.take()
        elif self.peek() == "+":
            raise Refused("it uses a possessive quantifier")
        if self.bounds() is not None:
            raise Refused("a quantifier follows a quantifier")
        return _Node("repeat", parts=(node,), least=bounds[0], most=bounds[1])

    def bounds(self) -> tuple[int, int | None] | None:
        char = self.peek()
        if char and char in "*+?":
            self.take()
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        found = _BOUNDS.match(self.text, self.at)
        if not found:
            return None
        self.at = found.end()
        least = int(found[1] or 0)
        most = (int(found[3]) if found[3] else None) if found[2] else least
        if most is not None and most < least:
            raise Refused("a repetition's bounds are the wrong way round")
        return least, most

    def atom(self) -> _Node:
        char = self.take()
        if char == "(":
            return self.group()
        if char == "[":
            return _Node("one", self.char_class())
        if char == ".":
            return _Node("one", lambda c: c != "\n")
        if char in "^$":
            return _Node("start" if char == "^" else "end")
        if char in "*+?" or _BOUNDS.match(self.text, self.at - 1):
            raise Refused(f"there is nothing for {char!r} to repeat")
        return _Node("one", self.escape() if char == "\\" else char.__eq__)

    def group(self) -> _Node:
        if self.peek() == "?":
            if not self.text.startswith("?:", self.at):
                raise Refused(f"it uses the extension ({self.text[self.at : self.at + 3]}")
            self.at += 2
        node = self.alternatives()
        if self.peek() != ")":
            raise Refused("a '(' has no ')'")
        self.take()
        return node

    def escape(self) -> Accepts:
        char = self.take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum() and char.isascii():
            raise Refused(f"it uses \\{char}")
        return char.__eq__

    def char_class(self) -> Accepts:
        negated = self.peek() == "^"
        if negated:
            self.take()
        members: list[Accepts] = []
        first = True
        while first or self.peek() != "]":
            first = False
            members.append(self.member())
        self.take()
        if negated:
            return lambda c: not any(m(c) for m in members)
        return lambda c: any(m(c) for m in members)

    def member(self) -> Accepts:
        low = self.take()
        if low == "\\":
            if self.peek() in _CLASSES:
                return self.escape()
            self.escape()
            low = self.text[self.at - 1]
        if self.peek() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return low.__eq__
        self.take()
        high = self.take()
        if high == "\\":
            if self.peek() in _CLASSES:
                raise Refused("a range ends in a class")
            self.escape()
            high = self.text[self.at - 1]
        if high < low:
            raise Refused(f"the range {low}-{high} is the wrong way round")
        return lambda c: low <= c <= high


@dataclass(frozen=True, slots=True)
class _Step:
    """One state: a character test, an anchor, a fork, or the end (``match``)."""

    kind: str
    accepts: Accepts | None = None
    to: tuple[int, ...] = ()


@dataclass
class Automaton:
    """Decide whether a pattern matches from the start of a text, as ``re.match`` does."""

    steps: list[_Step] = field(default_factory=list)
    moves: dict[tuple[frozenset[int], str], frozenset[int]] = field(default_factory=dict)
    added: int = 0

    def matches(self, text: str) -> bool:
        """Say whether the pattern matches a start of ``text``; ``$`` holds at its end and before a last newline."""
        last = len(text)
        ends = (last, last - 1) if text.endswith("\n") else (last,)
        states = self._closure([0], at_start=True, at_end=0 in ends, at_stop=not text)
        if 1 in states:
            return True
        for i, char in enumerate(text):
            key = (states, char)
            after = self.moves.get(key)
            if after is None:
                heads = [self.steps[s].to[0] for s in states if self._accepts(s, char)]
                after = self._closure(heads)
                if len(self.moves) >= MAX_MOVES:
                    self.moves.clear()
                self.moves[key] = after
            states = after
            if i + 1 in ends:
                states = self._closure(states, at_end=True, at_stop=i + 1 == last)
            if 1 in states or not states:
                return 1 in states
        return False

    def _accepts(self, state: int, char: str) -> bool:
        test = self.steps[state].accepts
        return test is not None and bool(test(char))

    def _closure(
        self, heads: Iterable[int], *, at_start: bool = False, at_end: bool = False, at_stop: bool = False
    ) -> frozenset[int]:
        """Follow forks and the anchors that hold; those of the end stay in the set until the end is reached."""
        holds = {"fork", *(kind for kind, on in (("start", at_start), ("end", at_end), ("stop", at_stop)) if on)}
        seen: set[int] = set()
        todo = list(heads)
        while todo:
            state = todo.pop()
            if state in seen:
                continue
            seen.add(state)
            step = self.steps[state]
            if step.kind in holds:
                todo.extend(step.to)
        return frozenset(s for s in seen if self.steps[s].kind in ("one", "end", "stop", "match"))

    def add(self, node: _Node, then: int) -> int:
        """Add a node that goes on to state ``then``; return where it begins. Used while building only."""
        self.added += 1
        if len(self.steps) > MAX_PROGRAM or self.added > 4 * MAX_PROGRAM:
            raise Refused(f"it needs more than {MAX_PROGRAM} states")
        if node.kind == "cat":
            for part in reversed(node.parts):
                then = self.add(part, then)
            return then
        if node.kind == "alt":
            return self._put(_Step("fork", to=tuple(self.add(part, then) for part in node.parts)))
        if node.kind == "repeat":
            return self._repeat(node, then)
        return self._put(_Step(node.kind, node.accepts, (then,)))

    def _repeat(self, node: _Node, then: int) -> int:
        (part,) = node.parts
        if node.most is None:
            loop = self._put(_Step("fork"))
            self.steps[loop] = _Step("fork", to=(self.add(part, loop), then))
            then = loop
        else:
            out = then
            for _ in range(node.most - node.least):
                then = self._put(_Step("fork", to=(self.add(part, then), out)))
        for _ in range(node.least):
            then = self.add(part, then)
        return then

    def _put(self, step: _Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1


def automaton_of(pattern: str, *, whole: bool = False) -> Automaton:
    """Build the automaton of a pattern; ``whole``: it matches whole texts only. Raises :class:`Refused`."""
    node = _Reader(pattern).whole()
    if whole:
        node = _Node("cat", parts=(node, _Node("stop")))
    automaton = Automaton([_Step("fork"), _Step("match")])  # 0 is the first state and 1 the last
    automaton.steps[0] = _Step("fork", to=(automaton.add(node, 1),))
    return automaton

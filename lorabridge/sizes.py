"""Size expressions of family tables: ``a * b``, ``a / b`` (exact), ``a + b`` and ``x or y`` over a config's integers.

``?`` stands for any size: a classifier's labels are a choice of whoever trained it, not of the base model's config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_TOKEN = re.compile(r"\s*(?:([A-Za-z_][A-Za-z0-9_]*(?:\.(?:[A-Za-z_][A-Za-z0-9_]*|[0-9]{1,3}))*)|([0-9]{1,9})|([*/+]))")
_LONGEST = 200
_LARGEST = 2**48
ANY = -1
"""The length of an axis that may have any."""

Atom = str | int
Factor = tuple[str, Atom]


class SizeError(ValueError):
    """An expression cannot be read or has no value; ``missing`` names the fields it would need."""

    def __init__(self, message: str, missing: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class Size:
    """Alternatives, each a sum of chains of factors; the first whose fields all exist counts."""

    text: str
    alternatives: tuple[tuple[tuple[Factor, ...], ...], ...]

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read an expression; raise SizeError with its text."""
        if text.strip() == "?":
            return cls(text.strip(), ())
        if len(text) > _LONGEST:
            raise SizeError(f"expression {text[:40]!r}... is longer than {_LONGEST} characters")
        sums: list[list[list[Factor]]] = [[[]]]
        operator = "*"
        for kind, token in _tokens(text):
            if operator and kind != "operator" and token != "or":
                sums[-1][-1].append((operator, int(token) if kind == "integer" else token))
                operator = ""
            elif not operator and token == "or":
                sums.append([[]])
                operator = "*"
            elif not operator and token == "+":
                sums[-1].append([])
                operator = "*"
            elif not operator and kind == "operator":
                operator = token
            else:
                raise SizeError(f"expression {text!r} is not 'a * b', 'a / b', 'a + b' or 'x or y'")
        if operator:
            raise SizeError(f"expression {text!r} ends where a value is due")
        return cls(text, tuple(tuple(tuple(chain) for chain in chains) for chains in sums))

    @property
    def free(self) -> bool:
        """Any size will do."""
        return not self.alternatives

    @property
    def fields(self) -> tuple[str, ...]:
        """Every name in the expression, each once."""
        return tuple(dict.fromkeys(name for chains in self.alternatives for name in _names(chains)))

    def value(self, sizes: Mapping[str, int] | Callable[[str], int | None], *, zero: bool = False) -> int:
        """Return the value, at least 1, or ANY; SizeError where a field is missing or the value is not a size.

        ``zero``: 0 is a value too, as for counts of layers that a model may not have.
        """
        if self.free:
            return ANY
        get = sizes if callable(sizes) else sizes.get
        lacking: list[str] = []
        for chains in self.alternatives:
            missing = [name for name in _names(chains) if get(name) is None]
            if not missing:
                return _sum(chains, get, self.text, 0 if zero else 1)
            lacking += missing
        names = tuple(dict.fromkeys(lacking))
        raise SizeError(f"{self.text!r} needs {' or '.join(names)}", names)

    def __str__(self) -> str:
        return self.text


def _names(chains: tuple[tuple[Factor, ...], ...]) -> list[str]:
    return [atom for chain in chains for _, atom in chain if isinstance(atom, str)]


def _sum(chains: tuple[tuple[Factor, ...], ...], get: Callable[[str], int | None], text: str, least: int) -> int:
    total = sum(_product(chain, get, text, least) for chain in chains)
    if total > _LARGEST:
        raise SizeError(f"{text!r} is {total}, not a size")
    return total


def _product(chain: tuple[Factor, ...], get: Callable[[str], int | None], text: str, least: int) -> int:
    total = 1
    for operator, atom in chain:
        number = atom if isinstance(atom, int) else get(atom)
        assert number is not None
        if operator == "*":
            total *= number
        elif number < 1 or total % number:
            raise SizeError(f"{text!r}: {total} / {number} is not a whole number")
        else:
            total //= number
        if not least <= total <= _LARGEST:
            raise SizeError(f"{text!r} is {total}, not a size")
    return total


def _tokens(text: str) -> list[tuple[str, str]]:
    out, at, end = [], 0, len(text.rstrip())
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None:
            raise SizeError(f"expression {text!r} has an unreadable character at {at + 1}")
        kind = ("name", "integer", "operator")[(found.lastindex or 1) - 1]
        out.append((kind, found.group(found.lastindex or 1)))
        at = found.end()
    return out


def config_integer(config: Mapping[str, object], name: str) -> int | None:
    """Return an integer field of a config, dots leading into objects and lists (``depths.0``); None where absent.

    An object or list counts its entries, so that ``id2label`` is the number of labels. Any other value is a SizeError.
    """
    value: object = config
    for part in name.split("."):
        if isinstance(value, list | tuple) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return None
    if isinstance(value, Mapping | list | tuple):
        return len(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SizeError(f"config field {name} is {str(value)[:40]!r}, not an integer")
    return value

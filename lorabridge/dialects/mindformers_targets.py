"""MindFormers' ``target_modules``: one regular expression, with a matching rule that depends on the mode.

Graph modes (pet/tuners/lora_adapter.py, MindFormers 0.3 ... 2.1) walk down the cells and call ``re.match`` with the
name of one level; a level that matches is adapted if it is a dense layer, and not entered in any case. PyNative mode
(pynative/pet/lora_adapter.py, 2.0 and later) calls ``re.search`` with the whole dotted path, which begins below the
class that holds the network (``model.decoder.layers.0 ...`` where the parameter is ``decoder.layers.0 ...``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .peft_patterns import pattern_matches


def leaf_pattern(paths: Iterable[str]) -> str:
    """Return the expression for graph modes that selects the cells called as the last components of ``paths``.

    It selects them in every layer, since these modes never see a layer's number beside a cell's name.
    """
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return "|".join(f"{re.escape(leaf)}$" for leaf in leaves)


def path_pattern(paths: Iterable[str]) -> str:
    """Return the expression for PyNative mode that selects exactly ``paths``, in whatever class holds the network."""
    whole: list[str] = []
    layers_of: dict[tuple[str, str], set[int]] = {}
    for path in dict.fromkeys(paths):
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            whole.append(re.escape(path))
        else:
            layers_of.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), set()).add(int(parts[at]))
    tails: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (head, end), numbers in layers_of.items():
        tails.setdefault((head, tuple(sorted(numbers))), []).append(end)
    for (head, layers), ends in tails.items():
        before = f"{re.escape(head)}\\." if head else ""
        after = f"\\.{_one_of([re.escape(end) for end in ends])}" if ends != [""] else ""
        whole.append(f"{before}{number_pattern(layers)}{after}")
    return f"(^|\\.){_one_of(whole)}$"


def number_pattern(numbers: Iterable[int]) -> str:
    """Return an expression for exactly these numbers, in decimal without leading zeros."""
    return _one_of(_numbers(sorted(set(numbers))))


def _numbers(numbers: Sequence[int]) -> list[str]:
    """Group numbers by their last digits; the digits before are numbers themselves."""
    by_head: dict[int, list[int]] = {}
    for number in numbers:
        by_head.setdefault(number // 10, []).append(number % 10)
    by_digits: dict[tuple[int, ...], list[int]] = {}
    for head, lasts in by_head.items():
        by_digits.setdefault(tuple(lasts), []).append(head)
    out = []
    for digits, heads in by_digits.items():
        last = _last(digits)
        out += [last] if 0 in heads else []
        longer = [head for head in heads if head]
        out += [_one_of(_numbers(longer)) + last] if longer else []
    return out


def _last(digits: Sequence[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    run = digits[-1] - digits[0] == len(digits) - 1
    return f"[{digits[0]}-{digits[-1]}]" if run else f"[{''.join(map(str, digits))}]"


def _one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"


def selects(pattern: str, path: str, *, search: bool) -> bool:
    """Say whether MindFormers adapts the cell at ``path``, in time linear in pattern times path.

    ``search``: PyNative mode. MappingError where the expression uses what the matcher does not have (lookaround ...).
    """
    if search:
        return any(pattern_matches(f".*({pattern}).*", whole) for whole in (path, f"model.{path}"))
    return pattern_matches(f"({pattern}).*", path.rpartition(".")[2])


def swallowed(paths: Sequence[str]) -> Mapping[str, str]:
    """Return the paths that graph modes never reach: a level above is called as an adapted cell, and not entered."""
    leaves = {path.rpartition(".")[2] for path in paths}
    found = {}
    for path in paths:
        above = path.split(".")[:-1]
        hit = next((level for level in above if level in leaves), None)
        if hit is not None:
            found[path] = hit
    return found

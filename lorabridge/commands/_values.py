"""The values that options take: sizes, names that can be misspelt, and statements about modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from ._group import did_you_mean

if TYPE_CHECKING:
    from ..dialects.adapter import Fact, Facts, Value

    Bytes = click.ParamType[int]
    Text = click.ParamType[str]
else:
    Bytes = Text = click.ParamType  # generic from click 8.4 on only

UNITS = {
    "": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
YES, NO = ("yes", "true", "t", "1", "on"), ("no", "false", "f", "0", "off")


class Location(click.Path):
    """A path of this machine, or a name in a store such as ``s3://bucket/adapter``."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; of a name in a store that of its placeholder."""
        from ..files.placeholders import input_path

        return input_path(super().convert(value, param, ctx))  # type: ignore[arg-type]  # click's own stubs


LOCATION = Location()


class Size(Bytes):
    """A number of bytes: ``5GB`` is 5 * 10**9, ``5GiB`` is 5 * 2**30."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-z]*)", str(value).strip().lower(), re.ASCII)
        if not match or match[2] not in UNITS:
            self.fail(f"{value!r} is not a size such as 5GB, 512MiB or 1000000", param, ctx)
        size = round(float(match[1]) * UNITS[match[2]])
        if size < 1:
            self.fail("a shard holds at least one byte", param, ctx)
        return size


class Name(Text):
    """One of a set of names that is loaded when the option is used, with a suggestion for a misspelt one."""

    def __init__(self, name: str, known: Callable[[], Sequence[str]]) -> None:
        self.name = name
        self._known = known

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name."""
        known = self._known()
        if value not in known:
            self.fail(f"no {self.name} is called {value!r}.{did_you_mean(str(value), known)}", param, ctx)
        return str(value)

    def names(self) -> Sequence[str]:
        """Load and return the names."""
        return self._known()

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin as typed."""
        return [CompletionItem(name) for name in self._known() if name.startswith(incomplete)]


class Naming(click.Option):
    """An option of a :class:`Name` whose help lists the names in the place of ``{names}``, loaded when it is shown."""

    @property
    def help(self) -> str | None:
        """Return the help text."""
        text: str | None = self._text
        return text.replace("{names}", ", ".join(self.type.names())) if text and isinstance(self.type, Name) else text

    @help.setter
    def help(self, text: str | None) -> None:
        self._text = text


def dialects() -> list[str]:
    """Return the names of the adapter dialects, and of the two for whole models."""
    from ..dialects import DIALECTS
    from ..dialects.model import HF, MS

    return [*(dialect.name for dialect in DIALECTS), HF.name, MS.name]


def known_family(name: str, mappings: Path | None, *, hint: str) -> str:
    """Return the name of a family table; a BadParameter suggests near names. An InputError names a malformed table."""
    from ..families.tables import family_names

    known = family_names(mappings)
    if name not in known:
        raise click.BadParameter(f"no family is called {name!r}.{did_you_mean(name, known)}", param_hint=repr(hint))
    return name


def check_family(name: str | None, mappings: Path | None) -> None:
    """Refuse what --family names where no table is called so, as :func:`known_family` does."""
    if name is not None:
        known_family(name, mappings, hint="--family")


def matching_families(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the families that begin as typed, for the shell."""
    from ..families.tables import family_names

    return [CompletionItem(name) for name in family_names(ctx.params.get("mappings")) if name.startswith(incomplete)]


def yes_or_no(text: str) -> bool:
    """Read yes or no in the usual spellings; a ValueError says what is allowed."""
    if text.lower() not in YES + NO:
        raise ValueError(f"{text!r} is neither yes nor no")
    return text.lower() in YES


def positive(text: str) -> int:
    """Read an integer of at least one."""
    if not (text.isascii() and text.isdigit()) or int(text) < 1 or len(text) > 12:
        raise ValueError(f"{text!r} is not a positive integer")
    return int(text)


def real(text: str) -> float:
    """Read a finite number; integers stay integers."""
    if re.fullmatch(r"[+-]?\d{1,15}", text, re.ASCII):
        return int(text)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value - value != 0:
        raise ValueError(f"{text!r} is not a finite number")
    return value


def flags(text: str) -> Value:
    """Read ``T,F,T`` as a list of booleans."""
    return [yes_or_no(part.strip()) for part in text.split(",")]


def integers(text: str) -> Value:
    """Read ``3,3`` as a list of positive integers."""
    return [positive(part.strip()) for part in text.split(",")]


def one_of(*words: str) -> Callable[[str], Value]:
    """Return a reader of one of some words."""

    def read(text: str) -> Value:
        if text not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text

    return read


FACTS: dict[str, Callable[[str], Value]] = {
    "alpha": real,
    "rank": positive,
    "use_rslora": yes_or_no,
    "fan_in_fan_out": yes_or_no,
    "enable_lora": flags,
    "kernel_size": integers,
    "groups": positive,
    "out_features": positive,
    "conv_form": one_of("peft", "loralib"),
    "kind": one_of("linear", "embedding", "conv1d", "conv2d", "conv3d"),
    "merged": yes_or_no,
    "as": one_of("lora"),
    "names_of": str,
    "non_linearity": str,
    "cell": str,
    "alpha_in": one_of("weights", "config"),
}
"""How each statement about modules is read; the option is the field's name with dashes."""


def is_fact(field: str) -> Callable[[str], bool]:
    """Return the test whether an argument can be the value of a field, its pattern included."""

    def test(text: str) -> bool:
        try:
            FACTS[field](text.rpartition("=")[2])
        except ValueError:
            return False
        return True

    return test


def facts(given: Iterable[tuple[str, Sequence[str]]]) -> Facts:
    """Read ``VALUE`` and ``PATTERN=VALUE`` texts per field; patterns count before values for every module."""
    from ..dialects.adapter import Fact, Facts

    entries: list[Fact] = []
    for field, texts in given:
        for text in texts:
            pattern, _, value = text.rpartition("=")
            try:
                entries.append(Fact(pattern or "*", field, FACTS[field](value)))
            except ValueError as error:
                option = "--" + field.replace("_", "-")
                raise click.BadParameter(str(error), param_hint=repr(option)) from None
    return Facts(tuple(sorted(entries, key=lambda entry: entry.pattern == "*")))


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Read ``key=value`` texts; a key given twice with different values is an error."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise click.BadParameter(f"{text!r} is not key=value", param_hint=repr(option))
        if found.setdefault(key, value) != value:
            raise click.BadParameter(f"{key} is given as {found[key]} and {value}", param_hint=repr(option))
    return found


def is_tolerance_or_rank(text: str) -> bool:
    """Tell the value of --compress from the next argument."""
    return re.fullmatch(r"\d{1,9}|\d*\.\d+(e-?\d+)?|\d+e-\d+", text.lower(), re.ASCII) is not None


def weights(texts: Sequence[str]) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Read ``W,W`` and ``PATTERN=W,W`` texts: patterns count before weights for every module."""
    found = []
    for text in texts:
        pattern, _, numbers = text.rpartition("=")
        try:
            found.append((pattern or "*", tuple(float(real(part.strip())) for part in numbers.split(","))))
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="'--weights'") from None
    return tuple(sorted(found, key=lambda entry: entry[0] == "*"))

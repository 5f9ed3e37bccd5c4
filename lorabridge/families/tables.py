"""Family tables: TOML text to a proved :class:`Table`, and where the tables that ship with the package lie."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import InputError, MappingError
from ..names import Template, TemplateError
from ..sizes import Size, SizeError
from .mapping import map_adapter
from .models import (
    check_complete,
    detect_family,
    layout_from_config,
    names,
    resolve,
    sizes_from_config,
    tied_checks,
)
from .proofs import prove
from .rules import Buffer, Layout, Order, Prefix, Rule, RuleRef, Side, SideName, Table, Tied

__all__ = [
    "Table", "check_complete", "detect_family", "family_names", "layout_from_config", "load_family", "load_table",
    "load_tables", "map_adapter", "names", "read_table", "resolve", "sizes_from_config", "tied_checks",
]  # fmt: skip

SCHEMA = 1
LARGEST_FILE = 256 * 1024
MOST_FILES = 200
MOST_RULES = 200

_SECTIONS = ("schema", "family", "match", "sizes", "holes", "prefix", "identity", "layout", "linear", "embedding",
             "param", "tied", "buffer")  # fmt: skip
_RULE_KEYS = ("hf", "ms", "when", "only", "prefix", "optional")
_KEYS = {
    "linear": (*_RULE_KEYS, "out", "in", "bias", "hf_order", "ms_order", "groups"),
    "embedding": (*_RULE_KEYS, "axes"),
    "param": (*_RULE_KEYS, "axes"),
    "tied": ("hf", "ms", "to", "when"),
    "buffer": ("hf", "ms", "drop", "prefix"),
    "layout": ("name", "choices", "default", "config"),
}
_BIAS = {True: "yes", False: "no", "optional": "optional"}

Item = Mapping[str, object]


def load_tables(extra_dir: Path | None = None) -> dict[str, Table]:
    """Return every table by family, those of ``extra_dir`` beside the shipped ones.

    An InputError names a malformed table, or a family that two files claim.
    """
    found: dict[str, Table] = {}
    for folder in [_shipped(), *([extra_dir] if extra_dir is not None else [])]:
        for path in _files(folder, extra_dir):
            _add(found, load_table(path), path)
    return found


def load_family(family: str, extra_dir: Path | None = None) -> Table:
    """Return one family's table without loading every other: a shipped table's file has its family's name.

    Raises MappingError listing the known families when there is none, InputError as :func:`load_tables` does.
    """
    own: dict[str, Table] = {}
    for path in _files(extra_dir, extra_dir) if extra_dir is not None else ():
        _add(own, load_table(path), path)
    shipped = {path.stem: path for path in _files(_shipped(), None)}
    if family in shipped:
        _add(own, load_table(shipped[family]), shipped[family])
    if family not in own:
        raise MappingError(
            f"no table for the family {family!r}",
            where=f"known families: {', '.join(family_names(extra_dir))}",
            hint="pick one with --family, or give your own table with --mappings DIR",
        )
    return own[family]


def family_names(extra_dir: Path | None = None) -> list[str]:
    """Return the known families, sorted; the shipped tables are not opened for it."""
    own = [load_table(path).family for path in _files(extra_dir, extra_dir)] if extra_dir is not None else []
    return sorted({*own, *(path.stem for path in _files(_shipped(), None))})


def _files(folder: Path, extra_dir: Path | None) -> list[Path]:
    paths = sorted(path for path in folder.glob("*.toml") if path.is_file())
    if len(paths) > MOST_FILES or (folder is extra_dir and not folder.is_dir()):
        raise InputError(
            f"not a directory of at most {MOST_FILES} tables", where=str(folder), hint="give --mappings a directory"
        )
    return paths


def _add(found: dict[str, Table], table: Table, path: Path) -> None:
    if table.family in found:
        raise InputError(
            f"two tables claim the family {table.family!r}",
            where=(found[table.family].file, str(path)),
            hint="give your table a family name of its own and choose it with --family",
        )
    found[table.family] = table


def load_table(path: Path) -> Table:
    """Read and prove one table file; an InputError lists every problem with file and line."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"the table cannot be read: {error.strerror}", where=str(path)) from None
    if len(raw) > LARGEST_FILE:
        raise InputError(f"the table is larger than {LARGEST_FILE} bytes", where=str(path))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the table is not UTF-8 text", where=f"{path}, byte {error.start}") from None
    return read_table(text, path.name)


def read_table(text: str, file: str) -> Table:
    """Turn a table's text into a proved value; an InputError lists every problem with ``file`` and line."""
    try:
        data: Item = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError("the table is not TOML", where=f"{file}: {problem[:200]}") from None
    reader = _Reader(file, text.splitlines())
    table = _table(reader, data)
    problems = reader.problems or prove(table)
    if problems:
        raise InputError(f"{file} is not a valid table", where=problems, hint="see mappings/README.md for the grammar")
    return table


def _shipped() -> Path:
    """Return the folder of tables inside the wheel, or beside the package in a checkout."""
    here = Path(__file__).parents[1]
    inside = here / "mappings"
    return inside if inside.is_dir() else here.parent / "mappings"


@dataclass(frozen=True, slots=True)
class _Reader:
    """Where the text stands, and what is wrong with it so far."""

    file: str
    lines: list[str]
    problems: list[str] = field(default_factory=list)

    def complain(self, ref: RuleRef, problem: str) -> None:
        self.problems.append(f"{ref}: {problem}")

    def header(self, section: str, nth: int | None = None) -> RuleRef:
        """Find the nth ``[[section]]``, or the ``[section]``."""
        wanted = f"[[{section}]]" if nth is not None else f"[{section}]"
        at = [k for k, line in enumerate(self.lines, 1) if line.split("#")[0].replace(" ", "").strip() == wanted]
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
        allowed = tuple(allowed)
        for name in item:
            if name not in allowed:
                self.complain(self.key(ref, name), f"unknown key {name[:40]!r}; known are {', '.join(allowed)}")

    def text(self, ref: RuleRef, item: Item, name: str, default: str | None = None) -> str:
        value = item.get(name, default)
        if not isinstance(value, str) or not value.strip():
            self.complain(self.key(ref, name), f"{name} must be given as a text that is not empty")
            return ""
        return value

    def pairs(self, ref: RuleRef, item: Item, name: str) -> tuple[tuple[str, str], ...]:
        value = item.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            self.complain(self.key(ref, name), f"{name} must be a table of texts")
            return ()
        return tuple(value.items())

    def words(self, ref: RuleRef, item: Item, name: str) -> tuple[str, ...]:
        value = item.get(name, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            self.complain(self.key(ref, name), f"{name} must be a list of texts")
            return ()
        return tuple(value)

    def flag(self, ref: RuleRef, item: Item, name: str, default: bool) -> bool:
        value = item.get(name, default)
        if not isinstance(value, bool):
            self.complain(self.key(ref, name), f"{name} must be true or false")
        return bool(value)

    def size(self, ref: RuleRef, name: str, text: str) -> Size:
        try:
            return Size.parse(text)
        except SizeError as error:
            self.complain(self.key(ref, name), str(error))
            return Size.parse("1")

    def template(self, ref: RuleRef, name: str, text: str) -> Template:
        try:
            return Template.parse(text)
        except TemplateError as error:
            self.complain(self.key(ref, name), str(error))
            return Template("?", ("?",))

    def optional(self, ref: RuleRef, item: Item, name: str) -> Template | None:
        return self.template(ref, name, self.text(ref, item, name)) if name in item else None

    def items(self, data: Item, section: str) -> list[tuple[RuleRef, Item]]:
        value = data.get(section, [])
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            self.complain(RuleRef(self.file, 0), f"{section} must be written as [[{section}]]")
            return []
        if len(value) > MOST_RULES:
            self.complain(RuleRef(self.file, 0), f"more than {MOST_RULES} [[{section}]] entries")
            return []
        found = [(self.header(section, k), item) for k, item in enumerate(value)]
        for ref, item in found:
            self.known(ref, item, _KEYS[section])
        return found

    def section(self, data: Item, name: str) -> tuple[RuleRef, Item]:
        value = data.get(name, {})
        ref = self.header(name)
        if not isinstance(value, dict):
            self.complain(self.key(RuleRef(self.file, 0), name), f"{name} must be a table")
            return ref, {}
        return ref, value


def _table(reader: _Reader, data: Item) -> Table:
    top = RuleRef(reader.file, 0)
    reader.known(top, data, _SECTIONS)
    if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
        reader.complain(reader.key(top, "schema"), f"schema must be {SCHEMA}")
    match_ref, match = reader.section(data, "match")
    reader.known(match_ref, match, ("model_type",))
    prefix_ref, prefixes = reader.section(data, "prefix")
    reader.known(prefix_ref, prefixes, ("hf", "ms", "alike"))
    rules = [_linear(reader, ref, item) for ref, item in reader.items(data, "linear")]
    rules += [_embedding(reader, ref, item) for ref, item in reader.items(data, "embedding")]
    rules += [_param(reader, ref, item) for ref, item in reader.items(data, "param")]
    return Table(
        family=reader.text(top, data, "family"),
        file=reader.file,
        model_types=reader.words(match_ref, match, "model_type"),
        sizes=_sizes(reader, data, "sizes"),
        holes=_sizes(reader, data, "holes"),
        hf_prefix=_prefix(reader, prefix_ref, prefixes, "hf"),
        ms_prefix=_prefix(reader, prefix_ref, prefixes, "ms"),
        alike=reader.flag(prefix_ref, prefixes, "alike", False),
        layouts=tuple(_layout(reader, ref, item) for ref, item in reader.items(data, "layout")),
        rules=tuple(sorted(rules, key=lambda rule: rule.ref.line)),
        tied=tuple(_tied(reader, ref, item) for ref, item in reader.items(data, "tied")),
        buffers=tuple(_buffer(reader, ref, item) for ref, item in reader.items(data, "buffer")),
        identity=reader.flag(top, data, "identity", False),
    )


def _sizes(reader: _Reader, data: Item, name: str) -> tuple[tuple[str, Size], ...]:
    ref, _ = reader.section(data, name)
    return tuple((key, reader.size(ref, key, text)) for key, text in reader.pairs(ref, data, name))


def _prefix(reader: _Reader, ref: RuleRef, prefixes: Item, side: SideName) -> Prefix:
    value = prefixes.get(side, "")
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        reader.complain(reader.key(ref, side), "a prefix is a text, or { text = ..., optional = true }")
        return Prefix()
    reader.known(reader.key(ref, side), value, ("text", "optional", "also"))
    text, also = value.get("text", ""), reader.words(reader.key(ref, side), value, "also")
    for one in (text, *also):
        if not isinstance(one, str) or (one and ("{" in one or not one.endswith("."))):
            reader.complain(reader.key(ref, side), "a prefix is literal text that ends with a dot")
            return Prefix()
        if one:
            reader.template(ref, side, one)
    return Prefix(text, reader.flag(ref, value, "optional", False), also)


def _linear(reader: _Reader, ref: RuleRef, item: Item) -> Rule:
    hf = _modules(reader, ref, item, "hf")
    ms = _modules(reader, ref, item, "ms")
    parts = max((tuple(hf), tuple(ms)), key=len)
    if min(len(hf), len(ms)) != 1:
        reader.complain(ref, f"hf has {len(hf)} modules and ms {len(ms)}: one of them must have exactly one")
    single = len(parts) == 1
    out = {parts[0]: reader.text(ref, item, "out")} if single else dict(reader.pairs(ref, item, "out"))
    if set(out) != set(parts):
        reader.complain(reader.key(ref, "out"), f"out must give the size of {', '.join(parts)}")
    bias = item.get("bias", False)
    if not isinstance(bias, bool) and bias != "optional":
        reader.complain(reader.key(ref, "bias"), 'bias must be true, false or "optional"')
        bias = False
    rule = Rule(
        kind="linear",
        ref=ref,
        hf=Side(tuple(hf.values()), _order(reader, ref, item, "hf_order")),
        ms=Side(tuple(ms.values()), _order(reader, ref, item, "ms_order")),
        parts=parts,
        out=tuple(reader.size(ref, "out", out.get(part, "1")) for part in parts),
        inner=reader.size(ref, "in", reader.text(ref, item, "in")),
        bias=_BIAS[bias],  # type: ignore[arg-type]
        groups=reader.size(ref, "groups", str(item.get("groups", "1"))),
    )
    return _conditioned(reader, ref, item, rule)


def _modules(reader: _Reader, ref: RuleRef, item: Item, side: SideName) -> dict[str, Template]:
    value = item.get(side)
    if isinstance(value, dict):
        return {part: reader.template(ref, side, text) for part, text in reader.pairs(ref, item, side)}
    return {"": reader.template(ref, side, reader.text(ref, item, side))}


def _order(reader: _Reader, ref: RuleRef, item: Item, name: str) -> Order:
    value = item.get(name, "out in")
    if value not in ("out in", "in out"):
        reader.complain(reader.key(ref, name), f'{name} must be "out in" or "in out"')
        return "out in"
    return value


def _conditioned(reader: _Reader, ref: RuleRef, item: Item, rule: Rule) -> Rule:
    return replace(
        rule,
        when=reader.pairs(ref, item, "when"),
        only=reader.words(ref, item, "only"),
        prefixed=reader.flag(ref, item, "prefix", True),
        optional=reader.flag(ref, item, "optional", False),
    )


def _embedding(reader: _Reader, ref: RuleRef, item: Item) -> Rule:
    axes = reader.text(ref, item, "axes", "1 1").split()
    if len(axes) != 2:
        reader.complain(reader.key(ref, "axes"), 'axes of an embedding are two sizes, "rows columns"')
        axes = ["1", "1"]
    sides = {}
    for side in ("hf", "ms"):
        module, dot, weight = reader.text(ref, item, side).rpartition(".")
        if not dot or not weight.isidentifier():
            reader.complain(reader.key(ref, side), f"{side} must be module.parameter")
            module, weight = "m", "weight"
        sides[side] = Side((reader.template(ref, side, module),), "in out", weight)
    rule = Rule(
        kind="embedding", ref=ref, hf=sides["hf"], ms=sides["ms"], parts=("",),
        out=(reader.size(ref, "axes", axes[1]),), inner=reader.size(ref, "axes", axes[0]),
    )  # fmt: skip
    return _conditioned(reader, ref, item, rule)


def _param(reader: _Reader, ref: RuleRef, item: Item) -> Rule:
    axes = [] if item.get("axes") == "" else reader.text(ref, item, "axes").split()
    sides = {side: Side((reader.template(ref, side, reader.text(ref, item, side)),)) for side in ("hf", "ms")}
    sizes = tuple(reader.size(ref, "axes", axis) for axis in axes)
    rule = Rule(kind="param", ref=ref, hf=sides["hf"], ms=sides["ms"], parts=("",), axes=sizes)
    return _conditioned(reader, ref, item, rule)


def _tied(reader: _Reader, ref: RuleRef, item: Item) -> Tied:
    hf = reader.template(ref, "hf", reader.text(ref, item, "hf"))
    to = reader.template(ref, "to", reader.text(ref, item, "to"))
    return Tied(ref, hf, reader.optional(ref, item, "ms"), to, when=reader.pairs(ref, item, "when"))


def _buffer(reader: _Reader, ref: RuleRef, item: Item) -> Buffer:
    if "hf" not in item and "ms" not in item:
        reader.complain(ref, "a buffer needs hf or ms")
    drop = reader.text(ref, item, "drop")
    sides = [reader.optional(ref, item, side) for side in ("hf", "ms")]
    return Buffer(ref, sides[0], sides[1], drop, reader.flag(ref, item, "prefix", True))


def _layout(reader: _Reader, ref: RuleRef, item: Item) -> Layout:
    choices = reader.pairs(ref, item, "choices")
    if len(choices) < 2 or not all(text.strip() for _, text in choices):
        reader.complain(ref, "choices must have two entries or more, each with the versions it belongs to")
    default = reader.text(ref, item, "default") if "default" in item else None
    told = reader.pairs(ref, item, "config") if "config" in item else ()
    if len(told) > 1:
        reader.complain(ref, "config names one field of config.json and the choice it means when it is true")
    return Layout(ref, reader.text(ref, item, "name"), choices, default, told[0] if told else None)

"""The manifest: what a written file cannot say about itself, so that the way back is exact.

It travels in the metadata of a safetensors file (key ``lorabridge``) or beside the file as ``NAME.lorabridge.json``,
and inside a directory as ``lorabridge.json``. It describes the source (container, dialect, names, shapes, config), the
options of the conversion and the facts about the written file. From these the forward plan can be built again without
the source file, and its inverse restores the source bit for bit.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .dialects.adapter import FACT_FIELDS, READ_FIELDS, Fact, Facts, Json, Value
from .dtypes import BY_NAME
from .errors import InputError
from .formats.untrusted import read_small
from .tensors import TensorSpec

SCHEMA = "lorabridge/manifest/1"
FACTS_SCHEMA = "lorabridge/facts/1"
METADATA_KEY = "lorabridge"
MAX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a conversion: container, dialect, file name, tensors in order, container metadata, adapter config."""

    format: str
    dialect: str
    file: str
    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Json | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """One finished conversion.

    ``options``: family, layout and the like, as text. ``stated``: the facts about the source that the file did not
    say; ``chosen``: what flags chose for the target.
    ``facts``: facts about the target file. ``plan``: digest of the forward plan. ``digests``: sha256 of each target
    tensor's bytes; ``residues``: what restores bits that a scaling rounded (see ``numerics``), per target tensor.
    ``model_config``: the base model's config.json when the run needed it. A source without tensors stands for an
    adapter or a model that was computed: its ``file`` says from what, its ``dialect`` is the one to convert to by
    default. ``recipe``: how a merged model was made, for ``verify`` to make it again; see ``actions.merge_record``.
    ``earlier``: the source's own manifest, where source and target are of one framework.
    """

    version: str
    source: Side
    target: Side
    options: Mapping[str, str]
    stated: Facts
    chosen: Facts
    facts: Facts
    plan: str
    digests: Mapping[str, str] = field(default_factory=dict)
    residues: Mapping[str, bytes] = field(default_factory=dict)
    model_config: Json | None = None
    recipe: Json | None = None
    earlier: Manifest | None = None

    def as_json(self, *, data: bool = True) -> dict[str, object]:
        """Return the JSON object; ``data=False`` leaves out what depends on tensor contents."""
        out: dict[str, object] = {
            "schema": SCHEMA,
            "version": self.version,
            "source": _side_json(self.source),
            "target": _side_json(self.target),
            "options": dict(self.options),
            "stated": facts_json(self.stated),
            "chosen": facts_json(self.chosen),
            "facts": facts_json(self.facts),
            "plan": self.plan,
        }
        if self.model_config is not None:
            out["model_config"] = dict(self.model_config)
        if self.recipe is not None:
            out["recipe"] = dict(self.recipe)
        if self.earlier is not None:
            out["earlier"] = self.earlier.as_json(data=data)
        if data and self.digests:
            out["digests"] = dict(self.digests)
        if data and self.residues:
            out["residues"] = {name: base64.b64encode(raw).decode() for name, raw in self.residues.items()}
        return out

    @property
    def made(self) -> bool:
        """The file was computed (extracted, combined), not converted: there is no source to go back to."""
        return not self.source.specs

    @property
    def layout(self) -> dict[str, str]:
        """The layout choices that the conversion was told or found, by name."""
        return {key.removeprefix("layout."): v for key, v in self.options.items() if key.startswith("layout.")}

    def chain(self) -> Iterator[Manifest]:
        """Yield this manifest, that of the file which it was converted from, and so on."""
        found: Manifest | None = self
        while found is not None:
            yield found
            found = found.earlier

    @property
    def named(self) -> tuple[str | None, dict[str, str]]:
        """The table that the conversions went through, None where none was named, and its layout."""
        crossing = (one for one in self.chain() if one.options.get("family") not in (None, "identity"))
        one = next(crossing, self)
        return one.options.get("family"), one.layout

    def describes(self, specs: Mapping[str, TensorSpec]) -> bool:
        """Say whether a file's tensors are those that the conversion wrote."""
        return {s.name: s for s in self.target.specs} == dict(specs)


def dumps(manifest: Manifest, *, data: bool = True, indent: int | None = 1) -> str:
    """Return the manifest as JSON text, the same in every process."""
    return json.dumps(manifest.as_json(data=data), indent=indent, sort_keys=True, ensure_ascii=False)


def loads(text: str, *, where: str) -> Manifest:
    """Parse a manifest; an InputError names the place when it is malformed or of a later schema."""
    found: Manifest | None = None
    try:
        levels = [json.loads(text)]
        while levels[-1].get("earlier") is not None:
            levels.append(levels[-1]["earlier"])
        for raw in reversed(levels):
            if raw.get("schema") != SCHEMA:
                raise InputError(
                    f"manifest has schema {raw.get('schema')!r}, not {SCHEMA!r}",
                    where=where,
                    hint="use the lorabridge version that wrote it, or move the manifest away and pass flags",
                )
            found = Manifest(
                version=str(raw["version"]),
                source=_side(raw["source"]),
                target=_side(raw["target"]),
                options={str(k): str(v) for k, v in raw["options"].items()},
                stated=facts_from_json(raw["stated"]),
                chosen=facts_from_json(raw["chosen"]),
                facts=facts_from_json(raw["facts"]),
                plan=str(raw["plan"]),
                digests={str(k): str(v) for k, v in raw.get("digests", {}).items()},
                residues={str(k): base64.b64decode(v, validate=True) for k, v in raw.get("residues", {}).items()},
                model_config=_object(raw.get("model_config")),
                recipe=_object(raw.get("recipe")),
                earlier=found,
            )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"manifest is malformed ({type(error).__name__}: {error})", where=where, hint="move it away and pass flags"
        ) from error
    assert found is not None
    return found


def _object(raw: object) -> Json | None:
    if raw is not None and not isinstance(raw, dict):
        raise ValueError("a config is no JSON object")
    return raw


def sidecar(path: Path) -> Path:
    """Return where the manifest of a file lies."""
    return path.with_name(f"{path.name}.lorabridge.json")


def find(path: Path, metadata: Mapping[str, str]) -> tuple[Manifest | None, Facts]:
    """Return the manifest that travels with a checkpoint (a file or a directory), and facts written by hand.

    A sidecar is preferred to metadata, since it also holds what depends on the data. A sidecar of schema
    ``lorabridge/facts/1`` is a user's own: ``{"schema": ..., "alpha": 16, "modules": {"h.*.attn": {"rank": 8}}}``.
    """
    beside = path / "lorabridge.json" if path.is_dir() else sidecar(path)
    if beside.is_file():
        text = _text(beside)
        stated = _stated(text, where=str(beside))
        return (None, stated) if stated is not None else (loads(text, where=str(beside)), Facts())
    if METADATA_KEY in metadata:
        return loads(metadata[METADATA_KEY], where=f"{path}: metadata {METADATA_KEY!r}"), Facts()
    return None, Facts()


def _text(path: Path) -> str:
    raw, size = read_small(path, MAX_BYTES)
    if size > MAX_BYTES:
        raise InputError(f"manifest is over {MAX_BYTES >> 20} MiB", where=str(path), hint="move it away")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("manifest is not UTF-8 text", where=str(path), hint="move it away and pass flags") from error


def _stated(text: str, *, where: str) -> Facts | None:
    """Parse a sidecar written by hand; None when it is not one."""
    try:
        raw = json.loads(text)
        if raw.get("schema") != FACTS_SCHEMA:
            return None
        rows = [(pattern, k, v) for pattern, facts in raw.get("modules", {}).items() for k, v in facts.items()]
        rows += [("*", k, v) for k, v in raw.items() if k not in ("schema", "modules")]
        return facts_from_json(rows)
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        known = ", ".join(FACT_FIELDS)
        raise InputError(f"sidecar is malformed: {error}", where=where, hint=f"known facts: {known}") from error


def facts_text(facts: Facts) -> str:
    """Spell facts as a sidecar like those that are written by hand."""
    every: dict[str, Value] = {}
    modules: dict[str, dict[str, Value]] = {}
    for entry in facts.entries:
        place = every if entry.pattern == "*" else modules.setdefault(entry.pattern, {})
        place.setdefault(entry.field, entry.value)
    document = {"schema": FACTS_SCHEMA, **every, **({"modules": modules} if modules else {})}
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def facts_json(facts: Facts) -> list[list[Value]]:
    """Return facts as [pattern, field, value] rows."""
    return [[entry.pattern, entry.field, entry.value] for entry in facts.entries]


def facts_from_json(rows: Iterable[Iterable[Value]]) -> Facts:
    """Parse [pattern, field, value] rows; ValueError for unknown fields."""
    entries = []
    for pattern, name, value in rows:
        if name not in (*FACT_FIELDS, *READ_FIELDS) or not isinstance(pattern, str):
            raise ValueError(f"unknown fact {name!r}")
        entries.append(Fact(pattern, str(name), value))
    return Facts(tuple(entries))


def _side_json(side: Side) -> dict[str, object]:
    return {
        "format": side.format,
        "dialect": side.dialect,
        "file": side.file,
        "tensors": [[s.name, s.dtype.name, list(s.shape)] for s in side.specs],
        "metadata": {k: v for k, v in side.metadata.items() if k != METADATA_KEY},
        "config": None if side.config is None else dict(side.config),
    }


def _side(raw: Mapping[str, object]) -> Side:
    tensors, metadata, config = raw["tensors"], raw["metadata"], raw["config"]
    if not (isinstance(tensors, list) and isinstance(metadata, dict) and isinstance(config, dict | None)):
        raise ValueError("a side needs tensors, metadata and config")
    return Side(
        format=str(raw["format"]),
        dialect=str(raw["dialect"]),
        file=str(raw["file"]),
        specs=tuple(TensorSpec(str(n), BY_NAME[d], tuple(int(i) for i in shape)) for n, d, shape in tensors),
        metadata={str(k): str(v) for k, v in metadata.items()},
        config=config,
    )

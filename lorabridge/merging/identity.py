"""Which base an adapter belongs to, and what a merge added: fingerprints from samples of the tensors' bits.

They recognise files, they do not prove them: eight rows of each large weight are read, so that a model costs some tens
of milliseconds, and a change between these rows stays unseen. An undo file's digests cover every byte.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from .. import __version__
from ..arithmetic.numerics import Notes, kernels
from ..arithmetic.recipe import recipe_of
from ..axes import Compute, Expr, Reshape, evaluate
from ..errors import InputError
from ..tensors import Source
from .landing import HEADS, PREFIXES
from .reading import rows
from .undo import matrix

BASE_KEY = "lorabridge.base"
"""Key of an adapter's container metadata: the base that it was made for."""
MERGED_KEY = "lorabridge.merged"
"""Key of a merged model's container metadata: what was merged into what."""
ROWS = 8
"""How many rows of a tensor are sampled, the first and the last among them."""
WHOLE = 256 << 10
"""Bytes up to which a tensor is read whole."""


@dataclass(frozen=True, slots=True)
class BaseMark:
    """The base of an adapter: ``weights``: fingerprints of the adapted weights, by their names on a ``side``.

    ``side``: "hf" or "ms", whose names they are; ``file``: what the base was called.
    """

    side: str
    file: str
    weights: Mapping[str, str]

    def as_text(self) -> str:
        """Spell it for a container's metadata."""
        return json.dumps({"version": __version__, **asdict(self)}, sort_keys=True)


@dataclass(frozen=True, slots=True)
class MergedMark:
    """What a model holds beside its base: ``weights``: per weight the base's fingerprint and those of its deltas.

    ``adapters``: file names and weights, for people. ``added``: parameters that the base did not have.
    ``through_exact_base``: what they were merged into was the base, not the best inverse of another merge.
    """

    side: str
    base: str
    adapters: tuple[Mapping[str, object], ...]
    weights: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    through_exact_base: bool = True

    def as_text(self) -> str:
        """Spell it for a container's metadata."""
        return json.dumps({"version": __version__, **asdict(self)}, sort_keys=True)


def base_mark(metadata: Mapping[str, str], *, where: str) -> BaseMark | None:
    """Read what an adapter's file says about its base; InputError where that is malformed."""
    raw = _object(metadata, BASE_KEY, where)
    if raw is None:
        return None
    weights = raw.get("weights")
    if not isinstance(weights, dict) or not all(isinstance(mark, str) for mark in weights.values()):
        raise _malformed(BASE_KEY, where)
    return BaseMark(str(raw.get("side")), str(raw.get("file")), weights)


def merged_mark(metadata: Mapping[str, str], *, where: str) -> MergedMark | None:
    """Read what a model's file says about adapters in it; InputError where that is malformed."""
    raw = _object(metadata, MERGED_KEY, where)
    if raw is None:
        return None
    weights, adapters, added = raw.get("weights", {}), raw.get("adapters", []), raw.get("added", [])
    if not (isinstance(weights, dict) and isinstance(adapters, list) and isinstance(added, list)):
        raise _malformed(MERGED_KEY, where)
    if not all(isinstance(row, list) and row for row in weights.values()):
        raise _malformed(MERGED_KEY, where)
    return MergedMark(
        str(raw.get("side")), str(raw.get("base")), tuple(one for one in adapters if isinstance(one, dict)),
        {name: tuple(map(str, row)) for name, row in weights.items()}, tuple(map(str, added)),
        raw.get("through_exact_base") is not False,
    )  # fmt: skip


def _object(metadata: Mapping[str, str], key: str, where: str) -> dict[str, object] | None:
    if key not in metadata:
        return None
    try:
        raw = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise _malformed(key, where) from error
    if not isinstance(raw, dict):
        raise _malformed(key, where)
    return raw


def _malformed(key: str, where: str) -> InputError:
    return InputError(f"the metadata {key!r} is malformed", where=where, hint="take the file from where it was written")


def weight_mark(expr: Expr, source: Source) -> str:
    """Return the fingerprint of a weight: its type, its shape and its sampled rows."""
    digest = hashlib.sha256(f"{expr.shape}".encode())
    _sample(digest, expr, source)
    return f"{expr.dtype} {digest.hexdigest()[:16]}"


def delta_mark(node: Compute, source: Source) -> str:
    """Return the fingerprint of what is added to a weight: its recipe but for the name, and its sampled operands."""
    recipe, _ = recipe_of(node)
    text = json.dumps(asdict(replace(recipe, name="", exact=False)), sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for operand in node.args[1:]:
        digest.update(f"{operand.dtype} {operand.shape}".encode())
        _sample(digest, operand, source)
    return digest.hexdigest()[:16]


def _sample(digest: hashlib._Hash, expr: Expr, source: Source) -> None:
    """Add a small tensor whole, of a larger one some rows."""
    count, known = matrix(expr.shape)[0], kernels("", Notes(), {})
    if math.prod(expr.shape) * expr.dtype.itemsize <= WHOLE:
        digest.update(np.ascontiguousarray(evaluate(expr, source.read, known)).data)
        return
    for row in dict.fromkeys(i * (count - 1) // (ROWS - 1) for i in range(ROWS)):
        digest.update(np.ascontiguousarray(rows(expr, row, row + 1, source, known)).data)


def base_of(node: Compute) -> Expr:
    """Return the weight that a merge adds to, in the shape in which it is stored."""
    weight = node.args[0]
    while isinstance(weight, Reshape):
        weight = weight.x
    return weight


def overall(marks: Iterable[tuple[str, str]]) -> str:
    """Return one digest for fingerprints by name, to be shown."""
    lines = "\n".join(f"{name} {mark}" for name, mark in sorted(marks))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def aligned(names: Iterable[str], known: Mapping[str, object]) -> dict[str, str]:
    """Return for each name that of the same parameter in a model, where it has one.

    Transformers saves a model's body without the prefix that it has under a head, and loads it under either.
    """
    names = list(names)
    found = {name: name for name in names if name in known}
    body = [name for name in names if name.partition(".")[0] not in HEADS]
    if any(name in found for name in body):
        return found
    for prefix in PREFIXES:
        for moved in (
            {name: name[len(prefix) :] for name in body if name.startswith(prefix)},
            {name: prefix + name for name in body},
        ):
            if moved and any(name in known for name in moved.values()):
                return found | {name: other for name, other in moved.items() if other in known}
    return found

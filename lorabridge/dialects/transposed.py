"""Factors stored as ``x @ A @ B`` uses them, ``A[in, rank]`` and ``B[rank, out]``: what MLX and msbnb have in common.

Nothing in such a file but names tells these factors from torch's, and where a layer is square not even a wrong product
fails. Dialects that share their names with torch's therefore have to be named with --from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..axes import Expr, read, reorder
from ..tensors import TensorSpec
from .adapter import Content, LoraModule, ModuleKind, Scaling, Term
from .pairs import Problems

EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared"})
"""Last components that are embeddings in every language model."""
DOUBTFUL = ("emb", "wpe")


@dataclass(frozen=True, slots=True)
class Spelling:
    """Last components of the names of A, B and a DoRA magnitude ("" where there is none)."""

    a: str
    b: str
    magnitude: str = ""


def sort_names(content: Content, spelling: Spelling) -> tuple[dict[str, dict[str, TensorSpec]], dict[str, TensorSpec]]:
    """Return (module path to role to spec, the tensors beside by name)."""
    roles = {spelling.a: "a", spelling.b: "b", **({spelling.magnitude: "magnitude"} if spelling.magnitude else {})}
    pairs: dict[str, dict[str, TensorSpec]] = {}
    rest: dict[str, TensorSpec] = {}
    for name, spec in content.specs.items():
        path, _, last = name.rpartition(".")
        if last in roles:
            pairs.setdefault(path, {})[roles[last]] = spec
        else:
            rest[name] = spec
    return pairs, rest


def read_modules(
    content: Content, pairs: Mapping[str, Mapping[str, TensorSpec]], scaling: Mapping[str, Scaling], problems: Problems
) -> tuple[LoraModule, ...]:
    """Turn factors around; what is no pair of matrices is noted in ``problems``. ``scaling``: by module path."""
    found = []
    for path, specs in pairs.items():
        lacking = [role.upper() for role in ("a", "b") if role not in specs]
        if lacking:
            have = ", ".join(spec.name for spec in specs.values())
            problems.add(f"factor {' and '.join(lacking)} is missing", f"{path}: has {have}", "save the adapter again")
            continue
        a, b = specs["a"].shape, specs["b"].shape
        if len(a) == 3 and len(b) == 3:
            problems.add("the factors are a stack of experts", path, "fuse the adapter into the base where it was made")
            continue
        if len(a) != 2 or len(b) != 2 or a[1] != b[0] or not a[1]:
            problems.add(
                "shapes are not [in, rank] and [rank, out]", f"{path}: {list(a)} and {list(b)}", "check --from"
            )
            continue
        kind = _kind(content, path, problems)
        if kind is None:
            continue
        magnitude = specs.get("magnitude")
        rows = (a[0],) if kind == "embedding" else (b[1],)
        if magnitude is not None and (magnitude.shape != rows or kind == "embedding"):
            what = "a magnitude per token, which peft's is not" if kind == "embedding" else f"not {list(rows)}"
            problems.add(
                "the magnitude is none of a linear layer", f"{magnitude.name}: {what}", "fuse it into the base"
            )
            continue
        term = Term(reorder(read(specs["a"]), (1, 0)), reorder(read(specs["b"]), (1, 0)), 0, b[1])
        found.append(
            LoraModule(path, kind, b[1], (term,), scaling.get(path, Scaling(0.0, a[1])),
                       fan_in_fan_out=False if kind == "linear" else None,
                       magnitude=read(magnitude) if magnitude is not None else None)
        )  # fmt: skip
    return tuple(found)


def _kind(content: Content, path: str, problems: Problems) -> ModuleKind | None:
    stated, last = content.facts.get(path, "kind"), path.rpartition(".")[2]
    if stated == "linear" or stated == "embedding":
        return "linear" if stated == "linear" else "embedding"
    if stated is not None:
        problems.add(f"the layer cannot be a {stated}", path, "correct --kind: linear or embedding")
        return None
    if last in EMBEDDINGS:
        return "embedding"
    if any(word in last.lower() for word in DOUBTFUL):
        problems.add(
            "nothing in the file says whether the layer is an embedding or linear", path,
            "say which with --kind PATTERN=embedding or --kind PATTERN=linear",
        )  # fmt: skip
        return None
    return "linear"


def turned(modules: Sequence[LoraModule], spelling: Spelling) -> list[tuple[str, Expr]]:
    """Name the factors of modules that are one pair each, turned around."""
    out = []
    for module in modules:
        (term,) = module.terms
        dot = f"{module.path}." if module.path else ""
        out.append((f"{dot}{spelling.a}", reorder(term.a, (1, 0))))
        out.append((f"{dot}{spelling.b}", reorder(term.b, (1, 0))))
        if module.magnitude is not None:
            out.append((f"{dot}{spelling.magnitude}", module.magnitude))
    return out

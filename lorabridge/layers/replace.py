"""replace_layers: put LoRA into an existing network, keeping its base parameters and their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ..errors import MappingError, UsageError
from .binding import Cell, Parameter, nn
from .conv import Form
from .recipes import Recipe, adapted
from .state import Merging

Dialect = Literal["loralib-ms", "mindpet"]


@dataclass(frozen=True, slots=True)
class Replaced:
    """One cell that was exchanged. ``parameters``: the names of the factors, as a checkpoint has them."""

    path: str
    old: Cell
    new: Cell
    parameters: tuple[str, ...]


def replace_layers(
    net: Cell,
    targets: str | Sequence[str],
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    dialect: Dialect = "loralib-ms",
    exclude: str | Sequence[str] = (),
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    merge_weights: bool = False,
    enable_lora: Sequence[bool] | None = None,
    conv_form: Form = "loralib",
) -> tuple[Replaced, ...]:
    """Exchange cells of a network for LoRA cells, in place, and return what was exchanged.

    ``targets``: a list of names, each a cell's path or its last parts (``wq``, ``attention.wq``), as in peft, or with
    ``*``, ``?`` or ``[`` a glob that fits whole paths (``*.layers.[01].*``); or one text, a regular expression that
    fits whole paths, as in peft. ``exclude``: the same, taken away. Call it again for other cells with another rank.

    Linear cells (``mindspore.nn.Dense``, ``mint.nn.Linear``, and the [in, out] layers of the reference networks, as
    ``fan_in_fan_out``), embeddings and convolutions can be adapted. ``dialect``: "loralib-ms" makes ``Linear`` (with
    ``enable_lora`` ``MergedLinear``), ``Embedding`` and ``Conv1d/2d/3d``; "mindpet" makes ``LoRADense`` that computes
    in the base's type. The other options are those of these classes; ``merge_weights`` is off by default, so that
    ``set_train(False)`` changes nothing.

    Base parameters stay the same objects under the same names; in loralib-ms the adapted ones no longer require a
    gradient. Factors are called after the base (``P.weight`` gives ``P.lora_A``). Graphs compiled from cells of the
    network are compiled anew; an optimizer made before does not know the factors. Raises MappingError, before
    anything is changed, listing targets that fit nothing and cells that cannot be adapted as asked; UsageError for an
    unreadable pattern; TypeError and ValueError for ranks and such out of range.
    """
    recipe = Recipe(r, lora_alpha, lora_dropout, dialect == "mindpet", use_rslora, use_dora, lora_bias, merge_weights,
                    tuple(enable_lora) if enable_lora is not None else None, conv_form)  # fmt: skip
    if dialect not in ("loralib-ms", "mindpet"):
        raise UsageError(f"dialect must be 'loralib-ms' or 'mindpet', not {dialect!r}")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be a positive integer, not {r!r}")
    cells = dict(net.cells_and_names())
    chosen = _chosen(cells, targets, exclude)
    owners = Counter(id(child) for cell in cells.values() for child in _children(cell).values())
    owners += Counter(id(parameter) for cell in cells.values() for _, parameter in _own(cell))
    made, problems = [], []
    for path in chosen:
        try:
            _check_place(path, cells[path], owners)
            made.append((path, adapted(cells[path], recipe)))
        except MappingError as error:
            problems.append(f"{path or type(net).__name__}: {error.problem}")
    if problems:
        raise MappingError("cells cannot be adapted", where=problems, hint="name other targets, or use exclude")
    out = tuple(_exchange(cells, path, new, owners) for path, new in made)
    for cell in cells.values():
        cell.compile_cache.clear()  # type: ignore[attr-defined]
    return out


def _chosen(cells: dict[str, Cell], targets: str | Sequence[str], exclude: str | Sequence[str]) -> list[str]:
    """Return the paths in the network's order; every target and exclusion must fit something."""
    wanted = list(_tests("targets", targets))
    away = list(_tests("exclude", exclude)) if exclude else []
    if not wanted:
        raise UsageError("targets is empty", hint="name cells such as wq, or give a pattern")
    unfit, found, gone = [], set(), set()
    for label, fits, by_name in wanted:
        fit = {path for path, cell in cells.items() if path and fits(path) and (by_name or _leaf(cell))}
        if not fit:
            unfit.append(f"target {label}")
        found |= fit
    for label, fits, _ in away:
        fit = {path for path in found if fits(path)}
        if not fit:
            unfit.append(f"exclude {label}")
        gone |= fit
    if unfit:
        near = ", ".join(sorted({path.rpartition(".")[2] for path, cell in cells.items() if path and _leaf(cell)}))
        raise MappingError(
            "no cell of the network fits", where=unfit, hint=f"cells are called {near[:300] or '(none)'}"
        )
    return [path for path in cells if path in found - gone]


def _tests(option: str, given: str | Sequence[str]) -> Iterator[tuple[str, Callable[[str], bool], bool]]:
    """Yield (label, test of a path, whether it names cells rather than describing them)."""
    if isinstance(given, str):
        try:
            whole = re.compile(given)
        except re.error as error:
            raise UsageError(f"{option} is not a regular expression: {error}", where=given) from None
        yield repr(given), lambda path: whole.fullmatch(path) is not None, False
        return
    for entry in given:
        if not isinstance(entry, str) or not entry:
            raise UsageError(f"{option} must be names or patterns, not {entry!r}")
        if any(letter in entry for letter in "*?["):
            yield repr(entry), lambda path, entry=entry: fnmatchcase(path, entry), False  # type: ignore[misc]
        else:
            yield repr(entry), lambda path, entry=entry: f".{path}".endswith(f".{entry}"), True  # type: ignore[misc]


def _leaf(cell: Cell) -> bool:
    """Say whether a pattern may mean this cell: it has a weight of its own, an adapter or could get one."""
    names = ("weight", "embedding_table", "embedding_weight")
    return isinstance(cell, Merging) or any(name in cell._params for name in names)


def _check_place(path: str, cell: Cell, owners: Counter[int]) -> None:
    if isinstance(cell, Merging) and cell.r:
        raise MappingError("has an adapter already")
    if owners[id(cell)] > 1:
        raise MappingError("the same cell stands at several places")


def _exchange(cells: dict[str, Cell], path: str, new: Cell, owners: Counter[int]) -> Replaced:
    """Put the new cell into the old one's place, with the old parameters."""
    old = cells[path]
    kept = {attribute: (parameter, parameter.name) for attribute, parameter in _own(old)}
    prefix = _prefix(path, old, owners)
    for name, (parameter, _) in kept.items():
        new._params[name] = parameter
    above, _, leaf = path.rpartition(".")
    _put(cells[above], leaf, new)
    added = []
    for name, parameter in _own(new):
        parameter.name = kept[name][1] if name in kept else f"{prefix}{name}"
        if name not in kept:
            added.append(parameter.name)
    if isinstance(new, Merging):
        if "lora_A" in new._params:
            new.base.requires_grad = False
        if "lora_magnitude_vector" in new._params:
            new.reset_magnitude()
    new.set_train(old.training)
    cells[path] = new
    return Replaced(path, old, new, tuple(added))


def _prefix(path: str, old: Cell, owners: Counter[int]) -> str:
    """Return what the base's names begin with, which is not the path below a wrapper that adds no prefix."""
    attribute, parameter = _own(old)[0]
    whole = f".{parameter.name}".endswith(f".{attribute}")
    return parameter.name.removesuffix(attribute) if whole and owners[id(parameter)] == 1 else f"{path}."


def _children(cell: Cell) -> dict[str, Cell]:
    return dict(cell._cells)  # type: ignore[attr-defined]


def _own(cell: Cell) -> list[tuple[str, Parameter]]:
    return [(name, parameter) for name, parameter in cell._params.items() if parameter is not None]


def _put(parent: Cell, leaf: str, new: Cell) -> None:
    if isinstance(parent, nn.CellDict):
        parent[leaf] = new
    elif isinstance(parent, nn.CellList | nn.SequentialCell):
        parent[list(_children(parent)).index(leaf)] = new
    else:
        setattr(parent, leaf, new)

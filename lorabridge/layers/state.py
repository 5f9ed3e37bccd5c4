"""Merged and unmerged: what a cell computes with, and what it saves.

``set_train(False)`` merges and ``set_train(True)`` unmerges, as loralib's ``eval`` and ``train`` do, on the cell itself
or on any network around it. loralib adds the delta to the weight in place and subtracts it again, which loses bits at
every turn, and a ``state_dict`` saved in between holds a merged weight that the next ``eval`` merges again. Here the
merged weight is a parameter of its own that only takes the weight's place:

* ``cell.weight`` is the merged weight while ``cell.merged``; ``cell.base`` is always the original, whose bits nothing
  touches, so any number of turns restores them.
* The cell's registered parameters, which ``save_checkpoint``, ``parameters_dict`` and optimizers see, never change. A
  state saved while merged is bit for bit the state saved while unmerged: it cannot be merged twice, has no names
  beyond the dialect's, and needs no note about the mode it was saved in. The merged parameter itself says what it is:
  its name ends in ``_merged`` and a number.
* Loading into a merged cell (``load_param_into_net``, ``Parameter.set_data``) merges the new values at once.
* A cell is made unmerged, and a deep copy is in the state of its original.
* A graph compiled in either state stays right in the other, since the two read different parameters.

:func:`merged_parameters` makes the other kind of state on purpose: merged weights under the names of the plain
network, and no factors.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

from ..errors import MappingError
from .binding import Cell, Parameter, Tensor, ops, wide

FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_bias")
"""Parameters that an adapter adds to a cell."""

SETTERS = ("set_data", "assign_value")

_numbers = itertools.count(1)


class Merging:
    """Give a cell its merged state; a mixin to stand before ``nn.Cell``.

    A cell states ``adapted`` (the name of its base parameter), ``out_axis`` (its output axis), ``r``,
    ``merge_weights``, ``mergeable`` and :meth:`delta`, and computes with the attribute that ``adapted`` names.
    """

    adapted = "weight"
    out_axis = 0
    factors: tuple[str, ...] = FACTORS
    r: int
    scaling: float
    merge_weights: bool
    merged: bool = False
    mergeable: bool = True
    _params: dict[str, Parameter]

    def delta(self) -> Tensor:
        """Return the scaled delta in the base's shape, in at least float32."""
        raise NotImplementedError

    @property
    def base(self) -> Parameter:
        """The original parameter, whether or not the cell is merged."""
        return self._params[self.adapted]

    def lora_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield the adapter's parameters with their names in the cell."""
        return ((name, self._params[name]) for name in self.factors if name in self._params)

    def weight_norm(self) -> Tensor:
        """Return the Euclidean norm of base plus delta for each output, in at least float32, axes kept.

        Source: DoRA, Liu et al. 2024, section 4.1; in float32 for half types, where peft 0.21 rounds it to them.
        """
        return norm_beside(wide(self.base) + self.delta(), self.out_axis)

    def merged_value(self) -> Tensor:
        """Return base plus delta, with DoRA's magnitudes where there are any, rounded once to the base's type."""
        total = wide(self.base) + self.delta()
        if "lora_magnitude_vector" in self._params:
            norm = norm_beside(total, self.out_axis)
            total = total * (wide(self._params["lora_magnitude_vector"]).reshape(norm.shape) / norm)
        return total.astype(self.base.dtype)

    def reset_magnitude(self) -> None:
        """Set DoRA's magnitudes to the norms of base plus delta, as at the start of training on a base just loaded."""
        magnitude = self._params["lora_magnitude_vector"]
        magnitude.set_data(self.weight_norm().reshape(magnitude.shape).astype(magnitude.dtype))

    def merge(self) -> None:
        """Compute with the merged weight from now on; nothing happens when that is so or cannot be."""
        if self.merged or not self.r or not self.mergeable:
            return
        self._merge_again()
        for parameter in self._sources():
            _watch(parameter, self)
        self.__dict__[self.adapted] = self.__dict__["_merged_parameter"]
        self.merged = True

    def unmerge(self) -> None:
        """Compute with the original weight and the factors from now on."""
        if not self.merged:
            return
        del self.__dict__[self.adapted]
        for parameter in self._sources():
            _unwatch(parameter, self)
        self.merged = False

    def add_flags_recursive(self, **flags: bool) -> Cell:
        """Follow ``set_train`` of any network around the cell, which reaches its children this way only."""
        found: Cell = super().add_flags_recursive(**flags)  # type: ignore[misc]
        if "training" in flags and self.merge_weights:
            (self.unmerge if flags["training"] else self.merge)()
        return found

    def __setstate__(self, state: object) -> None:
        """Finish a deep copy or an unpickling: the twin merges its own parameters."""
        super().__setstate__(state)  # type: ignore[misc]
        self.__dict__.pop("_merged_parameter", None)
        if self.merged:
            self.__dict__.pop(self.adapted)
            self.merged = False
            self.merge()

    def _sources(self) -> list[Parameter]:
        return [self.base, *(parameter for _, parameter in self.lora_parameters())]

    def _merge_again(self) -> None:
        """Bring the merged parameter up to date. It is kept for good: compiled graphs hold on to the object."""
        value = self.merged_value()
        kept = self.__dict__.get("_merged_parameter")
        if kept is None:
            name = f"{self.base.name}_merged{next(_numbers)}"
            kept = Parameter(value, name=name, requires_grad=False)
            kept.__dict__["set_data"] = _refuse
            self.__dict__["_merged_parameter"] = kept
        else:
            type(kept).set_data(kept, value)


def merged_parameters(network: Cell) -> dict[str, Parameter]:
    """Return the state of the plain network with every adapter merged in: no factors, the base's names.

    For ``mindspore.save_checkpoint``; the network itself is left as it is. Each weight is rounded once to its type.
    Raises MappingError where one weight cannot hold the adapter: a bias on B without a bias in the base, peft's
    factors of a grouped convolution, and base parameters that two cells share.
    """
    cells = list(network.cells_and_names())
    owners = Counter(id(parameter) for _, cell in cells for parameter in cell._params.values())
    state = {parameter.name: parameter for _, parameter in network.parameters_and_names()}
    problems = []
    for path, cell in cells:
        if not isinstance(cell, Merging) or not cell.r:
            continue
        why = _unmergeable(cell, owners[id(cell.base)])
        if why:
            problems.append(f"{path or type(cell).__name__}: {why}")
            continue
        for _, parameter in cell.lora_parameters():
            del state[parameter.name]
        state[cell.base.name] = Parameter(cell.merged_value(), name=cell.base.name)
        if "lora_bias" in cell._params:
            bias = cell._params["bias"]
            sum_ = wide(bias) + wide(cell._params["lora_bias"]) * cell.scaling
            state[bias.name] = Parameter(sum_.astype(bias.dtype), name=bias.name)
    if problems:
        raise MappingError(
            "adapters cannot be merged", where=problems, hint="keep these cells as they are and save their factors"
        )
    return state


def _unmergeable(cell: Merging, owners: int) -> str:
    if not cell.mergeable:
        return "peft's factors of a grouped convolution have no single kernel"
    if owners > 1:
        return f"{cell.base.name} is shared by {owners} cells"
    if "lora_bias" in cell._params and "bias" not in cell._params:
        return "lora_bias needs a bias in the base"
    return ""


def norm_beside(total: Tensor, out_axis: int) -> Tensor:
    """Return the Euclidean norm over all axes but one, lengths of one kept; usable inside ``construct``."""
    axes = tuple(axis for axis in range(total.ndim) if axis != out_axis)
    norm: Tensor = ops.sqrt(ops.sum(total * total, axes, True))
    return norm


def _watch(parameter: Parameter, cell: Merging) -> None:
    """Merge again whenever the parameter is set (``load_state_dict`` uses ``assign_value``)."""
    parameter.__dict__.setdefault("_merged_into", []).append(cell)
    for method in SETTERS:
        parameter.__dict__[method] = _noticing(parameter, method)


def _unwatch(parameter: Parameter, cell: Merging) -> None:
    left = [other for other in parameter.__dict__["_merged_into"] if other is not cell]
    parameter.__dict__["_merged_into"] = left
    if not left:
        for name in ("_merged_into", *SETTERS):
            del parameter.__dict__[name]


def _noticing(parameter: Parameter, method: str) -> Callable[..., object]:
    def call(*arguments: object, **options: object) -> object:
        cells = parameter.__dict__["_merged_into"]
        parameter.__dict__["_merged_into"] = []  # the setters call each other: merge once, at the end
        try:
            result: object = getattr(type(parameter), method)(parameter, *arguments, **options)
        finally:
            parameter.__dict__["_merged_into"] = cells
        for cell in cells:
            cell._merge_again()
        return result

    return call


def _refuse(*arguments: object, **options: object) -> object:
    raise RuntimeError(
        "the merged weight follows from the base and the factors and cannot be set; "
        "set cell.base, or call set_train(True) first"
    )

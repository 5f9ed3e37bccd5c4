"""Where an adapter's modules lie in a base: the parameter that each one adds to, and how that is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..arithmetic.recipe import Update
from ..axes import Expr, reshape
from ..dialects.adapter import Adapter, LoraModule

HEADS = ("lm_head", "score", "classifier", "cls", "qa_outputs", "pooler")
WEIGHTS = ("weight", "conv.weight", "embedding_table", "embedding_weight")
"""What the adapted parameter of a module can be called, the likeliest first; loralib's convolutions hold theirs."""
PREFIXES = ("model.", "transformer.", "bert.", "roberta.", "backbone.", "network.", "base_model.")
"""What stands before the names of a body when a head is on it."""


@dataclass(frozen=True, slots=True)
class Place:
    """One parameter that a module adds to: its matrix form and what is added.

    ``view``: the matrix, rows and columns. ``operands``: what ``update`` takes, in its order.
    """

    parameter: str
    view: tuple[int, int]
    transposed: bool
    update: Update
    operands: tuple[Expr, ...]


@dataclass
class Landing:
    """Places of an adapter, and what did not fit: ``problems`` with ``hints`` (as keys, in order)."""

    places: list[Place] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hints: dict[str, None] = field(default_factory=dict)

    def refuse(self, problem: str, hint: str = "") -> None:
        """Note what does not fit."""
        self.problems.append(problem)
        if hint:
            self.hints[hint] = None


def moved_prefix(adapter: Adapter, base: Iterable[str]) -> tuple[Adapter, str]:
    """Give an adapter's paths the base's prefix, where that is all they differ in; also say what was done.

    Transformers saves a model's body without the prefix that it has under a head, and loads it under either.
    """
    known = set(base)
    modules = [module for module in adapter.modules if module.path.partition(".")[0] not in HEADS]
    if not modules or any(home_of(module, known) for module in modules):
        return adapter, ""
    for prefix in PREFIXES:
        if all(module.path.startswith(prefix) for module in modules):
            shorter = _renamed(adapter, prefix, "")
            if _all_land(shorter, known):
                return shorter, f"the base's names lack the prefix {prefix!r} of the adapter's"
        longer = _renamed(adapter, "", prefix)
        if _all_land(longer, known):
            return longer, f"the base's names have the prefix {prefix!r} before the adapter's"
    return adapter, ""


def _all_land(adapter: Adapter, known: set[str]) -> bool:
    return all(home_of(module, known) for module in adapter.modules if module.path.partition(".")[0] not in HEADS)


def _renamed(adapter: Adapter, old: str, new: str) -> Adapter:
    def name(path: str) -> str:
        if path.partition(".")[0] in HEADS or not path.startswith(old):
            return path
        return new + path[len(old) :]

    return replace(
        adapter,
        modules=tuple(_moved(module, name) for module in adapter.modules),
        extras=tuple(replace(extra, path=name(extra.path)) for extra in adapter.extras),
    )


def _moved(module: LoraModule, name: Callable[[str], str]) -> LoraModule:
    stack = module.stack
    if stack is not None:
        stack = replace(stack, parameter=name(stack.parameter))
    return replace(module, path=name(module.path), stack=stack)


def home_of(module: LoraModule, known: Iterable[str] | Mapping[str, object]) -> str:
    """Return the full name of the parameter that a module adds to in a base, the stack of an expert included."""
    name = parameter_of(module.path, module.weight, known)
    return module.stack.parameter if not name and module.stack and module.stack.parameter in known else name


def parameter_of(path: str, weight: str, known: Iterable[str] | Mapping[str, object]) -> str:
    """Return the full name of a module's adapted parameter in a base; empty where it has none."""
    dot = f"{path}." if path else ""
    return next((dot + name for name in (weight, *WEIGHTS) if dot + name in known), "")


def land(
    modules: Sequence[LoraModule], shapes: Mapping[str, tuple[int, ...]], weight: float, into: Landing
) -> None:  # fmt: skip
    """Find the parameter of every module, and the orientation in which it is stored; problems go to ``into``.

    ``shapes``: of the base's parameters. ``weight``: multiplies every delta. A square matrix is stored as the module
    says, where that is true of the matrices that show it; where nothing is said, as all other matrices are.
    """
    found = [(module, home_of(module, shapes)) for module in modules]
    experts = [module for module, name in found if module.stack is not None and name == module.stack.parameter]
    _land_experts(experts, shapes, weight, into)
    found = [(module, name) for module, name in found if module.stack is None or name != module.stack.parameter]
    seen: dict[bool | None, set[bool]] = {True: set(), False: set(), None: set()}
    for module, name in found:
        order = _order(module, shapes[name]) if name else None
        if order is not None:
            seen[module.fan_in_fan_out].add(order)
    for module, name in found:
        if not name:
            near = _near(module.path, shapes)
            into.refuse(
                f"{module.path}: the base has no such module" + (f" (nearest: {near})" if near else ""),
                "a base that stores every expert by itself needs the family's table: pass --family"
                if module.stack
                else "",
            )
            continue
        place = _place(module, name, shapes[name], seen, weight, into)
        if place is not None:
            into.places.append(place)
        if module.lora_bias is not None:
            _land_bias(module, shapes, weight, into)


def _order(module: LoraModule, shape: tuple[int, ...]) -> bool | None:
    """Say whether a linear weight is stored [in, out]; None where its shape does not show it."""
    wanted = module.out, module.terms[0].a.shape[-1]
    if module.kind != "linear" or wanted[0] == wanted[1]:
        return None
    return False if shape == wanted else True if shape == wanted[::-1] else None


def _place(
    module: LoraModule,
    name: str,
    shape: tuple[int, ...],
    seen: Mapping[bool | None, set[bool]],
    weight: float,
    into: Landing,
) -> Place | None:
    terms = [(term.a, term.b) for term in module.terms]
    starts = tuple(term.start for term in module.terms)
    view, transposed = (module.out, module.terms[0].a.shape[-1]), False
    if module.kind == "embedding":
        view, transposed = view[::-1], True
    elif module.kind == "linear":
        if view[::-1] == shape and view != shape:
            view, transposed = shape, True
        elif view[0] == view[1] == shape[0]:
            turned = _square(module, seen[module.fan_in_fan_out], into)
            transposed = bool(turned)
    elif module.conv_form == "loralib":
        view = (module.terms[0].b.shape[0], module.terms[0].a.shape[1])
    elif module.groups > 1:
        into.refuse(
            f"{module.path}: peft's factors of a grouped convolution reach inputs that the weight does not have",
            "leave the module out, or train it in loralib's form",
        )
        return None
    else:
        view = (module.out, math.prod(module.terms[0].a.shape[1:]))
        terms = [(_flat(a), _flat(b)) for a, b in terms]
        if shape != (module.out, *module.terms[0].a.shape[1:]):
            view = (0, 0)
    whole = shape if len(shape) == 2 else view
    if (
        view != whole
        or math.prod(view) != math.prod(shape)
        or (len(shape) < 3) != (module.kind in ("linear", "embedding"))
    ):
        wanted = f"{module.out} x {' x '.join(map(str, module.terms[0].a.shape[1:]))}"
        into.refuse(f"{name}: has shape {shape}, but the factors make {wanted}")
        return None
    operands = [expr for pair in terms for expr in pair]
    if module.magnitude is not None:
        operands.append(module.magnitude)
    update = Update(module.scaling.value * weight, starts, magnitude=module.magnitude is not None)
    return Place(name, (view[0], view[1]), transposed, update, tuple(operands))


def _land_experts(
    modules: Sequence[LoraModule], shapes: Mapping[str, tuple[int, ...]], weight: float, into: Landing
) -> None:  # fmt: skip
    """Find the items of stacks ``[experts, out, in]`` or ``[experts, in, out]``, whose first two axes may be joined.

    A square matrix is stored as the module says, else as those of the adapter's other experts that show it.
    """
    shown = {order for module in modules if (order := _item_order(module, shapes)) is not None}
    for module in modules:
        assert module.stack is not None
        name, number = module.stack.parameter, module.stack.number
        shape, wanted = shapes[name], (module.out, module.terms[0].a.shape[-1])
        transposed = _item_order(module, shapes)
        if transposed is None and wanted[0] == wanted[1]:
            transposed = _square(module, shown, into)
        rows = wanted[1] if transposed else wanted[0]
        columns = wanted[0] if transposed else wanted[1]
        whole = math.prod(shape[:-1]), shape[-1] if shape else 0
        if len(shape) not in (2, 3) or whole[1] != columns or whole[0] % rows or shape[-2] not in (rows, whole[0]):
            into.refuse(f"{name}: has shape {shape}, but the factors of each expert make {wanted[0]} x {wanted[1]}")
        elif (number + 1) * rows > whole[0]:
            into.refuse(f"{name}: has {whole[0] // rows} experts, none with the number {number}")
        elif module.magnitude is not None or module.lora_bias is not None:
            into.refuse(f"{module.path}: an expert in a stack takes a plain delta, no DoRA and no bias", _UNSTACKED)
        else:
            starts = tuple(term.start for term in module.terms)
            operands = tuple(expr for term in module.terms for expr in (term.a, term.b))
            update = Update(module.scaling.value * weight, starts, item=(number * rows, rows))
            into.places.append(Place(name, whole, bool(transposed), update, operands))


_UNSTACKED = "merge into a base that stores every expert by itself"


def _item_order(module: LoraModule, shapes: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Say whether an item of a stack is stored [in, out]; None where its shape does not show it."""
    assert module.stack is not None
    shape = shapes[module.stack.parameter]
    out, inner = module.out, module.terms[0].a.shape[-1]
    if out == inner or not shape or shape[-1] not in (out, inner):
        return None
    return shape[-1] == out


def _square(module: LoraModule, seen: set[bool], into: Landing) -> bool | None:
    hint = "say how square weights are stored with --fan-in-fan-out yes or no"
    stated = module.fan_in_fan_out
    if stated is not None:
        if seen and stated not in seen:
            into.refuse(
                f"{module.path}: fan_in_fan_out is {stated}, but the base stores the adapter's other weights otherwise",
                hint,
            )
        return stated
    if len(seen) == 1:
        return next(iter(seen))
    into.refuse(f"{module.path}: nothing says whether this square weight is stored [out, in] or [in, out]", hint)
    return None


def _land_bias(module: LoraModule, shapes: Mapping[str, tuple[int, ...]], weight: float, into: Landing) -> None:
    name = f"{module.path}.in_proj_bias" if module.weight == "in_proj_weight" else f"{module.path}.bias"
    assert module.lora_bias is not None
    if shapes.get(name) != (module.out,):
        into.refuse(
            f"{module.path}: the adapter adds to a bias of {module.out}, which the base "
            + (f"has as {shapes[name]}" if name in shapes else "does not have"),
            "a bias that the network lacks cannot be merged",
        )
        return
    update = Update(module.scaling.value * weight, (0,), vector=True)
    into.places.append(Place(name, (module.out, 1), False, update, (module.lora_bias,)))


def _flat(x: Expr) -> Expr:
    return reshape(x, (x.shape[0], math.prod(x.shape[1:])))


def _near(path: str, shapes: Mapping[str, object]) -> str:
    from difflib import get_close_matches

    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes))
    tail = path.rpartition(".")[2]
    alike = [name for name in modules if name.rpartition(".")[2] == tail] or modules
    return next(iter(get_close_matches(path, alike[:2000], 1, 0.3)), "")

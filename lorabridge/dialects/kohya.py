"""kohya: the files of sd-scripts and LyCORIS, ``lora_unet_<path with _>.lora_down.weight``, ``.lora_up.weight``.

The scaling of a module is ``alpha / rank``; without an alpha, and with an alpha of 0, it is 1, which is sd-scripts' own
rule. See ``flattened`` for the names and ``lycoris`` for the kinds. ``dora_scale`` is DoRA's magnitude
``[out, 1, ...]``; older files of LyCORIS have ``[1, in, ...]``, one per input, which nothing else knows. Paths in the
hub are diffusers', with the component before them: ``unet.``, ``text_encoder.``, ``text_encoder_2.`` ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..axes import Expr, ShapeError, read, reshape
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from . import flattened, flattened_tables, kohya_split, kohya_write, lycoris
from .adapter import CARRIED, Adapter, Content, Facts, LoraModule, ModuleKind, Scaling, Term, Written
from .flattened import Place
from .pairs import Problems

_KINDS: dict[int, ModuleKind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
OFT = "oft_unet_"
"""How sd-scripts' OFT networks call their modules; of 2026-02."""
MERGE = "merge it into the base with LyCORIS or sd-scripts first"


@dataclass(frozen=True, slots=True)
class Kohya:
    """Read LoRA and the products of LyCORIS; write LoRA and LoCon with per-module alpha."""

    name: str = "kohya"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim a file by a tensor of a known kind below a flattened name."""
        found = next((name for name in content.specs if _is_update(name)), None)
        return f"tensor {found} is spelled as sd-scripts does" if found else None

    def parse(self, content: Content) -> Adapter:
        """Resolve every name and every kind; modules come in the order of their paths.

        MappingError: names of no known model (see ``flattened``), half pairs, shapes that do not fit, kinds that are
        no product, products without the request to write them as LoRA, magnitudes per input.
        """
        _refuse_oft(content)
        groups = _groups(content)
        if not groups:
            raise MappingError(
                "the file holds no module in sd-scripts' spelling",
                where=[content.path, *list(content.specs)[:3]],
                hint="name the dialect with --from",
            )
        places = _places(groups, content)
        reader = UpdateReader(content, content.facts.read("value"))
        modules = [m for name, specs in groups.items() if (m := reader.module(name, specs, places[name])) is not None]
        reader.problems.raise_any(content.path)
        modules = kohya_write.split(modules, {place.path: place.fused for place in places.values() if place.fused})
        alphas = tuple((s.name, CARRIED) for specs in groups.values() for n, s in specs.items() if n == "alpha")
        refuse_twins(modules)
        warnings = (*reader.warnings, *kohya_split.warnings(content.facts.read("split")))
        return Adapter(tuple(sorted(modules, key=lambda module: module.path)), left_out=alphas, warnings=warnings)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter as sd-scripts does; see :func:`lorabridge.dialects.kohya_write.write`."""
        return kohya_write.write(adapter, facts)


def _refuse_oft(content: Content) -> None:
    """Refuse a file of sd-scripts' networks/oft.py or oft_flux.py, whose names begin otherwise than LoRA's."""
    found = [name for name in content.specs if name.startswith(OFT)]
    if found:
        raise MappingError(
            "OFT, which rotates the weight, is no product of factors",
            where=[*found, f"in {content.path}"],
            hint="merge it into the base with sd-scripts first",
        )


def _is_update(name: str) -> bool:
    module, _, tensor = name.partition(".")
    if name.startswith(OFT):
        return tensor == "oft_blocks"
    own = tensor in lycoris.KNOWN and tensor not in ("weight", "alpha", "scalar", "rescale")
    return bool(own and flattened_tables.prefix_of(module))


def _groups(content: Content) -> dict[str, dict[str, TensorSpec]]:
    """Sort the tensors by module; MappingError lists those of no known kind."""
    groups: dict[str, dict[str, TensorSpec]] = {}
    strange = []
    for name, spec in content.specs.items():
        module, _, tensor = name.partition(".")
        if tensor in lycoris.KNOWN and flattened_tables.prefix_of(module):
            groups.setdefault(module, {})[tensor] = spec
        else:
            strange.append(name)
    if strange and groups:
        raise MappingError(
            f"{counted(len(strange), 'tensor')} is nothing that sd-scripts or LyCORIS writes",
            where=[*strange, f"in {content.path}"],
            hint="remove them, or name the dialect of the file with --from",
        )
    return groups


def _places(groups: Mapping[str, Mapping[str, TensorSpec]], content: Content) -> dict[str, Place]:
    """Return what every name stands for: as the base model's files said, or as the shipped tables do."""
    known = content.facts.read("module")
    if known:
        lost = [name for name in groups if name not in known]
        if lost:
            raise MappingError("names without a module", where=lost, hint="give the base model with --names-of")
        return {name: stated(known[name]) for name in groups}
    only = content.facts.get("*", "names_of")
    axes = {name: lycoris.axes_of(specs) for name, specs in groups.items()}
    places, _ = flattened.resolve(axes, only if isinstance(only, str) else None, content.path)
    return places


def stated(value: object) -> Place:
    """Read a module as a fact has it: its path, or a list of path and shape of the weight."""
    if isinstance(value, list) and value:
        path, *shape = value
        return Place(str(path), tuple(int(n) for n in shape[2:] if isinstance(n, int)) if shape else None)
    return Place(str(value))


@dataclass
class UpdateReader:
    """Turn the tensors of one name into a module, noting what is wrong."""

    content: Content
    numbers: Mapping[str, object]
    problems: Problems = field(default_factory=lambda: Problems("things about the file cannot be carried"))
    warnings: list[str] = field(default_factory=list)

    def module(self, name: str, specs: Mapping[str, TensorSpec], place: Place) -> LoraModule | None:
        """Return one module; None after noting why there is none. ``specs``: by LyCORIS' names of the tensors."""
        for tensor in sorted(set(specs) & set(lycoris.OTHERS)):
            self.problems.add(f"{lycoris.OTHERS[tensor]} is no product of factors", f"{name}.{tensor}", MERGE)
        if not lycoris.kind_of(specs):
            if not set(specs) & set(lycoris.OTHERS):
                held = ", ".join(sorted(specs))
                self.problems.add("factors are missing", f"{name}: has {held}", "save the adapter again")
            return None
        try:
            made = lycoris.update(specs, place.kernel)
        except KeyError as error:
            self.problems.add("factors are missing", f"{name}.{error.args[0]}", "save the adapter again")
            return None
        except ShapeError as error:
            self.problems.add("shapes do not fit", f"{name}: {error}", "check that the names are those of this model")
            return None
        if not made.plain and made.kind != "LoRA with a core" and self.content.facts.get(place.path, "as") != "lora":
            self.problems.add(
                f"{made.kind} is not LoRA; it can be written as LoRA of rank {made.a.shape[0]}, exactly",
                name,
                "ask for it with --as lora, and for less with --compress",
            )
        return self._dressed(name, specs, place, made)

    def _dressed(self, name: str, specs: Mapping[str, TensorSpec], place: Place, made: lycoris.Update) -> LoraModule:
        dims, rank, out = len(made.a.shape), made.a.shape[0], made.b.shape[0]
        return LoraModule(
            place.path, _KINDS.get(dims, "conv3d"), out, (Term(made.a, made.b, 0, out),),
            self._scaling(name, specs, made.dim, rank), magnitude=self._magnitude(name, specs, out, dims),
            kernel_size=made.a.shape[2:],
        )  # fmt: skip

    def _scaling(self, name: str, specs: Mapping[str, TensorSpec], dim: int | None, rank: int) -> Scaling:
        """Return ``alpha / dim`` as a scaling of the pair's rank."""
        alpha: object = dim
        if "alpha" in specs:
            alpha = self.numbers.get(specs["alpha"].name)
            if not isinstance(alpha, int | float):
                shape = list(specs["alpha"].shape)
                self.problems.add("alpha is not one number", f"{name}.alpha: {shape}", "repair the tensor")
                return Scaling(0.0, rank)
        if dim is None:
            return Scaling(float(rank), rank)
        if not alpha:
            self.warnings.append(f"{name}: an alpha of 0 means alpha = rank in sd-scripts")
            alpha = dim
        assert isinstance(alpha, int | float)
        found = Scaling(float(alpha), dim)
        return found if dim == rank else _of_rank(found, rank)

    def _magnitude(self, name: str, specs: Mapping[str, TensorSpec], out: int, dims: int) -> Expr | None:
        spec = specs.get("dora_scale")
        if spec is None:
            return None
        if spec.shape[:1] != (out,) or spec.size != out:
            self.problems.add(
                "DoRA's magnitude is one per input, as older versions of LyCORIS had it",
                f"{name}.dora_scale: {list(spec.shape)}",
                MERGE,
            )
            return None
        return reshape(read(spec), (out,) if dims == 2 else (1, out, *(1,) * (dims - 2)))


def _of_rank(scaling: Scaling, rank: int) -> Scaling:
    """Return the same factor for the rank that a product has as a pair."""
    from .factors import exact_alpha

    alpha = exact_alpha(scaling.value, rank)
    return Scaling(scaling.value * rank if alpha is None else alpha, rank)


def refuse_twins(modules: list[LoraModule]) -> None:
    """Raise MappingError where two names mean one module."""
    seen: dict[str, int] = {}
    for module in modules:
        seen[module.path] = seen.get(module.path, 0) + 1
    twins = [path for path, count in seen.items() if count > 1]
    if twins:
        raise MappingError("two names of the file mean one module", where=twins, hint="remove one of them")

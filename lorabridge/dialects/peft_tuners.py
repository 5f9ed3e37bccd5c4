"""peft's other additive tuners, which ``as = lora`` turns into pairs of factors: here AdaLoRA, VeRA, LoHa and LoKr.

| ``peft_type`` | tensors below ``base_model.model.P`` | delta of the weight ``[out, in, *k]`` | rank |
|---|---|---|---|
| ADALORA | ``lora_A[r, in]``, ``lora_E[r, 1]``, ``lora_B[out, r]`` | ``alpha / (init_r + 1e-5) B (A * E)`` | ``r`` |
| VERA | ``vera_lambda_d[r]``, ``vera_lambda_b[out]`` | ``(b * vera_B[:out]) (d * vera_A[:, :in])`` | ``r`` |
| LOHA | ``hada_w1_a`` ... as LyCORIS has them | ``alpha / r`` of the Hadamard product | ``r r`` |
| LOKR | ``lokr_w1`` ... as LyCORIS has them | ``alpha / r`` of the Kronecker product | product of both |

``peft_tuners_added`` has the others. VeRA's ``vera_A``, ``vera_B`` lie once below ``base_model``. AdaLoRA divides by
the rank that it began with, also where
``rank_pattern`` left fewer; an alpha of 0 or below counts as the rank. Elements of new factors are single products,
exact in float64 and rounded once to float32 (cores are sums, see ``arithmetic.products``). The rest of a file (whole
modules, biases, token rows) is what it is in a LoRA file. Source: peft 0.21.2, ``tuners/*/layer.py`` and ``model.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..arithmetic import products
from ..axes import Expr, ShapeError, cut, read, reshape
from ..tensors import TensorSpec
from . import lycoris, peft_tuners_added
from .adapter import Adapter, Content, Json, LoraModule, ModuleKind, Scaling, Term, Value
from .factors import exact_alpha
from .optimizer import training_state
from .pairs import Problems
from .peft_config import read_settings, warnings_of
from .peft_patterns import KeyTable
from .peft_read import Reader
from .peft_tuners_config import MERGE, TUNERS, lora_config, refuse_type
from .prefixes import recognise

PREFIX = "base_model.model."
BELOW = "base_model."
"""Where tensors lie that a file has once for all modules."""
SHARED: Mapping[str, tuple[str, ...]] = {"VERA": ("vera_A", "vera_B"), **peft_tuners_added.SHARED}
TENSORS: Mapping[str, tuple[str, ...]] = {
    "ADALORA": ("lora_A", "lora_E", "lora_B"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "LOHA": lycoris.LOHA,
    "LOKR": lycoris.LOKR,
    **peft_tuners_added.TENSORS,
}
"""Last components of a tuner's tensors, by peft_type."""

_KINDS: dict[int, ModuleKind] = {0: "linear", 1: "conv1d", 2: "conv2d", 3: "conv3d"}


def paths(names: Iterable[str]) -> list[str]:
    """Return the paths of the modules that a file of one of these tuners adapts, sorted; none for other files."""
    known = {tensor for tensors in TENSORS.values() for tensor in tensors}
    own = {"lora_A", "lora_B"}  # LoRA's too, with .weight behind
    split = [_split(name, tuple(known - own)) for name in names if name.startswith(PREFIX)]
    return sorted({path for path, tensor in split if tensor})


def _split(name: str, tensors: tuple[str, ...]) -> tuple[str, str]:
    """Return (module, tensor); "" for a tensor that is none of these."""
    found = next((tensor for tensor in tensors if name.endswith(f".{tensor}")), "")
    return name.removesuffix(f".{found}").removeprefix(PREFIX), found


def parse(content: Content) -> Adapter:
    """Resolve a directory whose config names another tuner than LoRA.

    MappingError: a tuner that is no sum of products, one that is without ``as = lora``, unknown fields, tensors that
    are missing or belong to nothing, shapes that do not fit, and what the file does not say (VeRA's projections and
    input sizes, kernels).
    """
    config = content.config or {}
    kind = str(config.get("peft_type"))
    if kind not in TUNERS:
        refuse_type(kind, content.path)
    left_out = training_state(content.specs)
    skipped = {name for name, _ in left_out}
    groups, rest = _groups({n: s for n, s in content.specs.items() if n not in skipped}, TENSORS[kind])
    tuner = _Tuner(content, kind, lora_config(config, content.path), set(groups))
    shared = {name: rest.pop(BELOW + name) for name in SHARED.get(kind, ()) if BELOW + name in rest}
    found = [tuner.module(path, specs, shared) for path, specs in sorted(groups.items())]
    if not groups:
        tuner.problems.add(f"the file has no tensors of {TUNERS[kind]}", content.path, "check adapter_config.json")
    tuner.problems.raise_any(content.path)
    copied = [n for n in shared if groups and all(n in specs for specs in groups.values())]
    left_out += [(BELOW + name, "every module has it as well") for name in copied]
    if tuner.left_out:  # what selected the modules would select those that are left out, too
        tuner.config |= dict.fromkeys(("target_modules", "layers_to_transform", "layers_pattern"))
    reader = Reader(content, read_settings(tuner.config, content.path), recognise(rest))
    reader.adapted = set(groups)
    extras = reader.extras()
    reader.finish()
    return Adapter(
        tuple(module for module in found if module is not None), extras, tuner.config,
        (*left_out, *reader.left_out, *tuner.left_out), (*reader.warnings, *warnings_of(tuner.config)),
    )  # fmt: skip


def _groups(
    specs: Mapping[str, TensorSpec], tensors: tuple[str, ...]
) -> tuple[dict[str, dict[str, TensorSpec]], dict[str, TensorSpec]]:
    """Sort a tuner's tensors by module; the second result is everything else."""
    groups: dict[str, dict[str, TensorSpec]] = {}
    rest: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        path, tensor = _split(name, tensors) if name.startswith(PREFIX) else (name, "")
        if tensor:
            groups.setdefault(path, {})[tensor] = spec
        else:
            rest[name] = spec
    return groups, rest


@dataclass(frozen=True, slots=True)
class _Pair:
    """``a`` ``[rank, in, *kernel]``, ``b`` ``[out, rank]`` and the factor in front."""

    a: Expr
    b: Expr
    scaling: float


@dataclass
class _Tuner:
    """Turn the tensors of one module into a LoRA module, noting what is wrong."""

    content: Content
    kind: str
    config: dict[str, Value]
    adapted: set[str]
    problems: Problems = field(default_factory=lambda: Problems("things about the adapter cannot be carried"))
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @property
    def given(self) -> Json:
        """The config as it lies beside the file."""
        return self.content.config or {}

    def module(self, path: str, specs: Mapping[str, TensorSpec], shared: Mapping[str, TensorSpec]) -> LoraModule | None:
        """Return one module; None after noting why there is none."""
        if any(spec.size == 0 for spec in specs.values()):
            self._emptied(path, specs)
            return None
        kernel = self._kernel(path)
        try:
            pair = self._pair(path, specs, shared, kernel)
            self._check_shape(path, pair)
        except KeyError as error:
            self.problems.add("tensors are missing", f"{path}.{error.args[0]}", "save the adapter again")
            return None
        except (ValueError, IndexError) as error:  # ShapeError, and tensors of too few or too many axes
            self.problems.add("shapes do not fit", f"{path}: {error}", "check --names-of, --kernel-size and the file")
            return None
        if pair is None:
            return None
        rank = pair.a.shape[0]
        self._check_asked(path, rank)
        alpha = exact_alpha(pair.scaling, rank)
        size, out = pair.a.shape[2:], pair.b.shape[0]
        order = self.given.get("fan_in_fan_out", False)
        return LoraModule(
            path, _KINDS[len(size)], out, (Term(pair.a, reshape(pair.b, (out, rank, *(1,) * len(size))), 0, out),),
            Scaling(pair.scaling * rank if alpha is None else alpha, rank),
            fan_in_fan_out=bool(order) if not size else None, kernel_size=size,
        )  # fmt: skip

    def _check_shape(self, path: str, pair: _Pair | None) -> None:
        """Raise ShapeError where the base was given and its weight has another shape than the delta."""
        known = self._shape(path)
        if pair is None or known is None:
            return
        turned = len(known) == 2 and bool(self.given.get("fan_in_fan_out"))
        made = (pair.b.shape[0], *pair.a.shape[1:])
        if made != (known[::-1] if turned else known):
            raise ShapeError(f"the delta is {list(made)}, the base's weight {list(known)}")

    def _check_asked(self, path: str, rank: int) -> None:
        if self.content.facts.get(path, "as") != "lora":
            large = self.kind in ("LOHA", "LOKR", *peft_tuners_added.DENSE)
            name, end = TUNERS[self.kind], ", and for less with --compress" if large else ""
            self.problems.add(
                f"{name} is not LoRA; it can be written as LoRA of rank {rank}, exactly but for rounding the factors",
                path, f"ask for it with --as lora{end}",
            )  # fmt: skip

    def _pair(
        self, path: str, specs: Mapping[str, TensorSpec], shared: Mapping[str, TensorSpec],
        kernel: tuple[int, ...] | None,
    ) -> _Pair | None:  # fmt: skip
        if self.kind == "ADALORA":
            return self._adalora(path, specs, kernel)
        if self.kind == "VERA":
            return self._vera(path, specs, shared)
        if self.kind in peft_tuners_added.PAIRS:
            return self._added(path, {**shared, **specs})
        return self._product(path, specs, kernel)

    def _added(self, path: str, specs: Mapping[str, TensorSpec]) -> _Pair | None:
        """Return the pair of a tuner of ``peft_tuners_added``; None after asking for the base's shapes."""
        known = self._shape(path)
        shape = None
        if known is not None:
            shape = (known[1], known[0]) if self.given.get("fan_in_fan_out") else (known[0], known[1])
        missing = [name for name in SHARED.get(self.kind, ()) if name not in specs]
        if missing:
            self.problems.add(
                f"{TUNERS[self.kind]}'s shared tensors are not in the file (save_projection was false)",
                ", ".join(BELOW + name for name in missing),
                "make a LoRA of it in peft: peft.save_as_lora(path, model, rank)",
            )
            return None
        if self.kind == "MISS" and self.given.get("init_weights") == "bat":
            self.problems.add("MiSS with init_weights='bat' multiplies the base weight", path, MERGE)
            return None
        numbers = peft_tuners_added.Numbers(self._number, self.given.get("init_weights") == "mini")
        try:
            return _Pair(*peft_tuners_added.PAIRS[self.kind](specs, shape, numbers))
        except peft_tuners_added.UnknownSizeError:
            self.problems.add(
                "the shape of the module's weight is not in the file", path,
                "give the base model's files with --names-of",
            )  # fmt: skip
            return None

    def _adalora(self, path: str, specs: Mapping[str, TensorSpec], kernel: tuple[int, ...] | None) -> _Pair:
        a, e, b = (read(specs[name]) for name in TENSORS["ADALORA"])
        rank, first = a.shape[0], self._number("init_r", 12)
        if len(a.shape) != 2 or b.shape[1:] != (rank,) or math.prod(e.shape) != rank:
            raise ShapeError(f"lora_A {list(a.shape)}, lora_E {list(e.shape)} and lora_B {list(b.shape)} are no triple")
        said = self._masked(path)
        if rank != (first if said is None else said):
            where = "init_r" if said is None else "rank_pattern"
            self.problems.add(
                f"rank {rank} is not what {where} in adapter_config.json says", path, "use the config saved with it"
            )
        a = products.scale_rows(a, e, products.wide(a, e))
        alpha = self._number("lora_alpha", 8)
        return _Pair(_spread(a, kernel), b, (alpha if alpha > 0 else rank) / (first + 1e-5))

    def _masked(self, path: str) -> int | None:
        """Return how many singular values of a module ``rank_pattern`` keeps."""
        pattern = self.given.get("rank_pattern")
        mask = pattern.get(f"{path}.lora_E") if isinstance(pattern, dict) else None
        return sum(map(bool, mask)) if isinstance(mask, list) else None

    def _emptied(self, path: str, specs: Mapping[str, TensorSpec]) -> None:
        """Leave a module out whose singular values were all pruned: its delta is zero."""
        if self._masked(path) == 0:
            self.left_out += [(spec.name, "AdaLoRA pruned every singular value here") for spec in specs.values()]
            return
        self.problems.add(
            "tensors have no elements, as DeepSpeed ZeRO-3 saves ungathered shards", path,
            "save again inside deepspeed.zero.GatheredParameters",
        )  # fmt: skip

    def _vera(self, path: str, specs: Mapping[str, TensorSpec], shared: Mapping[str, TensorSpec]) -> _Pair | None:
        d, b = read(specs["vera_lambda_d"]), read(specs["vera_lambda_b"])
        if len(shared) < len(SHARED["VERA"]):
            self.problems.add(
                "VeRA's random projections are not in the file (save_projection was false)",
                ", ".join(BELOW + name for name in SHARED["VERA"] if name not in shared),
                f"make a LoRA of it in peft: peft.save_as_lora(path, model, rank={d.shape[0]}); training with "
                "save_projection=True keeps them in the file",
            )
            return None
        whole_a, whole_b = (read(shared[name]) for name in SHARED["VERA"])
        width = self._width(path, whole_a.shape[1])
        if width is None:
            return None
        rank, out = d.shape[0], b.shape[0]
        if whole_a.shape[0] != rank or whole_b.shape[1] != rank:
            raise ShapeError(f"vera_A {list(whole_a.shape)} and vera_B {list(whole_b.shape)} are not of rank {rank}")
        a, kept = cut(whole_a, 1, 0, width), products.wide(whole_a, whole_b, d, b)
        return _Pair(products.scale_rows(a, d, kept), products.scale_rows(cut(whole_b, 0, 0, out), b, kept), 1.0)

    def _width(self, path: str, widest: int) -> int | None:
        """Return the length of a module's input, which VeRA's file says of the widest module only."""
        shape = self._shape(path)
        if shape is not None:
            return shape[0] if self.given.get("fan_in_fan_out") else shape[1]
        if len(self.adapted) == 1:
            return widest
        self.problems.add(
            f"how many inputs the module has is not in the file, only that the widest has {widest}", path,
            "give the base model's files with --names-of",
        )  # fmt: skip
        return None

    def _product(self, path: str, specs: Mapping[str, TensorSpec], kernel: tuple[int, ...] | None) -> _Pair | None:
        if "lokr_w2" in specs and len(specs["lokr_w2"].shape) == 3:
            self.problems.add(
                "peft 0.21.2 does not compute a Kronecker product for a LoKr of a conv1d with a whole lokr_w2",
                path, MERGE,
            )  # fmt: skip
            return None
        made = lycoris.update(specs)
        found = made.a.shape[2:]
        if len(found) == 2 and found[1] == 1 and found[0] != 1:  # a core of conv1d has an axis more
            if kernel is None:
                self.problems.add(
                    f"the kernel is {found[0]} in a conv1d or {list(found)} in a conv2d", path,
                    f"say which with --kernel-size {found[0]} or {found[0]},1, or give the base with --names-of",
                )  # fmt: skip
                return None
            found = kernel if kernel == found[:1] else found
        rank, out = made.a.shape[0], made.b.shape[0]
        a = reshape(made.a, (*made.a.shape[:2], *found))
        if kernel is not None and kernel != found:
            if found:
                raise ShapeError(f"the weight's kernel is {list(kernel)}, that of the factors {list(found)}")
            a = _spread(a, kernel)
        return _Pair(a, reshape(made.b, (out, rank)), self._alpha(path) / self._rank(path, made))

    def _rank(self, path: str, made: lycoris.Update) -> int:
        """Return what peft divides alpha by: the config's rank, and the factors' where they show one."""
        said = int(self._pattern(path, "rank_pattern", self._number("r", 8)))
        if made.dim is not None and made.dim != said:
            self.problems.add(
                f"the factors have rank {made.dim}, adapter_config.json says {said}",
                path,
                "use the config saved with it",
            )
        if said < 1:
            self.problems.add(f"rank {said} is not positive", path, "correct adapter_config.json")
            return 1
        return said

    def _alpha(self, path: str) -> float:
        return self._pattern(path, "alpha_pattern", self._number("alpha", 8))

    def _pattern(self, path: str, name: str, default: float) -> float:
        pattern = self.given.get(name)
        if not isinstance(pattern, dict) or not pattern:
            return default
        keys = KeyTable(pattern).matching(path)
        value: Value = pattern[keys[0]] if keys else pattern.get(path, default)
        return self._checked(value, name, default)

    def _number(self, name: str, default: float) -> float:
        return self._checked(self.given.get(name, default), name, default)

    def _checked(self, value: Value, name: str, default: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.problems.add(f"{name} is not a number", f"{name} = {value!r}"[:80], "correct adapter_config.json")
            return default
        return value

    def _shape(self, path: str) -> tuple[int, ...] | None:
        """Return the shape of the base's weight, where the base was given."""
        said = self.content.facts.read("module").get(path)
        shape = said[1:] if isinstance(said, list) else []
        return tuple(n for n in shape if isinstance(n, int)) or None

    def _kernel(self, path: str) -> tuple[int, ...] | None:
        """Return a weight's kernel, () for a linear layer; None where neither base nor option says."""
        stated, groups = self.content.facts.get(path, "kernel_size"), self.content.facts.get(path, "groups")
        if isinstance(groups, int) and groups > 1:
            self.problems.add("a convolution with groups has no pair of this form", path, MERGE)
        if stated is not None:
            return tuple(n for n in (stated if isinstance(stated, list) else [stated]) if isinstance(n, int))
        shape = self._shape(path)
        return None if shape is None else shape[2:]


def _spread(a: Expr, kernel: tuple[int, ...] | None) -> Expr:
    """Give factors of flattened kernels their axes back: ``[rank, in * k]`` to ``[rank, in, *kernel]``."""
    size = math.prod(kernel or ())
    if not kernel:
        return a
    if a.shape[1] % size:
        raise ShapeError(f"{a.shape[1]} columns are no multiple of a kernel of {list(kernel)}")
    return reshape(a, (a.shape[0], a.shape[1] // size, *kernel))

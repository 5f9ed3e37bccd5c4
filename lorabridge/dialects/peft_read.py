"""Turn the tensors of a peft file into modules and extras, and collect every problem on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..axes import read
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from .adapter import Content, Extra, ExtraKind, LoraModule, ModuleKind, Scaling, Term, Value
from .peft_config import Settings
from .peft_parameters import is_plain, read_parameters
from .peft_patterns import KeyTable
from .prefixes import PeftName, PeftNames, Role, has_marker

EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out"})
"""Last names of embeddings, whose whole weight peft saves when the vocabulary was resized."""
HF_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Last names of the modules that transformers builds as Conv1D, stored [in, out]."""

_KINDS: dict[int, ModuleKind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
_FACTORS: tuple[Role, ...] = ("A", "B", "embedding_A", "embedding_B", "magnitude")
_VARIANT_FIELDS = {
    "lora_diag": "kasa_config", "lora_velora_embed": "velora_config", "lora_monteclora_sampler": "monteclora_config",
}  # fmt: skip

Parts = dict[tuple[Role, str], TensorSpec]


@dataclass
class Reader:
    """Collect what one file holds.

    ``attention``: paths of nn.MultiheadAttention modules. ``adapted``: paths with factors. ``layers``: these, and
    embeddings with trained tokens. ``dump``: every adapted layer's own weight is there, so it is a whole model.
    """

    content: Content
    settings: Settings
    names: PeftNames
    issues: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    attention: set[str] = field(default_factory=set)
    adapted: set[str] = field(default_factory=set)
    layers: set[str] = field(default_factory=set)
    dump: bool = False
    without_alpha: list[str] = field(default_factory=list)
    overruled: dict[str, str] = field(default_factory=dict)

    def modules(self) -> tuple[LoraModule, ...]:
        """Pair the factors, sorted by module path."""
        groups: dict[str, Parts] = {}
        nested: dict[str, dict[int, Parts]] = {}
        for name in self.names.names:
            if name.role in _FACTORS:
                parts = nested.setdefault(name.path, {}).setdefault(name.nested, {})
                parts[name.role, name.parameter] = self.content.specs[name.name]
                groups[name.path] = nested[name.path][min(nested[name.path])]
                if name.wrapped and name.role in ("A", "B") and name.path.endswith(".out_proj"):
                    self.attention.add(name.path.removesuffix(".out_proj"))
        self.adapted = set(groups)
        modules = tuple(module for path in sorted(groups) for module in self._modules_of(path, nested[path]))
        self._check_attention(groups)
        self._warn_ambiguous("rank_pattern", self.settings.rank_pattern, self.settings.rank_keys)
        self._warn_ambiguous("alpha_pattern", self.settings.alpha_pattern, self.settings.alpha_keys)
        return tuple(
            replace(module, fan_in_fan_out=order) for module, order in zip(modules, self._orders(modules), strict=True)
        )

    def _modules_of(self, path: str, levels: Mapping[int, Parts]) -> list[LoraModule]:
        """Return what peft put around one module: a layer, or layers around its parameters, the last one outermost."""
        names = self.settings.parameters_of(path, len(levels))
        if set(levels) == {0} and (not names or is_plain(path, levels[0], names, self.settings)):
            module = self._module(path, levels[0])
            return [] if module is None else [module]
        found = read_parameters(path, levels, names, self.settings, self.content.facts)
        self.issues += found.problems
        self.without_alpha += found.without_alpha
        return list(found.modules)

    def _module(self, path: str, parts: Parts) -> LoraModule | None:
        linear = [parts.get((role, "weight")) for role in ("A", "B")]
        lookup = [parts.get((role, "weight")) for role in ("embedding_A", "embedding_B")]
        is_embedding = any(lookup)
        a, b = lookup if is_embedding else linear
        if is_embedding and any(linear):
            self.issues.append(f"{path}: factors of a linear layer and of an embedding at once")
        elif a is None or b is None:
            prefix = "lora_embedding_" if is_embedding else "lora_"
            lacking = [side for side, spec in (("A", a), ("B", b)) if spec is None]
            self.issues.append(f"{path}: {' and '.join(prefix + side for side in lacking)} missing")
        elif problem := _misfit(a, b, is_embedding):
            self.issues.append(f"{path}: {problem}")
        else:
            module = LoraModule(
                path=path,
                kind="embedding" if is_embedding else _KINDS[len(a.shape)],
                out=b.shape[0],
                terms=(Term(read(a), read(b), 0, b.shape[0]),),
                scaling=self._scaling(path, a.shape[0]),
                weight="in_proj_weight" if path in self.attention else "weight",
                kernel_size=a.shape[2:],
                groups=a.shape[0] // b.shape[1],
            )
            return self._dressed(module, parts)
        return None

    def _dressed(self, module: LoraModule, parts: Parts) -> LoraModule:
        """Add the DoRA magnitude and the bias of B, which must be there exactly when the config says so."""
        magnitude, bias = parts.get(("magnitude", "weight")), parts.get(("B", "bias"))
        ones = (1,) * len(module.kernel_size)
        norms = (1, module.out, *ones) if ones else (module.out,)
        self._check_part(module.path, "lora_magnitude_vector", magnitude, norms, "use_dora", self.settings.dora)
        if module.kind != "embedding":
            self._check_part(module.path, "lora_B.bias", bias, (module.out,), "lora_bias", self.settings.lora_bias)
        return replace(
            module,
            magnitude=read(magnitude) if magnitude else None,
            lora_bias=read(bias) if bias else None,
        )

    def _check_part(
        self, path: str, what: str, spec: TensorSpec | None, shape: tuple[int, ...], flag: str, wanted: bool
    ) -> None:
        if self.settings.config is not None and wanted != (spec is not None):
            state = "there" if spec else "missing"
            self.issues.append(f"{path}: {what} is {state}, but adapter_config.json has {flag} = {wanted}")
        if spec is not None and spec.shape != shape:
            self.issues.append(f"{path}: {what} has shape {spec.shape}, not {shape}")

    def _scaling(self, path: str, rank: int) -> Scaling:
        """Return alpha and rank from the config, which must be right about the rank, else alpha from facts."""
        settings, parent = self.settings, path.removesuffix(".out_proj")
        key = parent if parent in self.attention else path  # peft configures the attention's out_proj by its parent
        said = settings.rank_of(key)
        if said is not None and said != rank:
            self.issues.append(f"{path}: the factors have rank {rank}, adapter_config.json says {said}")
        alpha = self._stated(path, "alpha", settings.alpha_of(key))
        rslora = self._stated(path, "use_rslora", settings.rslora if settings.config is not None else None)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            self.without_alpha.append(path)
            alpha = 0
        return Scaling(float(alpha), rank, bool(rslora))

    def _stated(self, path: str, fact: str, configured: Value) -> Value:
        """Return what the config says, else a fact; a fact that differs is a choice for the target, or a mistake."""
        given = self.content.facts.get(path, fact)
        if configured is None:
            return given
        if given is not None and given != configured:
            self.overruled.setdefault(
                fact, f"the source has {fact} {configured}, as adapter_config.json says, not {given}"
            )
        return configured

    def _orders(self, modules: tuple[LoraModule, ...]) -> list[bool | None]:
        """Return each module's fan_in_fan_out.

        peft's config has one value, which ends up as that of the layer type wrapped last, so that it says nothing
        where Conv1D and Linear are both adapted.
        """
        linear = [m for m in modules if m.kind == "linear" and m.weight == "weight" and m.stack is None]
        like_conv1d = {m.path.rpartition(".")[2] in HF_CONV1D for m in linear}
        shared = self.settings.fan_in_fan_out
        if len(like_conv1d) == 2:
            shared = None
        orders: list[bool | None] = []
        for module in modules:
            given = self.content.facts.get(module.path, "fan_in_fan_out")
            if isinstance(given, bool):
                orders.append(given)
            elif module.stack is not None:
                orders.append(module.fan_in_fan_out)
            else:
                orders.append(shared if module.kind == "linear" and module.weight == "weight" else None)
        return orders

    def _check_attention(self, groups: Mapping[str, Parts]) -> None:
        for path in sorted(self.attention):
            fused, single = groups.get(path, {}).get(("B", "weight")), groups[f"{path}.out_proj"].get(("B", "weight"))
            if fused is None:
                self.issues.append(f"{path}: the factors of in_proj_weight are missing, out_proj has its own")
            elif single is not None and fused.shape[0] != 3 * single.shape[0]:
                self.issues.append(
                    f"{path}: in_proj has {fused.shape[0]} rows, not 3 times out_proj's {single.shape[0]}"
                )
        for name in self.names.names:
            linear = name.role in ("A", "B") and name.path.rpartition(".")[0] in self.attention
            inside = name.wrapped and not name.nested
            if name.role in _FACTORS and inside and not linear:
                self.issues.append(f"{name.name}: factors below a base_layer that is no attention")

    def _warn_ambiguous(self, which: str, pattern: Mapping[str, int | float], table: KeyTable) -> None:
        for path in sorted(self.adapted):
            keys = table.matching(path)
            if len({pattern[key] for key in keys}) > 1:
                self.warnings.append(
                    f"{which}: {' and '.join(map(repr, keys))} match {path} with different values; the first in the "
                    "file counts, but peft sorts the keys when it saves: training may have used another one"
                )
                return

    def extras(self) -> tuple[Extra, ...]:
        """Sort what is beside the factors into its kinds."""
        plain = {f"{n.path}.{n.parameter}" for n in self.names.names if n.role == "plain" and not n.wrapped}
        bases = {n.path for n in self.names.names if n.role == "plain" and n.wrapped and n.parameter != "bias"}
        self.dump = self.adapted <= bases
        self.layers = self.adapted | {n.path for n in self.names.names if n.role == "tokens"}
        found = []
        for name in self.names.names:
            if name.role in _FACTORS or (name.role == "B" and name.parameter == "bias"):
                continue
            if name.role == "original":
                self.left_out.append((name.name, "frozen original of a module that is saved in full"))
            elif name.role == "saved" and not self.names.adapter and f"{name.path}.{name.parameter}" in plain:
                self.left_out.append((name.name, f"peft's second copy of {name.path}.{name.parameter}"))
            elif (kind := self._kind(name, plain)) is not None:
                parameter = "weight" if kind == "trainable_tokens" else name.parameter
                found.append(Extra(name.path, parameter, read(self.content.specs[name.name]), kind))
        return tuple(sorted(found, key=lambda extra: (extra.path, extra.parameter, extra.kind)))

    def _kind(self, name: PeftName, plain: set[str]) -> ExtraKind | None:
        """Say what a tensor beside the factors is; None after noting that it is nothing known."""
        settings = self.settings
        if name.role == "saved" and name.path and not has_marker(f"{name.path}.{name.parameter}"):
            return "modules_to_save"
        if name.role == "tokens":
            self._check_tokens(name)
            return "trainable_tokens"
        if name.role == "variant":
            variant = _VARIANT_FIELDS[name.parameter.partition(".")[0]]
            if name.path in self.adapted and settings.config is not None and settings.config.get(variant):
                return "buffer"
            self.issues.append(f"{name.name}: no factors beside it, or no {variant} in adapter_config.json")
            return None
        if has_marker(name.name) or (name.wrapped and name.path not in self.layers):
            self.issues.append(f"{name.name}: belongs to no layer of peft that has factors in this file")
            return None
        if settings.saves(name.path) and not name.wrapped:
            return "modules_to_save"
        if name.parameter == "bias" and settings.bias == "all":
            return "bias"
        if name.parameter == "bias" and settings.bias == "lora_only" and name.path in self.adapted:
            return "bias"
        if name.wrapped or self.dump:
            return "base"
        if settings.config is None and name.path:
            only_bias = name.parameter == "bias" and f"{name.path}.weight" not in plain
            return "bias" if only_bias else "modules_to_save"
        if name.path.rpartition(".")[2] in EMBEDDINGS:
            self.warnings.append(
                f"{name.path}.{name.parameter} is a whole embedding: it is carried as a base parameter"
            )
            return "base"
        self.issues.append(
            f"{name.name}: neither a factor, nor in modules_to_save, nor covered by bias={settings.bias!r}"
        )
        return None

    def _check_tokens(self, name: PeftName) -> None:
        """Compare the rows of trained tokens with the config's list of indices."""
        tokens, rows = self.settings.tokens, self.content.specs[name.name].shape[:1]
        lengths = [n for key, n in tokens.items() if not key or name.path == key or name.path.endswith(f".{key}")]
        if self.settings.config is not None and rows not in [(n,) for n in lengths]:
            self.issues.append(
                f"{name.name}: {rows[0] if rows else 0} rows, trainable_token_indices lists {lengths or 'none'}"
            )

    def finish(self) -> None:
        """Raise what was found: the absence of any module, problems, a missing alpha, in this order."""
        self.warnings += self.overruled.values()
        if not self.adapted:
            raise MappingError(
                f"the file holds no LoRA module in peft's spelling ({len(self.names.names)} other tensors)",
                where=[self.content.path, *(name.name for name in self.names.names[:3])],
                hint="name the dialect with --from; 'lorabridge inspect' shows what the file holds",
            )
        if self.issues:
            raise MappingError(
                f"the adapter does not fit together in {counted(len(self.issues), 'place')}",
                where=[self.content.path, *self.issues] if self.content.path else self.issues,
                hint="check that adapter_config.json belongs to these tensors and that the file is complete",
            )
        if self.without_alpha:
            raise MappingError(
                f"alpha is not known for {counted(len(self.without_alpha), 'module')}",
                where=self.without_alpha,
                hint="pass --alpha, or give the adapter_config.json with --config",
            )


def _misfit(a: TensorSpec, b: TensorSpec, is_embedding: bool) -> str:
    """Say why two factors are no pair; empty where they are one."""
    if len(a.shape) != len(b.shape) or len(a.shape) not in ((2,) if is_embedding else _KINDS):
        return f"factors of shape {a.shape} and {b.shape} belong to no layer that peft adapts"
    rank, inner = a.shape[0], b.shape[1]
    if len(a.shape) == 2 and rank != inner:
        return f"lora_A has rank {rank}, lora_B has rank {inner}"
    if len(a.shape) > 2 and (inner == 0 or rank % inner or any(n != 1 for n in b.shape[2:])):
        return f"lora_A has rank {rank}, which lora_B of shape {b.shape} does not divide into groups"
    if b.shape[0] % (rank // inner):
        return f"{b.shape[0]} output channels do not divide into {rank // inner} groups"
    return ""

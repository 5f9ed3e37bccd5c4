"""The hub: what an adapter is, whatever file it came from.

Module paths are dotted paths of the network (``bert.encoder.layer.0.attention.self.query``), without any wrapper's
prefix. Factors are oriented as torch does: ``A[rank, in]``, ``B[out, rank]``, delta ``scaling * B @ A`` of shape
``[out, in]`` whatever the storage order of the base weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, Protocol

from ..axes import Expr
from ..tensors import TensorSpec

ModuleKind = Literal["linear", "embedding", "conv1d", "conv2d", "conv3d"]
Value = str | int | float | bool | None | list["Value"] | dict[str, "Value"]
Json = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Scaling:
    """The factor in front of ``B @ A``: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rank-stabilised LoRA.

    Sources: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA).
    """

    alpha: float
    rank: int
    rslora: bool = False

    @property
    def value(self) -> float:
        """The factor as the libraries compute it, in double precision; 0.0 for rank 0."""
        if self.rank == 0:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class Term:
    """One product ``b @ a`` that is added to the output rows [start, stop) of a module's weight.

    Shapes: ``a`` is ``[rank, in]`` (embedding: ``[rank, vocabulary]``; conv in peft's factorization:
    ``[rank, in, *kernel]``), ``b`` is ``[stop - start, rank]`` (conv: ``[out, rank / groups, 1, ...]``).
    A plain LoRA module is one term over all rows; loralib's MergedLinear and fused projections have several, on
    disjoint rows.
    """

    a: Expr
    b: Expr
    start: int
    stop: int

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class StackItem:
    """Where the weight of one expert lies: item ``number`` of the stored tensor ``parameter`` (its full name).

    The tensor's first axis counts the experts, ``count`` of them where it is known; it may be joined to the next axis.
    """

    parameter: str
    number: int
    count: int | None = None


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module.

    Experts whose weights one tensor holds are one module each: ``path`` is what names the item, by rule of the family
    table else the tensor's name and the number (``decoder.layers.3.mlp.experts.weight1.17``), and ``stack`` says where
    the weight lies. ``fan_in_fan_out``, ``out`` and the factors are those of the item's matrix.

    ``out``: length of the weight's output axis. ``weight``: the adapted parameter (``in_proj_weight`` for the fused
    input projection of nn.MultiheadAttention). ``fan_in_fan_out``: the base weight is stored ``[in, out]``; None when
    the file does not say. ``conv_form``: which factorization conv factors follow: "peft" (``a[r, in, *k]``,
    ``b[out, r, 1, ...]``) or "loralib" (``a[r*k, in*k]``, ``b[out/groups*k, r*k]``). ``magnitude``: DoRA, ``[out]``
    (conv: ``[1, out, 1, ...]``). ``lora_bias``: bias of the B projection, ``[out]``, scaled like the delta.
    """

    path: str
    kind: ModuleKind
    out: int
    terms: tuple[Term, ...]
    scaling: Scaling
    weight: str = "weight"
    fan_in_fan_out: bool | None = None
    magnitude: Expr | None = None
    lora_bias: Expr | None = None
    conv_form: Literal["peft", "loralib"] = "peft"
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    stack: StackItem | None = None

    @property
    def plain(self) -> bool:
        """One term over all rows: expressible by a single pair of factors."""
        return len(self.terms) == 1 and (self.terms[0].start, self.terms[0].stop) == (0, self.out)


ExtraKind = Literal["modules_to_save", "bias", "trainable_tokens", "base", "buffer", "delta"]


@dataclass(frozen=True, slots=True)
class Extra:
    """A tensor beside the factors, named ``path.parameter``; it replaces the base's parameter.

    "trainable_tokens" replaces the rows that the config's ``trainable_token_indices`` lists; "base" is a frozen
    weight that rides along in a full checkpoint. "delta" replaces nothing: it belongs to another algorithm than LoRA
    (see ``dialects.deltas``).
    """

    path: str
    parameter: str
    value: Expr
    kind: ExtraKind

    @property
    def name(self) -> str:
        """Full parameter name."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter


OWN_ALPHA = ("kohya", "diffusers", "mindone", "comfy", "bfl", "xlabs")
"""Dialects that define what alpha is where a file does not say: a stated alpha is one for the target."""

CARRIED = "its number is carried as the module's alpha"
"""Why a tensor is among those left out of an adapter although nothing of it is lost."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter, or a full model when ``modules`` is empty and every extra is "base".

    ``config``: peft's fields (``task_type``, ``base_model_name_or_path``, ``init_lora_weights`` ...), those that
    are resolved into ``modules`` included, so that a peft target can carry them. ``left_out``: (tensor name, reason)
    for what is recognised and not carried, such as optimizer state. ``warnings``: sentences for the report.
    ``merged``: the "base" weights of adapted modules already contain the delta; writing both needs a target that knows.
    """

    modules: tuple[LoraModule, ...]
    extras: tuple[Extra, ...] = ()
    config: Json = field(default_factory=dict)
    left_out: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    merged: bool = False


@dataclass(frozen=True, slots=True)
class Fact:
    """One statement about the modules whose path matches a glob: ``alpha``, ``rank`` ... = value."""

    pattern: str
    field: str
    value: Value


FACT_FIELDS = (
    "alpha", "rank", "use_rslora", "fan_in_fan_out", "enable_lora", "kernel_size", "groups", "conv_form", "kind",
    "merged", "out_features", "as", "names_of", "alpha_in", "non_linearity", "cell",
)  # fmt: skip
"""What can be stated about modules; each is an option of the command line."""

READ_FIELDS = ("value", "module", "split")
"""What is not stated but read, before a dialect parses: the number in a one-element tensor (the pattern is its name),
the module that a flattened name stands for (the pattern is that name), and of how many blocks on a diagonal a B is made
(see ``kohya_split``; the pattern is its name). No pattern is a glob."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file does not say about its adapter, from flags, then a sidecar; the first match wins."""

    entries: tuple[Fact, ...] = ()

    def read(self, name: str) -> Mapping[str, Value]:
        """Return the values of a field that was read (see ``READ_FIELDS``), by what they were read from."""
        return {entry.pattern: entry.value for entry in reversed(self.entries) if entry.field == name}

    def get(self, path: str, name: str) -> Value:
        """Return the value stated for a module, or None where nothing is."""
        for entry in self.entries:
            if entry.field == name and fnmatchcase(path, entry.pattern):
                return entry.value
        return None

    def then(self, other: Facts) -> Facts:
        """Add statements that count only where these say nothing."""
        return Facts(self.entries + other.entries)


@dataclass(frozen=True, slots=True)
class Content:
    """What a dialect reads: headers, never data."""

    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Json | None = None
    facts: Facts = Facts()
    path: str = ""


DIRECTORY, TITLE = "@DIRECTORY@", "@TITLE@"
"""Stand for the output directory's absolute path and for its name in ``Written.files``."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a dialect wants written: tensors in order, a config file's content if the dialect has one, and the facts
    about the written file that the file itself cannot say (keyed by the paths in that file).

    ``modules``: as they stand in the file, ranks and scalings included. ``files``: small text files for an output
    directory, by name; ``DIRECTORY`` in them stands for its absolute path and ``TITLE`` for its name, as JSON spells
    them.
    ``metadata``: pairs for a safetensors header.
    """

    tensors: Sequence[tuple[str, Expr]]
    config: Json | None = None
    facts: Facts = Facts()
    notes: tuple[str, ...] = ()
    modules: Sequence[LoraModule] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


class Dialect(Protocol):
    """Spell an adapter in one project's names and config."""

    @property
    def name(self) -> str:
        """Registry name."""
        ...

    @property
    def framework(self) -> Literal["torch", "mindspore"]:
        """The framework whose files the dialect is written in."""
        ...

    def detect(self, content: Content) -> str | None:
        """Return what gives this dialect away, one clause, or None. At most one dialect claims a file by itself."""
        ...

    def parse(self, content: Content) -> Adapter:
        """Resolve names, shapes, config and facts into an adapter; every tensor ends in modules, extras or left_out."""
        ...

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter; a MappingError names what this dialect cannot express and the cure.

        ``facts`` are the user's choices for the target (``rank``, ``alpha``, ``conv_form``, ``enable_lora``).
        """
        ...

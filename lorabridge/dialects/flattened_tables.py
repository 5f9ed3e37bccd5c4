"""The pipelines whose modules sd-scripts flattens, and the modules of their tables by flattened and by real name.

Sources: sd-scripts of 2026-02, LyCORIS 4.1.3, ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from ..errors import UsageError
from ..names import Template
from ..sizes import ANY, SizeError

if TYPE_CHECKING:
    from ..families.rules import Slot

SideName = Literal["hf", "ms"]
Axes = tuple[int | None, ...] | None
"""(output, input, *kernel) of a module's weight as far as its factors show them; None where they do not."""


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a pipeline: the prefix of its flattened names, its name in diffusers, its family table."""

    prefix: str
    component: str
    table: str


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline whose tables ship. ``written``: the side of the first part's table whose names sd-scripts flattens.

    ``version``: what sd-scripts writes as ``ss_base_model_version``, "" where that is not known.
    """

    name: str
    parts: tuple[Part, ...]
    written: SideName
    version: str


def _sd3(table: str) -> tuple[Part, ...]:
    return (
        Part("lora_unet_", "transformer", table),
        Part("lora_te1_", "text_encoder", "clip_text"),
        Part("lora_te2_", "text_encoder_2", "clip_text"),
        Part("lora_te3_", "text_encoder_3", "t5_encoder"),
    )


_SDXL = (
    Part("lora_unet_", "unet", "sdxl"),
    Part("lora_te1_", "text_encoder", "clip_text"),
    Part("lora_te2_", "text_encoder_2", "clip_text"),
)
_FLUX = (
    Part("lora_unet_", "transformer", "flux"),
    Part("lora_te1_", "text_encoder", "clip_text"),
    Part("lora_te3_", "text_encoder_2", "t5_encoder"),
)
_SD15, _SD21 = (
    (Part("lora_unet_", "unet", table), Part("lora_te_", "text_encoder", "clip_text")) for table in ("sd15", "sd21")
)
PIPELINES = (
    Pipeline("sd15", _SD15, "hf", "sd_v1"),
    Pipeline("sd21", _SD21, "hf", "sd_v2"),
    Pipeline("sdxl", _SDXL, "ms", "sdxl_base_v1-0"),
    Pipeline("sd3", _sd3("sd3"), "ms", ""),
    Pipeline("sd35_medium", _sd3("sd35_medium"), "ms", ""),
    Pipeline("sd35_large", _sd3("sd35_large"), "ms", ""),
    Pipeline("flux", _FLUX, "ms", "flux1"),
    Pipeline("hunyuan_video", (Part("lora_unet_", "transformer", "hunyuan_video"),), "ms", ""),
    Pipeline("wan", (Part("lora_unet_", "transformer", "wan"),), "ms", ""),
)
DOTTED = {
    "lora_unet_": "diffusion_model.",
    "lora_te_": "text_encoders.clip_l.transformer.",
    "lora_te1_": "text_encoders.clip_l.transformer.",
    "lora_te2_": "text_encoders.clip_g.transformer.",
    "lora_te3_": "text_encoders.t5xxl.transformer.",
}
"""What ComfyUI puts before a part's own names, which keep their dots, instead of each prefix."""
PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_")
"""How flattened names begin: sd-scripts of 2026-02, and LyCORIS 4.1.3 for networks of any kind."""
COMPONENTS = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),
    "text_encoder_3": ("lora_te3_",),
}
"""The prefixes under which a component's modules can stand; Flux' second text encoder is sd-scripts' third."""


def pipeline_named(name: str) -> Pipeline:
    """Return a pipeline; UsageError for a name that is none and no path of files."""
    for pipeline in PIPELINES:
        if pipeline.name == name:
            return pipeline
    known = ", ".join(pipeline.name for pipeline in PIPELINES)
    raise UsageError(
        f"{name!r} is no model whose names are known", hint=f"give --names-of one of {known}, or the path of a model"
    )


def flatten(path: str) -> str:
    """Return a module's path with underscores for dots."""
    return path.replace(".", "_")


def prefix_of(name: str) -> str:
    """Return how a flattened name begins; "" where it is none."""
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


@dataclass(frozen=True, slots=True)
class Entry:
    """One module template of one side of a table, flattened and as it is."""

    flat: Template
    slot: Slot
    side: SideName

    @property
    def kernel(self) -> tuple[int, ...]:
        """The weight's kernel, () for a linear layer."""
        return tuple(axis.value({}) for axis in self.slot.rule.axes)

    @property
    def shared(self) -> bool:
        """The rule has several parts: one naming holds in one module, or in another order, what the other has."""
        return len(self.slot.rule.parts) > 1

    def fits(self, axes: Axes) -> bool:
        """Compare the axes of factors with those that the table knows without a config.

        A kernel of ones may be missing on either side; a flattened input (None) may hide any.
        """
        if axes is None:
            return True
        known, given = self.axes(), tuple(axes)
        kernels = self.kernel, tuple(n for n in given[2:] if n is not None)
        if given[1] is not None and kernels[0] != kernels[1] and {*kernels[0], *kernels[1]} != {1}:
            return False
        return known is None or all(k in (ANY, a) or a is None for k, a in zip(known, given[:2], strict=True))

    def axes(self) -> tuple[int, int] | None:
        """Return the weight's output and input lengths; None where they depend on a config."""
        from ..families.models import slot_shape

        try:
            out, inner, *_ = slot_shape(replace(self.slot, field="weight"), self.side, {})
        except SizeError:
            return None
        return out, inner


@lru_cache(maxsize=16)
def entries(table: str) -> tuple[Entry, ...]:
    """Return the modules with weights that LoRA adapts, of both sides of a shipped table."""
    from ..families.rules import slots
    from ..families.tables import load_family

    loaded = load_family(table)
    sides: tuple[SideName, SideName] = ("hf", "ms")
    return tuple(
        Entry(Template.parse(flatten(slot.template.text)), slot, side)
        for side in sides
        for slot in slots(loaded, side)
        if slot.field == "module" and slot.rule.kind in ("linear", "conv")
    )


def counterpart(table: str, entry: Entry, side: SideName) -> Entry:
    """Return the same module on another side, for a rule that has one on each."""
    return next(e for e in entries(table) if e.side == side and e.slot.rule is entry.slot.rule)


def meant(table: str, entry: Entry) -> tuple[Template, ...]:
    """Return diffusers' modules that one module of the original code is, or the module itself."""
    if entry.side == "hf":
        return (entry.slot.template,)
    return tuple(e.slot.template for e in entries(table) if e.side == "hf" and e.slot.rule is entry.slot.rule)

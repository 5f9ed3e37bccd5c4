"""LoRA in the names of a diffusion model's original code: ComfyUI, Black Forest Labs, XLabs.

| dialect | names, for Flux' first block | alpha |
|---|---|---|
| ``comfy`` | ``diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight`` or ``.lora_A.weight`` | as in kohya |
| ``bfl`` | ``double_blocks.0.img_attn.qkv.lora_A.weight``, ``.lora_B.weight``, ``.lora_B.bias``; norms | none: rank |
| ``xlabs`` | ``double_blocks.0.processor.qkv_lora1.down.weight``, ``.up.weight`` | none: rank |

The original code fuses query, key and value, and Flux' single blocks the MLP's first layer with them; a family table
takes them apart. ``comfy`` also has text encoders (``text_encoders.clip_l.transformer.``), sd-scripts' names beside its
own, LyCORIS' tensors, ``dora_scale``, and ``diff_b``, which is added to a bias as it is. XLabs' processors adapt Flux'
attention only; that of a single block the first three parts of ``linear1``. Sources: ComfyUI (``comfy/lora.py``),
diffusers 0.42.1 (``loaders/lora_conversion_utils.py``), which reads all three for Flux, and ``comfy`` for Wan and
HunyuanVideo, there without alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..axes import Expr, read, scale
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from . import flattened, flattened_tables, kohya_write, lycoris, originals_write
from .adapter import CARRIED, Adapter, Content, Facts, LoraModule, Written
from .flattened import Place
from .kohya import UpdateReader, refuse_twins, stated
from .pairs import Problems, in_mindspore

COMFY = flattened_tables.DOTTED["lora_unet_"]
PREFIXES = (COMFY, "model.diffusion_model.", "base_model.model.", "transformer.")
"""What stands before the original names: ComfyUI's, whole checkpoints', peft's around the original code, and some's."""
TENSORS = {
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight", "lora_B.bias": "bias", "diff_b": "diff_b",
    **{name: name for name in sorted(lycoris.KNOWN - {"weight", "diff_b"})},
}  # fmt: skip
"""How a tensor's name ends, and what LyCORIS calls it; "bias" is that of B, scaled with it."""
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.qkv_lora2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj_lora1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.proj_lora2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.qkv_lora": "single_blocks.{}.linear1",
    "single_blocks.{}.processor.proj_lora": "single_blocks.{}.linear2",
}
"""XLabs' processors, and the module of the original code that each adapts."""
_PROCESSOR = re.compile(r"^((?:double|single)_blocks)\.(\d+)\.(processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight$")
_ORIGINAL = re.compile(r"^((double|single|joint)_blocks\.\d+\.|blocks\.\d+\.(self|cross)_attn\.(q|k|v|o)$)")
_NORM = re.compile(r"\.(?:query_norm|key_norm)\.scale$")


@dataclass(frozen=True, slots=True)
class Originals:
    """Read all of the three; ``name`` says which one is claimed and written: "comfy", "bfl" or "xlabs"."""

    name: str
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim a file by the names of one of the three."""
        if in_mindspore(content):
            return None
        found = next((name for name in content.specs if _style(name) == self.name), None)
        return f"tensor {found} is named as in the original code" if found else None

    def parse(self, content: Content) -> Adapter:
        """Find every module and split what the original code fuses; paths are diffusers', the component before them.

        MappingError: names of no known model, half pairs, shapes that do not fit, changes of biases and norms by
        themselves, and what the dialect ``kohya`` refuses.
        """
        groups, wholes = _groups(content)
        places, pipelines = _places(groups, content)
        reader = UpdateReader(content, content.facts.read("value"))
        modules = [_module(reader, name, specs, places[name]) for name, specs in groups.items()]
        reader.problems.raise_any(content.path)
        made = [module for module in modules if module is not None]
        made = kohya_write.split(made, {place.path: place.fused for place in places.values() if place.fused})
        extras = originals_write.through_extras(wholes, pipelines[:1], to="hf")
        alphas = tuple((s.name, CARRIED) for specs in groups.values() for n, s in specs.items() if n == "alpha")
        refuse_twins(made)
        made.sort(key=lambda module: module.path)
        return Adapter(tuple(made), extras, left_out=alphas, warnings=tuple(reader.warnings))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter; see :func:`lorabridge.dialects.originals_write.write`."""
        return originals_write.write(adapter, facts, self.name)


def dotted_modules(specs: Iterable[str]) -> list[str]:
    """Return the modules of a file that ComfyUI's names show, as a base model's files can have them."""
    split = (_split(name) for name in specs if name.startswith(COMFY))
    return [module for module, tensor in split if tensor not in ("", "whole")]


def _places(
    groups: Mapping[str, Mapping[str, TensorSpec]], content: Content
) -> tuple[dict[str, Place], tuple[str, ...]]:
    """Return what every name stands for, and the pipelines whose it is: as the base's files said, or the tables."""
    known = content.facts.read("module")
    if known and all(name in known for name in groups):
        return {name: stated(known[name]) for name in groups}, ()
    only = content.facts.get("*", "names_of")
    axes = {name: _axes(name, specs) for name, specs in groups.items()}
    return flattened.resolve(axes, only if isinstance(only, str) else None, content.path)


def _style(name: str) -> str:
    """Return which dialect's a tensor's name is; "" for none."""
    bare = name.removeprefix(COMFY)
    if _PROCESSOR.match(bare):
        return "xlabs"
    module, tensor = _split(bare)
    if not tensor or tensor == "whole":
        return ""
    if bare != name or name.startswith("text_encoders."):
        return "comfy"
    return "bfl" if _ORIGINAL.match(module) else ""


def _split(name: str) -> tuple[str, str]:
    """Return (module, LyCORIS' name of the tensor); "whole" for a norm, "" for what is nothing of an adapter."""
    for end, tensor in TENSORS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), tensor
    return name, "whole" if _NORM.search(name) else ""


def _groups(content: Content) -> tuple[dict[str, dict[str, TensorSpec]], dict[str, TensorSpec]]:
    """Sort the tensors by module, named as in ``comfy``; and whole norms, named as in the original code."""
    groups: dict[str, dict[str, TensorSpec]] = {}
    wholes: dict[str, TensorSpec] = {}
    strange = []
    for name, spec in content.specs.items():
        if match := _PROCESSOR.match(name.removeprefix(COMFY)):
            known = XLABS.get(f"{match[1]}.{{}}.{match[3]}")
            module, tensor = (known or "").format(match[2]), f"lora_{match[4]}.weight" if known else ""
        else:
            module, tensor = _split(name)
        prefix = next((prefix for prefix in PREFIXES if module.startswith(prefix)), "")
        if tensor == "whole":
            wholes[module.removeprefix(prefix)] = spec
        elif tensor:
            flat = flattened_tables.prefix_of(module) or module.startswith("text_encoders.")
            groups.setdefault(module if flat else COMFY + module.removeprefix(prefix), {})[tensor] = spec
        else:
            strange.append(name)
    if strange or not groups:
        raise MappingError(
            f"{counted(len(strange), 'tensor')} is nothing of a LoRA in the original code's names"
            if groups
            else "the file holds no module in the original code's names",
            where=[*strange, f"in {content.path}"],
            hint="remove them, or name the dialect of the file with --from",
        )
    return groups, wholes


def _axes(name: str, specs: Mapping[str, TensorSpec]) -> flattened_tables.Axes:
    axes = lycoris.axes_of(specs)
    return (None, *axes[1:]) if axes is not None and _partial(name, specs) else axes


def _partial(name: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Say whether factors adapt only the attention's parts of a layer that holds the MLP's as well."""
    up = specs.get("lora_up.weight")
    return bool(up and name.endswith(".linear1") and _PROCESSOR.match(up.name.removeprefix(COMFY)))


def _module(reader: UpdateReader, name: str, specs: Mapping[str, TensorSpec], place: Place) -> LoraModule | None:
    """Read one module with its biases."""
    factors = {tensor: spec for tensor, spec in specs.items() if tensor not in ("bias", "diff_b")}
    if not lycoris.kind_of(factors) and len(factors) < len(specs):
        what = "a change of a bias without factors"
        reader.problems.add(what, name, "merge it into the base with ComfyUI first")
        return None
    module = reader.module(name, factors, place)
    if module is None:
        return None
    if _partial(name, specs):
        rows = module.out  # query, key and value; the MLP's part is four times as long as one of them
        module = replace(module, out=rows // 3 * 7)
    bias = _bias(reader.problems, name, specs, module)
    return module if bias is None else replace(module, lora_bias=bias)


def _bias(problems: Problems, name: str, specs: Mapping[str, TensorSpec], module: LoraModule) -> Expr | None:
    """Return the bias of B: as it is, or a change of the layer's bias divided by the scaling that B's is given."""
    spec = specs.get("bias") or specs.get("diff_b")
    if spec is None:
        return None
    if spec.shape != (module.out,):
        problems.add("a bias has another length than B", f"{spec.name}: {list(spec.shape)}", "check the file")
        return None
    value = read(spec)
    factor = module.scaling.value
    if spec is specs.get("bias") or factor == 1.0:
        return value
    if not factor:
        problems.add("a change of a bias beside an alpha of 0", name, "merge it into the base with ComfyUI first")
        return None
    return scale(value, 1.0 / factor, value.dtype)


COMFYUI, BFL, XLABS_FLUX = Originals("comfy"), Originals("bfl"), Originals("xlabs")

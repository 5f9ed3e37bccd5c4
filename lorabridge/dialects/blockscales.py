"""float8 weights with a scale for every block, as DeepSeek-V3 and Qwen3-FP8 publish them: ``X`` and ``X_scale_inv``.

``X`` is float8_e4m3fn ``[out, in]``, ``X_scale_inv`` a float ``[ceil(out / m), ceil(in / n)]``; ``weight_block_size``
of config.json's ``quantization_config`` is ``[m, n]``, [128, 128] where it is not said. The weight that is meant is
their product. DeepSeek's fp8_cast_bf16.py and MindFormers' conversion scripts (``weight_dequant``, 1.5 and later) make
it in float32 and round that to bfloat16; so does :func:`dequantized`, on every machine with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..axes import Compute, Expr
from ..dtypes import BY_NAME, DType
from ..errors import MappingError, counted
from .adapter import Adapter, Extra

SUFFIX = "_scale_inv"
KERNEL = "dequantize"
_BLOCK = (128, 128)
CURE = "widen them first: lorabridge convert SRC DST --dequantize"


def scaled(adapter: Adapter) -> dict[str, str]:
    """Return the float8 parameters that have block scales, with the scales' names."""
    names = {extra.name: extra for extra in adapter.extras}
    pairs = ((name, name.removesuffix(SUFFIX)) for name in names if name.endswith(SUFFIX))
    return {weight: name for name, weight in pairs if weight in names and _is_float8(names[weight].value)}


def refuse_scaled(adapter: Adapter, what: str) -> None:
    """Raise MappingError where weights are float8 with block scales; ``what`` could be done to them by themselves."""
    if found := scaled(adapter):
        raise MappingError(
            f"{counted(len(found), 'weight')} in float8 with block scales cannot {what}",
            where=[f"{weight}, times {name}" for weight, name in found.items()],
            hint=CURE,
        )


def dequantized(adapter: Adapter, config: Mapping[str, object] | None, dtype: DType | None) -> Adapter:
    """Put the products in the place of weights and scales; ``dtype``: bfloat16 where there is none.

    Raises MappingError where there is nothing to widen, and for scales that do not fit their weight.
    """
    found = scaled(adapter)
    if not found:
        raise MappingError(
            "there are no float8 weights with block scales to widen", where=f"no *{SUFFIX} beside a float8 parameter",
            hint="leave out --dequantize",
        )  # fmt: skip
    block = _block(config)
    scales = {extra.name: extra for extra in adapter.extras if extra.name in set(found.values())}
    wrong: list[str] = []
    extras = []
    for extra in adapter.extras:
        if extra.name in found:
            extras.append(_product(extra, scales[found[extra.name]].value, block, dtype or BY_NAME["bfloat16"], wrong))
        elif extra.name not in scales:
            extras.append(extra)
    if wrong:
        raise MappingError(
            "block scales do not fit their weights", where=wrong,
            hint="give the model's config.json with --config: its quantization_config names the blocks",
        )  # fmt: skip
    return replace(adapter, extras=tuple(extras))


def _product(extra: Extra, scales: Expr, block: tuple[int, int], dtype: DType, wrong: list[str]) -> Extra:
    shape = extra.value.shape
    wanted = tuple(-(-length // size) for length, size in zip(shape, block, strict=False))
    if len(shape) != 2 or scales.shape != wanted or scales.dtype.kind != "float":
        said = " x ".join(map(str, block))
        wrong.append(f"{extra.name}: {list(shape)} in blocks of {said}, scales {scales.dtype} {list(scales.shape)}")
        return extra
    params = (("rows", block[0]), ("columns", block[1]))
    return replace(extra, value=Compute(KERNEL, (extra.value, scales), params, "", dtype, shape))


def _block(config: Mapping[str, object] | None) -> tuple[int, int]:
    said = (config or {}).get("quantization_config")
    size = said.get("weight_block_size") if isinstance(said, Mapping) else None
    if size is None:
        return _BLOCK
    if isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return (size[0], size[1])
    raise MappingError(
        "the config's weight_block_size is not two numbers", where=str(size)[:40], hint="give the model's config.json"
    )


def _is_float8(value: Expr) -> bool:
    return value.dtype.name == "float8_e4m3fn"

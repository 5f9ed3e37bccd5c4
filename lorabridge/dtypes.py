"""The element types of every container, with the name each container gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["bool", "int", "uint", "float", "complex", "text", "opaque"]


@dataclass(frozen=True, slots=True)
class DType:
    """Name one element type.

    ``bits`` is the storage width of one element. A container's name for the type is ``None`` where the container
    cannot hold it. ``numpy`` names the dtype used for arithmetic (``ml_dtypes`` supplies those numpy lacks).
    """

    name: str
    bits: int
    kind: Kind
    safetensors: str | None = None
    torch: str | None = None
    mindspore: str | None = None
    numpy: str | None = None

    @property
    def itemsize(self) -> int:
        """Bytes per element; types narrower than a byte have none and raise ValueError."""
        if self.bits % 8:
            raise ValueError(f"{self.name} has {self.bits} bits per element, not whole bytes")
        return self.bits // 8

    def carrier(self) -> np.dtype[np.generic]:
        """Return the numpy dtype whose bits carry this type unchanged (unsigned, or void for 16 bytes)."""
        import numpy as np

        if self.bits % 8:
            return np.dtype(np.uint8)
        return np.dtype({1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}.get(self.itemsize, f"V{self.itemsize}"))

    def values(self) -> np.dtype[np.generic]:
        """Return the numpy dtype of the values (from ``ml_dtypes`` where numpy has none); ValueError without one."""
        import numpy as np

        if self.numpy is None:
            raise ValueError(f"numpy cannot compute with {self.name}")
        if hasattr(np, self.numpy) or self.numpy == "bool":
            return np.dtype(self.numpy)
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, self.numpy))

    def __str__(self) -> str:
        return self.name


# Names: safetensors 0.8 (tensor.rs Dtype), torch 2.13 (torch.<name>), MindSpore 2.10 (tensor_type in checkpoint.proto).
DTYPES: tuple[DType, ...] = (
    DType("bool", 8, "bool", "BOOL", "bool", "Bool", "bool"),
    DType("uint8", 8, "uint", "U8", "uint8", "UInt8", "uint8"),
    DType("int8", 8, "int", "I8", "int8", "Int8", "int8"),
    DType("int16", 16, "int", "I16", "int16", "Int16", "int16"),
    DType("uint16", 16, "uint", "U16", "uint16", "UInt16", "uint16"),
    DType("int32", 32, "int", "I32", "int32", "Int32", "int32"),
    DType("uint32", 32, "uint", "U32", "uint32", "UInt32", "uint32"),
    DType("int64", 64, "int", "I64", "int64", "Int64", "int64"),
    DType("uint64", 64, "uint", "U64", "uint64", "UInt64", "uint64"),
    DType("float16", 16, "float", "F16", "float16", "Float16", "float16"),
    DType("bfloat16", 16, "float", "BF16", "bfloat16", "BFloat16", "bfloat16"),
    DType("float32", 32, "float", "F32", "float32", "Float32", "float32"),
    DType("float64", 64, "float", "F64", "float64", "Float64", "float64"),
    DType("complex32", 32, "complex", None, "complex32", None, None),
    DType("complex64", 64, "complex", "C64", "complex64", "Complex64", "complex64"),
    DType("complex128", 128, "complex", None, "complex128", "Complex128", "complex128"),
    DType("float8_e4m3fn", 8, "float", "F8_E4M3", "float8_e4m3fn", "Float8E4M3FN", "float8_e4m3fn"),
    DType("float8_e5m2", 8, "float", "F8_E5M2", "float8_e5m2", "Float8E5M2", "float8_e5m2"),
    DType("float8_e4m3fnuz", 8, "float", "F8_E4M3FNUZ", "float8_e4m3fnuz", None, "float8_e4m3fnuz"),
    DType("float8_e5m2fnuz", 8, "float", "F8_E5M2FNUZ", "float8_e5m2fnuz", None, "float8_e5m2fnuz"),
    DType("float8_e8m0fnu", 8, "float", "F8_E8M0", "float8_e8m0fnu", None, "float8_e8m0fnu"),
    DType("hifloat8", 8, "opaque", None, None, "HiFloat8", None),
    DType("int4", 8, "int", None, None, "Int4", None),
    DType("float4_e2m1fn_x2", 8, "opaque", None, "float4_e2m1fn_x2", None, None),
    DType("float4", 4, "opaque", "F4", None, None, None),
    DType("float6_e2m3", 6, "opaque", "F6_E2M3", None, None, None),
    DType("float6_e3m2", 6, "opaque", "F6_E3M2", None, None, None),
    DType("text", 32, "text", None, None, "str", None),
)

BY_NAME = {d.name: d for d in DTYPES}
BY_SAFETENSORS = {d.safetensors: d for d in DTYPES if d.safetensors}
BY_TORCH = {d.torch: d for d in DTYPES if d.torch}
BY_MINDSPORE = {d.mindspore: d for d in DTYPES if d.mindspore}

ALIASES = {
    "fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16",
    "bf16": "bfloat16", "fp64": "float64", "f64": "float64", "float": "float32", "double": "float64",
}  # fmt: skip

_LOSSLESS: dict[str, frozenset[str]] = {
    "float16": frozenset({"float32", "float64"}),
    "bfloat16": frozenset({"float32", "float64"}),
    "float32": frozenset({"float64"}),
    "float8_e4m3fn": frozenset({"float16", "bfloat16", "float32", "float64"}),
    "float8_e5m2": frozenset({"float16", "bfloat16", "float32", "float64"}),
}


def lossless(source: DType, target: DType) -> bool:
    """Say whether every finite value of ``source`` is a value of ``target``."""
    return source == target or target.name in _LOSSLESS.get(source.name, frozenset())

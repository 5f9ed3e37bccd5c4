"""What a torch pickle's names and calls stand for: literal tables and small inert values.

Source: torch 2.13, ``torch/_utils.py`` (the rebuild functions), ``torch/_tensor.py`` (which of them a tensor calls),
``torch/storage.py`` (the storage classes), ``torch/_weights_only_unpickler.py`` (what it allows by default).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..dtypes import BY_TORCH

MAX_AXES = 64
"""Axes that torch can give a tensor."""

STORAGES: dict[str, str] = {
    "torch.BoolStorage": "bool", "torch.ByteStorage": "uint8", "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16", "torch.IntStorage": "int32", "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16", "torch.BFloat16Storage": "bfloat16", "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64", "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8", "torch.UntypedStorage": "uint8",
    "torch.QInt8Storage": "qint8", "torch.QUInt8Storage": "quint8", "torch.QInt32Storage": "qint32",
    "torch.QUInt4x2Storage": "quint4x2", "torch.QUInt2x4Storage": "quint2x4",
}  # fmt: skip
"""Storage classes and the element type each one's length counts."""

STORAGE_OF = {dtype: path for path, dtype in reversed(STORAGES.items()) if "Untyped" not in path}

_OTHER_DTYPES = (
    "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16",
    *(f"{sign}{bits}" for sign in ("int", "uint") for bits in range(1, 8)),
)  # fmt: skip

_REFUSED = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no data",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device that torch pickles through numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device without storages",
}
_TENSOR_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}

_INERT = {
    "_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.frozenset", "builtins.set", "builtins.slice",
    "argparse.Namespace", "collections.Counter", "collections.defaultdict", "datetime.datetime", "datetime.timedelta",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy.dtype", "numpy.ndarray", "pathlib.PosixPath", "pathlib.WindowsPath",
    "torch.device", "torch.serialization._get_layout",
}  # fmt: skip
"""Callables that checkpoints use for what is no tensor; their results become :class:`Opaque`."""

_NAMES = {
    "builtins.bool", "builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str",
    "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine",
    "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams",
}  # fmt: skip
"""Names that may be mentioned but not called."""

_CALLABLE = (
    {"collections.OrderedDict", "torch.Size", "torch._tensor._rebuild_from_type_v2"}
    | {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
    | {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
)

GLOBALS = (
    _CALLABLE | _INERT | _NAMES | _TENSOR_TYPES | set(_REFUSED) | set(STORAGES)
    | {f"torch.{name}" for name in (*BY_TORCH, *_OTHER_DTYPES)}
)  # fmt: skip


class PickleError(ValueError):
    """Say in one clause why a pickle is not read."""


@dataclass(slots=True, eq=False)
class Table:
    """A dict or OrderedDict: its pairs in order, repeated keys included."""

    items: list[tuple[object, object]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """An allowed global name, never resolved."""

    path: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A storage: the record ``data/<key>`` with ``numel`` elements of torch's ``dtype``."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A strided view of a storage; offset and strides count elements of torch's ``dtype``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """A tensor of a kind that is not read; ``reason`` is a noun phrase."""

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Opaque:
    """Something else, of which only the name of its kind is kept."""

    what: str


@dataclass(slots=True, eq=False)
class Object:
    """An instance of a class that the reader asked for by name: what it was called with, and its state."""

    path: str
    arguments: tuple[object, ...]
    state: object = None


def is_count(value: object) -> bool:
    """Say whether a value is an integer (no truth value) that a size, stride or offset can have."""
    return type(value) is int and 0 <= value < 2**63


def _counts(value: object) -> tuple[int, ...] | None:
    """Return a tuple of sizes or strides, or None where the value is something else."""
    if not isinstance(value, tuple) or len(value) > MAX_AXES or not all(map(is_count, value)):
        return None
    return value


def call(path: str, arguments: tuple[object, ...]) -> object:
    """Describe what an allowed callable would return."""
    match path.rpartition(".")[2], arguments:
        case _ if path in _REFUSED:
            return Refused(_REFUSED[path])
        case _ if path in _INERT:
            return Opaque(path)
        case "OrderedDict", ():
            return Table()
        case "Size", (tuple() as sizes,) if _counts(sizes) is not None:
            return sizes
        case "_rebuild_tensor_v2", (Storage() as storage, offset, shape, stride, bool(), Table() | None, *rest):
            return _tensor(storage, storage.dtype, offset, shape, stride, rest)
        case "_rebuild_tensor_v3", (
            Storage() as storage, offset, shape, stride, bool(), Table() | None, Global(dtype), *rest,
        ) if dtype.startswith("torch."):  # fmt: skip
            return _tensor(storage, dtype.removeprefix("torch."), offset, shape, stride, rest)
        case "_rebuild_parameter", (Tensor() | Refused() as data, bool(), Table() | None):
            return data
        case "_rebuild_parameter_with_state", (Tensor() | Refused() as data, bool(), Table() | None, _):
            return data
        case "_rebuild_from_type_v2", (Global(function), Global(subtype), tuple() as inner, _) if function.startswith(
            "torch._utils._rebuild_"
        ):
            return call(function, inner) if subtype in _TENSOR_TYPES else Refused("a tensor subclass")
    raise PickleError(f"it calls {path} with unexpected arguments")


def _tensor(
    storage: Storage, dtype: str, offset: object, shape: object, stride: object, rest: list[object]
) -> Tensor | Refused:
    sizes, strides = _counts(shape), _counts(stride)
    if not isinstance(offset, int) or not is_count(offset) or sizes is None or strides is None or len(rest) > 1:
        raise PickleError("it rebuilds a tensor with an offset, shape or stride that cannot be")
    if len(sizes) != len(strides):
        raise PickleError(f"it rebuilds a tensor of {len(sizes)} dimensions with {len(strides)} strides")
    if rest and rest[0] is not None and not (isinstance(rest[0], Table) and not rest[0].items):
        return Refused("a conjugated or negated view whose bits are not its values")
    if dtype not in BY_TORCH:
        return Refused(f"a tensor of the element type {dtype}")
    return Tensor(storage, dtype, offset, sizes, strides)


def kind(value: object) -> str:
    """Return what a value is, as a noun phrase with its article."""
    match value:
        case Table(items):
            return f"a mapping of {len(items)} entries"
        case Tensor():
            return "a tensor"
        case Refused(reason):
            return reason
        case Storage():
            return "a bare storage"
        case Global(path):
            return f"the name {path}"
        case Opaque(what) | Object(what):
            return f"an object of {what}"
        case list() | tuple():
            return f"a {type(value).__name__} of {len(value)} values"
        case None:
            return "None"
    names = {bool: "a truth value", int: "an integer", float: "a number", str: "a string", bytes: "bytes"}
    return names.get(type(value), "an object")

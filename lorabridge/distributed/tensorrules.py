"""How the parts that tensor-parallel ranks hold make up a tensor: by what the checkpoint says, or by known names.

Sources: megatron-core 0.16.1 (tensor_parallel/layers.py), whose files do not say how a tensor was cut, so that its
layers' names do; deepspeed 0.19.8 (checkpoint/ds_to_universal.py, affine.py), whose ``universal_checkpoint_info`` says
it by patterns of names and, for every parameter of AutoTP, by the boxes that each rank holds. The boxes outrank the
patterns. No pattern is run that could take long: what is more than letters, digits and few repetitions is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..formats.torchvalues import Object, Table, is_count
from ..formats.untrusted import shown
from .grid import Box

Shape = tuple[int, ...]
_PLAIN = r"(?:\\[^A-Za-z0-9]|[\w\s/:<>=!@#%&,;~\"'-])"
_REPEATED = re.compile(rf"\^?(?:{_PLAIN}|(?:\.|\\d|\\w|\[[\w.\\-]{{1,64}}\])[*+]?)*\$?")
_LITERAL = re.compile(rf"\^{_PLAIN}*\$")
MAX_REPEATED = 3
"""Repetitions in one pattern."""

COLUMN = re.compile(
    r"(?:.*\.)?(?:word_embeddings|output_layer|linear_qkv|linear_fc1|linear_q_proj|linear_q_up_proj|linear_kv_up_proj"
    r"|linear_q|linear_kv|query_key_value|query|key_value|dense_h_to_4h|word_embeddings_for_head|lm_head)"
    r"\.(?:weight|bias)\d*"
)
ROW = re.compile(r"(?:.*\.)?(?:linear_proj|linear_fc2|dense|dense_4h_to_h)\.weight\d*")
WHOLE = re.compile(
    r".*norm\d*\.(?:weight|bias)|.*\.layer_norm_(?:weight|bias)|.*position_embeddings\.weight"
    r"|.*tokentype_embeddings\.weight|.*\.router\.(?:weight|bias|expert_bias)|.*(?:inv_freq|gate_weight)"
    r"|(?:.*\.)?(?:linear_proj|linear_fc2|dense|dense_4h_to_h)\.bias\d*|.*\.linear_(?:q|kv)_down_proj\.weight"
)
_PAIRS = (("linear_fc1", "linear_fc2"), ("dense_h_to_4h", "dense_4h_to_h"))
NO_RULE = "no rule says how tensor parallelism cut it"


def named_axis(name: str, axes: int) -> int | None:
    """Return the axis along which Megatron cuts a parameter of that name; None where every rank holds the whole.

    ValueError for a name that no rule knows.
    """
    if COLUMN.fullmatch(name):
        return 0
    if ROW.fullmatch(name) and axes == 2:
        return 1
    if WHOLE.fullmatch(name):
        return None
    raise ValueError(NO_RULE)


def gated(name: str, rows: int, columns_of: Callable[[str], int | None]) -> bool:
    """Say whether a first layer holds gate and up rows: it has twice as many as the second has columns.

    ``rows``: of the rank's part; ``columns_of``: of the part of another parameter, None where it is not there.
    """
    for first, second in _PAIRS:
        if f"{first}." not in name:
            continue
        twin = re.sub(r"\.bias(\d*)$", r".weight\1", name.replace(f"{first}.", f"{second}."))
        columns = columns_of(twin)
        if columns is None:
            raise ValueError(f"{shown(twin)} is not beside it, which tells whether it is gated")
        if rows not in (columns, 2 * columns):
            raise ValueError(f"it has {rows} rows a rank, and the second layer {columns} columns")
        return rows == 2 * columns
    return False


@dataclass(frozen=True, slots=True)
class Block:
    """A box of the tensor, and the box of a tensor rank's part that holds it."""

    rank: int
    inside: Box
    at: Box


@dataclass(frozen=True, slots=True)
class Blocks:
    """How parts make up a tensor of ``shape``. ``rows``: how many of its rows are no padding."""

    shape: Shape
    blocks: tuple[Block, ...]
    rows: int | None = None


def whole(shapes: Sequence[Shape]) -> Blocks:
    """Every rank holds all of it."""
    if len(set(shapes)) > 1:
        raise ValueError(f"the ranks hold shapes {', '.join(str(list(shape)) for shape in dict.fromkeys(shapes))}")
    box = ((0,) * len(shapes[0]), shapes[0])
    return Blocks(shapes[0], tuple(Block(rank, box, box) for rank in range(len(shapes))))


def along(shapes: Sequence[Shape], axis: int, widths: Sequence[Sequence[int]] | None = None) -> Blocks:
    """Join parts along an axis. ``widths``: of every sub-tensor, the length that each rank holds of it."""
    others = {shape[:axis] + shape[axis + 1 :] for shape in shapes if len(shape) > axis}
    if len(others) != 1 or len({len(shape) for shape in shapes}) != 1:
        raise ValueError(f"parts of shapes {', '.join(map(str, shapes))} cannot be joined along axis {axis}")
    widths = widths if widths is not None else [[shape[axis] for shape in shapes]]
    if any(len(held) != len(shapes) for held in widths) or any(
        sum(held[rank] for held in widths) != shape[axis] for rank, shape in enumerate(shapes)
    ):
        raise ValueError("the widths that are said of its parts are not those of the parts")
    blocks, at, inside = [], 0, [0] * len(shapes)
    for held in widths:
        for rank, (shape, width) in enumerate(zip(shapes, held, strict=True)):
            size = (*shape[:axis], width, *shape[axis + 1 :])
            blocks.append(Block(rank, (_start(size, axis, inside[rank]), size), (_start(size, axis, at), size)))
            at, inside[rank] = at + width, inside[rank] + width
    return Blocks((*shapes[0][:axis], at, *shapes[0][axis + 1 :]), tuple(blocks))


def _start(shape: Shape, axis: int, at: int) -> Shape:
    return tuple(at if i == axis else 0 for i in range(len(shape)))


def halves(shapes: Sequence[Shape]) -> Blocks:
    """Join parts that hold their rows of a first half before those of a second one."""
    if any(not shape or shape[0] % 2 for shape in shapes):
        raise ValueError("a part has an odd number of rows, and two halves are said to be in it")
    return along(shapes, 0, [[shape[0] // 2 for shape in shapes]] * 2)


class _Patterns:
    """Patterns that a name is compared with; those of one name each are looked up."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._literal: set[str] = set()
        self._others: list[str] = []
        for pattern in patterns:
            if not _harmless(pattern):
                raise ValueError(f"its pattern {shown(pattern[:80])} is not one that is run here")
            if _LITERAL.fullmatch(pattern):
                self._literal.add(pattern)
            else:
                self._others.append(pattern)

    def first(self, name: str) -> str | None:
        """Return a pattern that fits the name's beginning."""
        literal = f"^{re.escape(name)}$"
        return literal if literal in self._literal else next((p for p in self._others if re.match(p, name[:256])), None)


def _harmless(pattern: str) -> bool:
    repeated = len(re.findall(r"(?<!\\)[*+]", pattern))
    return len(pattern) <= 512 and repeated <= MAX_REPEATED and _REPEATED.fullmatch(pattern) is not None


@dataclass(frozen=True, slots=True)
class Universal:
    """What ``universal_checkpoint_info`` says of every parameter, see :meth:`blocks`."""

    version: float
    patterns: Mapping[str, _Patterns]
    unsupported: Mapping[str, str]
    subs: Mapping[str, tuple[int, object]]
    widths: Mapping[str, tuple[tuple[int, ...], ...]]
    maps: Mapping[str, object]
    vocabulary: int | None

    def blocks(self, name: str, shapes: Sequence[Shape]) -> Blocks:
        """Say how parts of the given shapes, by tensor rank, make up a parameter; ValueError says what is odd."""
        marked = self.patterns["unsupported"].first(name)
        if marked is not None:
            raise ValueError(f"DeepSpeed marked it as not convertible: {shown(self.unsupported[marked])}")
        found = self._blocks(name, shapes)
        if self._is("vocabulary_parameter_patterns", name) and self.vocabulary is not None and found.shape:
            return Blocks(found.shape, found.blocks, min(self.vocabulary, found.shape[0]))
        return found

    def _is(self, key: str, name: str) -> bool:
        return key in self.patterns and self.patterns[key].first(name) is not None

    def _blocks(self, name: str, shapes: Sequence[Shape]) -> Blocks:
        described = self.patterns["maps"].first(name)
        if described is not None:
            return _affine(self.maps[described], shapes)
        if self._is("parameter_to_average_patterns", name):
            raise ValueError("its values are to be averaged over the ranks, which is not supported")
        if self._is("tp_replicated_parameter_patterns", name):
            return whole(shapes)
        if self._is("parameter_with_2_sub_params_cat_dim_0", name):
            return halves(shapes)
        sub = self.patterns["subs"].first(name)
        if sub is not None:
            axis, sizes = self.subs[sub]
            return along(shapes, axis, self._widths(sub, axis, sizes, shapes))
        return along(shapes, 1 if self._is("parameter_with_row_parallelism_patterns", name) else 0)

    def _widths(self, pattern: str, axis: int, sizes: object, shapes: Sequence[Shape]) -> Sequence[Sequence[int]]:
        if pattern in self.widths:
            return self.widths[pattern]
        if self.version >= 0.4 or any(len(shape) <= axis for shape in shapes):
            raise ValueError("nothing says how wide its sub-parameters are on each rank")
        if is_count(sizes):  # of old: a number of equal ones
            assert isinstance(sizes, int)
            total = sum(shape[axis] for shape in shapes)
            if not sizes or total % sizes:
                raise ValueError(f"{total} rows do not divide into {sizes} sub-parameters")
            sizes = (total // sizes,) * sizes
        if not isinstance(sizes, tuple) or not all(map(is_count, sizes)) or any(n % len(shapes) for n in sizes):
            raise ValueError("its sub-parameters do not divide among the ranks")
        return [[size // len(shapes)] * len(shapes) for size in sizes]


def read_universal(value: object) -> Universal | None:
    """Read ``universal_checkpoint_info`` out of a model's states; None where there is none; ValueError: it is odd."""
    said = _fields(value)
    if not said:
        return None
    version = said.get("universal_checkpoint_version", 0.0)
    affine = _fields(said.get("affine_map"))
    if affine and affine.get("version", 1) != 1:
        raise ValueError("it describes parameters by maps of a version that is not known")
    unsupported = _fields(said.get("autotp_unsupported_parameter_patterns"))
    widths = {
        pattern: tuple(tuple(row) for row in rows)
        for pattern, rows in _fields(said.get("sub_param_shard_widths")).items()
        if isinstance(rows, list) and all(isinstance(row, list) and all(map(is_count, row)) for row in rows)
    }
    subs = said.get("parameter_with_sub_params")
    vocabulary = said.get("original_vocab_size")
    maps = _fields(affine.get("params"))
    sub_params = dict(pair for one in (subs if isinstance(subs, list) else []) for pair in _sub(one))
    patterns = {key: _Patterns(_texts(listed)) for key, listed in said.items() if key.startswith(_KEYS)}
    patterns |= {"unsupported": _Patterns(unsupported), "maps": _Patterns(maps), "subs": _Patterns(sub_params)}
    return Universal(
        version=float(version) if isinstance(version, int | float) else 0.0,
        patterns=patterns,
        unsupported={pattern: str(why) for pattern, why in unsupported.items()},
        subs=sub_params,
        widths=widths,
        maps=maps,
        vocabulary=vocabulary if isinstance(vocabulary, int) and is_count(vocabulary) else None,
    )


_KEYS = ("parameter_to_average", "tp_replicated", "parameter_with_2", "parameter_with_row", "vocabulary_")


def _texts(value: object) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list | tuple) else ()


def _fields(value: object) -> dict[str, object]:
    return {k: v for k, v in value.items if isinstance(k, str)} if isinstance(value, Table) else {}


def _sub(value: object) -> list[tuple[str, tuple[int, object]]]:
    said = _fields(value.state if isinstance(value, Object) else value)
    patterns, axis, shape = _texts(said.get("patterns")), said.get("partition_dim"), said.get("shape")
    if not patterns or type(axis) is not int or not isinstance(shape, list | tuple) or not 0 <= axis < len(shape):
        raise ValueError("what it says of sub-parameters is not understood")
    return [(pattern, (axis, shape[axis])) for pattern in patterns]


def _affine(value: object, shapes: Sequence[Shape]) -> Blocks:
    """Read the boxes of every rank out of one parameter's map; strides that are no box's are refused."""
    said = _fields(value)
    shape = _counts(said.get("logical_shape"))
    ranks = said.get("ranks")
    held = {k: _fields(v) for k, v in ranks.items} if isinstance(ranks, Table) else {}
    if set(held) != set(range(len(shapes))):
        raise ValueError(f"its map is of other ranks than the {len(shapes)} that there are")
    blocks = []
    for rank, own in enumerate(shapes):
        if _counts(held[rank].get("shard_shape")) != own:
            raise ValueError(f"its map says shape {held[rank].get('shard_shape')} of rank {rank}, which holds {own}")
        pieces = held[rank].get("pieces")
        for piece in map(_fields, pieces if isinstance(pieces, list) else []):
            if piece.get("scale", 1.0) != 1.0:
                raise ValueError(f"rank {rank} holds it multiplied by {piece['scale']}, which is not supported")
            size = _counts(piece.get("shape"))
            if 0 not in size:
                blocks.append(Block(rank, _box(piece.get("dest"), size, own), _box(piece.get("source"), size, shape)))
    return Blocks(shape, tuple(blocks))


def _counts(value: object) -> Shape:
    if not isinstance(value, list | tuple) or len(value) > 32 or not all(map(is_count, value)):
        raise ValueError("a shape in its map is no list of sizes")
    return tuple(value)


def _box(value: object, size: Shape, shape: Shape) -> Box:
    offset, strides = value if isinstance(value, list | tuple) and len(value) == 2 else (None, None)
    steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if not is_count(offset) or _counts(strides) != steps or len(size) != len(shape):
        raise ValueError("its map describes something else than boxes, which is not supported")
    assert isinstance(offset, int)
    start = []
    for step in steps:
        at, offset = divmod(offset, step) if step else (0, offset)
        start.append(at)
    return tuple(start), size

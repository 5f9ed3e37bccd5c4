"""MindSpore's strategy files: how every parameter of a run was cut over its devices.

Formats: protobuf ``ParallelStrategyMap`` (mindspore 2.10, train/node_strategy.proto; any suffix but ``.json``) and its
JSON form, of one pipeline stage each, or of all stages after ``merge_pipeline_strategys``, which writes every parameter
as ``<stage>-<name>``. Nothing here needs mindspore or protobuf.

A tensor map names the grid axis of each tensor axis, counted from the right, -1 for none. Where a tensor axis is cut
over several grid axes the protobuf holds one map per tensor axis (and an empty one beside the only map of a vector);
the JSON holds one flat map over an expanded shape instead, which :func:`fitted` folds once the slices' shape is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..formats.untrusted import MAX_HEADER, parse_json, read_small, shown
from ..formats.wire import BYTES, VARINT, Window, WireError, delimited, varint
from .layout import Layout

MAX_AXES = 32
MAX_SLICES = 1 << 16
"""Slices of one parameter whose rows a strategy says."""
MAX_STAGES = 1 << 16
MAX_FOLDINGS = 1 << 16
"""Ways to fold an expanded layout that are tried."""
_MERGED = re.compile(r"(\d{1,6})-(.+)", re.DOTALL)
_HINT = "give the strategy file of the run that wrote the checkpoint"


@dataclass(frozen=True, slots=True)
class Strategy:
    """The layouts of a run. ``stages``: pipeline stage to parameter name to layout. ``paths``: the files read."""

    stages: Mapping[int, Mapping[str, Layout]]
    paths: tuple[Path, ...]

    @property
    def devices(self) -> int:
        """Devices of each stage."""
        return next(layout.devices for layouts in self.stages.values() for layout in layouts.values())


def read_strategy(paths: Sequence[Path]) -> Strategy:
    """Read strategy files: one of a merged run, or one per pipeline stage; a directory stands for the files in it.

    Raises InputError for what is no strategy, and for stages that are missing or differ between two files.
    """
    files = [file for path in paths for file in _files(Path(path))]
    found: dict[int, tuple[Path, dict[str, Layout]]] = {}
    for file in files:
        for stage, layouts in _read_file(file).items():
            if stage in found and found[stage][1] != layouts:
                where = [shown(str(found[stage][0])), shown(str(file))]
                raise InputError(f"two strategy files say different things of stage {stage}", where=where, hint=_HINT)
            found.setdefault(stage, (file, layouts))
    stages = {stage: found[stage][1] for stage in sorted(found)}
    absent = [str(stage) for stage in range(max(stages) + 1) if stage not in stages]
    if absent:
        raise InputError(
            f"no strategy for pipeline stage {', '.join(absent)}", where=[shown(str(file)) for file in files],
            hint="give --strategy once per stage, or the file that merge_pipeline_strategys wrote",
        )  # fmt: skip
    sizes = {layout.devices for layouts in stages.values() for layout in layouts.values()}
    if len(sizes) > 1:
        said = ", ".join(map(str, sorted(sizes)))
        raise InputError(
            f"parameters lie on grids of {said} devices", where=[shown(str(file)) for file in files], hint=_HINT
        )
    return Strategy(stages, tuple(files))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in (".ckpt", ".json", ".pb"))
    if not files:
        raise InputError("the directory holds no strategy file", where=shown(str(path)), hint=_HINT)
    return files


def _read_file(path: Path) -> dict[int, dict[str, Layout]]:
    data, size = read_small(path, MAX_HEADER)
    if size > MAX_HEADER:
        raise InputError(f"a strategy file of {size} bytes is too large", where=shown(str(path)), hint=_HINT)
    try:
        stage, items = _from_json(data) if path.suffix == ".json" else _from_protobuf(data)
    except (WireError, ValueError, OverflowError) as error:
        raise InputError(f"no strategy file: {error}", where=shown(str(path)), hint=_HINT) from None
    if not items:
        raise InputError("the strategy file lists no parameter", where=shown(str(path)), hint=_HINT)
    if not 0 <= stage < MAX_STAGES:
        raise InputError(f"the strategy file is of pipeline stage {stage}", where=shown(str(path)), hint=_HINT)
    problems = [f"{shown(name)}: {why}" for name, layout in items.items() if (why := layout.problem())]
    if problems:
        raise InputError("the strategy file holds layouts that cannot be", where=problems, hint=_HINT)
    merged = {name: _MERGED.fullmatch(name) for name in items}
    if not all(merged.values()):
        return {stage: items}
    stages: dict[int, dict[str, Layout]] = {}
    for name, match in merged.items():
        assert match is not None
        stages.setdefault(int(match[1]), {})[match[2]] = items[name]
    return stages


def _layout(grid: Sequence[int], maps: Sequence[Sequence[int]], optimizer: int, shape: Sequence[int] | None) -> Layout:
    cuts = tuple(tuple(len(grid) - 1 - axis for axis in axes if axis != -1) for axes in maps)
    return Layout(tuple(grid), cuts, optimizer, None if shape is None else tuple(shape))


def _from_json(data: bytes) -> tuple[int, dict[str, Layout]]:
    root = parse_json(data)
    layouts = _table(root, "parallel_layout_item")
    items: dict[str, Layout] = {}
    for name, value in layouts.items():
        rows = _numbers(value, "param_split_shape", None) if _said(value, "param_split_shape") else []
        flat = _numbers(value, "tensor_map", None)
        grid, shape = _numbers(value, "dev_matrix", None), _numbers(value, "tensor_shape", None)
        if len(shape) != len(flat):
            raise ValueError(f"{shown(name)} has {len(flat)} mapped axes and the shape {shape}")
        found = _layout(grid, [[axis] for axis in flat], _numbers(value, "opt_weight_shard_size", 0)[0], shape)
        items[name] = replace(found, rows=_rows(rows), field=_numbers(value, "field", 0)[0])
    stage = 0
    for value in _table(root, "parallel_strategy_item").values():
        stage = _numbers(value, "stage", 0)[0]
        break
    return stage, items


def _said(value: object, key: str) -> bool:
    return isinstance(value, dict) and bool(value.get(key))


def _rows(numbers: Sequence[int]) -> tuple[int, ...]:
    if any(n < 0 for n in numbers):
        raise ValueError("a slice has a negative number of rows")
    return tuple(numbers)


def _table(root: object, key: str) -> Mapping[str, object]:
    value = root.get(key, {}) if isinstance(root, dict) else None
    if not isinstance(value, dict):
        raise ValueError(f"it has no object {key}")
    return value


def _numbers(value: object, key: str, default: int | None) -> list[int]:
    """Return a field's integers; a lone integer is a list of one."""
    found = value.get(key, default) if isinstance(value, dict) else None
    listed = found if isinstance(found, list) else [found]
    numbers = [n for n in listed if type(n) is int and -(2**31) <= n < 2**53]
    most = MAX_SLICES if key == "param_split_shape" else MAX_AXES
    if len(numbers) < len(listed) or len(numbers) > most:
        raise ValueError(f"{key} is no list of at most {most} integers")
    return numbers


def _from_protobuf(data: bytes) -> tuple[int, dict[str, Layout]]:
    window = Window(lambda offset, length: data[offset : offset + length], len(data))
    items: dict[str, Layout] = {}
    stage: int | None = None
    known = False
    for number, kind, value, after in _fields(window, 0, len(data)):
        if number == 1 and kind == VARINT:
            known = True
        elif number == 2 and kind == BYTES and stage is None:
            stage = _stage(window, value, after)
        elif number == 3 and kind == BYTES:
            name, layout = _item(window, value, after)
            if name in items:
                raise ValueError(f"parameter {shown(name)} stands twice")
            items[name] = layout
    if not known:
        raise ValueError("it does not begin as a ParallelStrategyMap")
    return stage or 0, items


def _fields(window: Window, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    while start < stop:
        number, kind, value, after = window.field(start, stop)
        yield number, kind, value, after
        start = after


def _stage(window: Window, start: int, stop: int) -> int:
    for number, kind, value, after in _fields(window, start, stop):
        if number == 2 and kind == BYTES:
            for inner, inner_kind, stage, _ in _fields(window, value, after):
                if inner == 1 and inner_kind == VARINT:
                    return stage
    return 0


def _item(window: Window, start: int, stop: int) -> tuple[str, Layout]:
    name, span = "", None
    for number, kind, value, after in _fields(window, start, stop):
        if number == 1 and kind == BYTES:
            name = window.bytes_at(value, after - value).decode("utf-8")
        elif number == 2 and kind == BYTES:
            span = value, after
    if not name or span is None:
        raise ValueError("a layout has no name or no content")
    lists: dict[int, list[list[int]]] = {1: [], 2: [], 3: [], 4: []}
    single = {5: 0, 6: 0, 7: 0}
    for number, kind, value, after in _fields(window, *span):
        if number in lists and kind == BYTES:
            lists[number].append(_dims(window, value, after, MAX_AXES if number < 3 else MAX_SLICES))
        elif number in single and kind == VARINT:
            single[number] = _signed(value)
    if not lists[1] or not lists[1][0]:
        raise ValueError(f"{shown(name)} has no device matrix: the run had pipeline stages only")
    maps = lists[2]
    axes = [[axis] for axis in maps[0]] if len(maps) == 1 else [axes for axes in maps if axes]
    rows = _rows([n for listed in lists[3] for n in listed])
    return name, replace(_layout(lists[1][0], axes, single[7], None), rows=rows, field=single[5])


def _dims(window: Window, start: int, stop: int, most: int) -> list[int]:
    """Return a message's repeated numbers, packed or not."""
    dims: list[int] = []
    for number, kind, value, after in _fields(window, start, stop):
        if number != 1:
            continue
        if kind == VARINT:
            dims.append(_signed(value))
        elif kind == BYTES:
            while value < after:
                one, value = window.varint(value, after)
                dims.append(_signed(one))
        if len(dims) > most:
            raise ValueError(f"more than {most} axes or slices")
    return dims


def _signed(value: int) -> int:
    return value - (value >> 63 << 64)


def fitted(layout: Layout, local: Sequence[int]) -> Layout | None:
    """Return a layout with one entry per axis of slices of shape ``local``, or None where it is not of such slices.

    Only a JSON layout is expanded: its neighbouring axes are folded until the slices' shape comes out.
    """
    if len(layout.cuts) == len(local):
        return layout if layout.shape is None or layout.whole_shape(local) == layout.shape else None
    if layout.shape is None or len(layout.cuts) < len(local):
        return None
    found = [one for one in _foldings(layout, len(local)) if one.local_shape(one.shape or ()) == tuple(local)]
    return found[0] if len(found) == 1 else None


def folded(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Return a layout with one entry per axis of a whole tensor, and its shape; None where it cannot cut the tensor.

    Neither can one of unequal slices, which are read only.
    """
    if layout.rows or layout.field:
        return None
    if len(layout.cuts) == len(shape):
        fits = layout.shape in (None, tuple(shape)) and layout.local_shape(shape) is not None
        return replace(layout, shape=tuple(shape)) if fits else None
    found = [one for one in _foldings(layout, len(shape)) if one.shape == tuple(shape)] if layout.shape else []
    return found[0] if len(found) == 1 and found[0].local_shape(shape) is not None else None


def _foldings(layout: Layout, axes: int) -> Iterator[Layout]:
    """Yield the ways to fold neighbouring axes of an expanded layout into ``axes`` axes."""

    def ends(start: int, left: int) -> Iterator[tuple[int, ...]]:
        if left == 1:
            yield (len(layout.cuts),)
            return
        for stop in range(start + 1, len(layout.cuts) - left + 2):
            for rest in ends(stop, left - 1):
                yield (stop, *rest)

    shape = layout.shape or ()
    if not 0 < axes <= len(layout.cuts) or math.comb(len(layout.cuts) - 1, axes - 1) > MAX_FOLDINGS:
        return
    for stops in ends(0, axes):
        spans = list(zip((0, *stops[:-1]), stops, strict=True))
        if all(math.prod(layout.parts[i] for i in range(a, b - 1)) == math.prod(shape[a : b - 1]) for a, b in spans):
            cuts = tuple(tuple(axis for i in range(a, b) for axis in layout.cuts[i]) for a, b in spans)
            yield replace(layout, cuts=cuts, shape=tuple(math.prod(shape[a:b]) for a, b in spans))


def write_strategy(stage: int, layouts: Mapping[str, Layout]) -> bytes:
    """Return the protobuf strategy file of one stage, as the compiler writes it (``current_stage`` 2)."""
    node = _field(1, b"lorabridge") + _field(2, _number(1, stage) + _field(2, _number(1, 1)))
    out = _number(1, 2) + _field(2, node)
    for name, layout in layouts.items():
        out += _field(3, _field(1, name.encode()) + _field(2, _layout_bytes(layout)))
    return out


def _layout_bytes(layout: Layout) -> bytes:
    last = len(layout.grid) - 1
    maps = [[last - axis for axis in axes] or [-1] for axes in layout.cuts]
    several = any(len(axes) > 1 for axes in maps)
    tensor_maps = maps if several else [[axes[0] for axes in maps]]
    if several and len(maps) == 1:
        tensor_maps = [*maps, []]
    free = layout.free
    step = 0
    if layout.shards > 1:
        step = math.prod(layout.grid[free[-1] + 1 :]) if free else 0
    out = _field(1, _dims_bytes(layout.grid))
    out += b"".join(_field(2, _dims_bytes(axes)) for axes in tensor_maps)
    out += _field(3, _dims_bytes(layout.rows)) + _field(4, b"") + _number(5, layout.field)
    return out + _number(6, step) + _number(7, layout.optimizer)


def _dims_bytes(numbers: Sequence[int]) -> bytes:
    return b"".join(_number(1, number) for number in numbers)


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value % 2**64)


def _field(field: int, data: bytes) -> bytes:
    return delimited(field, len(data)) + data

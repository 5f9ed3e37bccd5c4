"""Running a plan: the bytes, the memory, the errors, whatever the number of workers."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge import axes
from lorabridge.conversion import execute
from lorabridge.conversion.blocks import BLOCK, blocks, copy_tiled
from lorabridge.conversion.plan import Plan, build
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, MappingError
from lorabridge.files.fsio import OutFile, Staging
from lorabridge.tensors import Extent, TensorSpec

F32, F16, U8 = BY_NAME["float32"], BY_NAME["float16"], BY_NAME["uint8"]


class RawSource:
    """Tensors back to back in one file, each in ``parts`` extents; ``extents`` may be withheld."""

    format = "raw"

    def __init__(self, path: Path, arrays: Mapping[str, np.ndarray], *, parts: int = 1, copyable: bool = True) -> None:
        self.path, self.parts, self.copyable = path, parts, copyable
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.at: dict[str, int] = {}
        self.calls: list[tuple[str, tuple[int, int] | None]] = []
        names = {1: U8, 2: F16, 4: F32, 8: BY_NAME["float64"]}
        with open(path, "wb") as file:
            for name, array in arrays.items():
                file.write(b"gap")
                self.at[name] = file.tell()
                self.specs[name] = TensorSpec(name, names[array.itemsize], array.shape)
                file.write(array.tobytes())

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        self.calls.append((name, rows))
        spec = self.specs[name]
        data = np.fromfile(self.path, spec.dtype.carrier(), spec.size, offset=self.at[name]).reshape(spec.shape)
        return data if rows is None else data[rows[0] : rows[1]].copy()

    def extents(self, name: str) -> tuple[Extent, ...]:
        if not self.copyable:
            return ()
        size = self.specs[name].nbytes
        cuts = [size * i // self.parts for i in range(self.parts + 1)]
        pairs = itertools.pairwise(cuts)
        return tuple(Extent(self.path, self.at[name] + a, b - a) for a, b in pairs)

    def close(self) -> None:
        pass


class RawSink:
    """Tensors back to back in an OutFile."""

    def __init__(self, file: OutFile) -> None:
        self.file = file
        self.at: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.finished = False

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        end = 0
        for spec in specs:
            self.at[spec.name], self.sizes[spec.name] = end, spec.nbytes
            end += spec.nbytes
        self.file.allocate(end)

    def write(self, name: str, offset: int, block: np.ndarray) -> None:
        assert offset + block.nbytes <= self.sizes[name]
        assert block.flags.c_contiguous
        self.file.write(self.at[name] + offset, block)

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        assert offset + extent.length <= self.sizes[name]
        self.file.copy(self.at[name] + offset, extent.path, extent.offset, extent.length)

    def finish(self) -> None:
        self.finished = True
        self.file.close()


def run(source, plan: Plan, target: Path, **options) -> tuple[bytes, execute.Outcome]:
    options = {"kernels": lambda name: {}, "metadata": {}, "workers": 1, **options}
    with Staging(target, digest=plan.digest, overwrite=True, directory=False) as staging:
        sink = RawSink(staging.create(target.name))
        outcome = execute.run(plan, source, sink, **options)
        staging.commit()
    return target.read_bytes(), outcome


def expected(source: RawSource, plan: Plan, kernels=None) -> bytes:
    parts = []
    for expr in plan.outputs().values():
        parts.append(axes.evaluate(expr, RawSource.read.__get__(source), kernels or {}).tobytes())
    return b"".join(parts)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "q": random.integers(0, 2**16, (64, 48), np.uint16),
        "k": random.integers(0, 2**16, (32, 48), np.uint16),
        "qkv": random.integers(0, 2**32, (40, 96), np.uint32),
        "bias": random.integers(0, 2**32, 96, np.uint32),
        "scalar": np.array(7, np.uint32),
        "empty": np.zeros((0, 5), np.uint16),
        "alone": random.integers(0, 255, (3, 5, 7), np.uint8),
    }


def everything(source: RawSource) -> Plan:
    leaf = {name: axes.read(spec) for name, spec in source.specs.items()}
    grouped = [axes.reshape(leaf["q"], (8, 8, 48)), axes.reshape(leaf["k"], (8, 4, 48))]
    outputs = [
        ("same", leaf["q"]),
        ("turned", axes.transpose(leaf["k"])),
        ("fused", axes.join([leaf["q"], leaf["k"]])),
        ("mixed", axes.join([leaf["q"], axes.zeros(F16, (5, 48)), axes.reorder(leaf["k"], (0, 1))])),
        ("grouped", axes.reshape(axes.join(grouped, 1), (96, 48))),
        ("wide", axes.transpose(axes.join([leaf["q"], leaf["k"]]))),
        ("third", axes.transpose(axes.cut(leaf["qkv"], 1, 32, 64))),
        ("rows", axes.cut(leaf["qkv"], 0, 3, 20)),
        ("tail", axes.cut(leaf["bias"], 0, 64, 96)),
        ("scalar", leaf["scalar"]),
        ("empty", leaf["empty"]),
        ("cube", axes.reorder(leaf["alone"], (2, 0, 1))),
        ("zeros", axes.zeros(F32, (9, 2))),
    ]
    return build(source.specs, outputs)


@pytest.mark.parametrize("copyable", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("digests", [True, False])
def test_output_equals_plain_evaluation_on_any_number_of_workers(tmp_path, copyable, parts, digests):
    source = RawSource(tmp_path / "in", arrays(), parts=parts, copyable=copyable)
    plan = everything(source)
    want = expected(source, plan)
    for workers in (1, 2, 8):
        data, outcome = run(source, plan, tmp_path / "out", workers=workers, digests=digests)
        assert data == want
        assert outcome.bytes_copied + outcome.bytes_computed == plan.nbytes
        assert bool(outcome.bytes_copied) == copyable
        at = 0
        for spec in plan.specs if digests else ():
            assert outcome.digests[spec.name] == hashlib.sha256(want[at : at + spec.nbytes]).hexdigest()
            at += spec.nbytes
        assert set(outcome.digests) == ({spec.name for spec in plan.specs} if digests else set())


def test_output_is_the_same_in_blocks_of_a_few_bytes(tmp_path, monkeypatch):
    source = RawSource(tmp_path / "in", arrays())
    plan = everything(source)
    want = expected(source, plan)
    for size in (8, 100, 1000):
        monkeypatch.setattr("lorabridge.conversion.blocks.BLOCK", size)
        monkeypatch.setattr(execute, "CHUNK", size)
        monkeypatch.setattr(execute, "READ", size)
        for digests in (False, True):
            assert run(source, plan, tmp_path / "out", workers=2, digests=digests)[0] == want


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_blocks_join_to_the_evaluated_expression(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    base = np.arange(np.prod(shape, dtype=int), dtype=np.uint16).reshape(shape)
    expr = axes.read(TensorSpec("x", F16, shape))
    for _ in range(data.draw(st.integers(0, 4))):
        kind = data.draw(st.sampled_from(["reorder", "cut", "join", "flatten"]))
        axis = data.draw(st.integers(0, len(expr.shape) - 1))
        if kind == "reorder":
            expr = axes.reorder(expr, data.draw(st.permutations(range(len(expr.shape)))))
        elif kind == "cut":
            start = data.draw(st.integers(0, expr.shape[axis]))
            expr = axes.cut(expr, axis, start, data.draw(st.integers(start, expr.shape[axis])))
        elif kind == "join":
            expr = axes.join([expr, axes.zeros(F16, expr.shape), expr], axis)
        else:
            expr = axes.reshape(expr, (*expr.shape[:axis], int(np.prod(expr.shape[axis:]))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorabridge.conversion.blocks.BLOCK", data.draw(st.sampled_from([2, 16, 64, BLOCK])))
        got = b"".join(block.tobytes() for block in blocks(expr, lambda _: base, {}))
    assert got == np.ascontiguousarray(axes.evaluate(expr, lambda _: base, {})).tobytes()


@pytest.mark.parametrize("shape", [(300, 700), (3, 200, 300), (200, 3, 300)])
@pytest.mark.parametrize("dtype", ["u1", "<u2", "<u4", "<u8", "V16"])
def test_tiled_copy_equals_numpys_copy(shape, dtype):
    raw = np.random.default_rng(1).integers(0, 256, np.prod(shape) * np.dtype(dtype).itemsize, np.uint8)
    array = raw.view(dtype).reshape(shape)
    for order in [(1, 0)] if len(shape) == 2 else [(2, 1, 0), (0, 2, 1), (2, 0, 1)]:
        view = array.transpose(order)
        out = np.empty(view.shape, dtype)
        copy_tiled(out, view)
        assert out.tobytes() == np.ascontiguousarray(view).tobytes()


def test_row_slices_are_read_as_rows(tmp_path):
    source = RawSource(tmp_path / "in", {"x": np.arange(30, dtype=np.uint32).reshape(10, 3)}, copyable=False)
    x = axes.read(source.specs["x"])
    plan = build(source.specs, [("a", axes.cut(x, 0, 0, 4)), ("b", axes.cut(x, 0, 4, 10))])
    run(source, plan, tmp_path / "out")
    assert sorted(source.calls) == [("x", (0, 4)), ("x", (4, 10))]


def test_a_source_tensor_is_read_once_for_all_outputs_that_share_it(tmp_path):
    source = RawSource(tmp_path / "in", {"x": np.arange(60, dtype=np.uint32).reshape(10, 6)})
    x = axes.read(source.specs["x"])
    plan = build(source.specs, [(f"o{i}", axes.transpose(axes.cut(x, 1, 2 * i, 2 * i + 2))) for i in range(3)])
    assert run(source, plan, tmp_path / "out")[0] == expected(source, plan)
    assert source.calls.count(("x", None)) == 1 + 3  # one by the run, three by `expected`


def test_kernels_are_asked_for_by_output_and_their_result_is_written(tmp_path):
    source = RawSource(tmp_path / "in", {"x": np.arange(6, dtype=np.float32).view(np.uint32), "y": np.zeros(2, "<u4")})
    x = axes.read(source.specs["x"])
    plan = build(source.specs, [("half", axes.scale(x, 0.5, F32)), ("y", axes.read(source.specs["y"]))])
    asked = []

    def kernels(name):
        asked.append(name)
        return {"scale": lambda expr, args: (args[0].view("<f4") * np.float32(0.5)).view("<u4")}

    data, outcome = run(source, plan, tmp_path / "out", kernels=kernels)
    assert np.frombuffer(data, "<f4")[:6].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert asked == ["half"]
    assert (outcome.bytes_copied, outcome.bytes_computed) == (8, 24)


def test_types_below_a_byte_are_copied_whole_and_nothing_else(tmp_path):
    (tmp_path / "in").write_bytes(b"abc")
    fp4 = BY_NAME["float4"]

    class Packed(RawSource):
        def __init__(self, copyable):
            self.path, self.specs, self.at = tmp_path / "in", {"x": TensorSpec("x", fp4, (2, 3))}, {"x": 0}
            self.copyable, self.parts, self.calls = copyable, 1, []

        def read(self, name, rows=None):
            return np.fromfile(self.path, np.uint8)

    for copyable in (True, False):
        source = Packed(copyable)
        x = axes.read(source.specs["x"])
        plan = build(source.specs, [("x", axes.reshape(x, (6,)))])
        assert run(source, plan, tmp_path / "out")[0] == b"abc"
        with pytest.raises(MappingError, match="narrower than a byte"):
            run(source, build(source.specs, [("x", axes.transpose(x))]), tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_error_stops_the_run_and_nothing_is_published(tmp_path, workers):
    source = RawSource(tmp_path / "in", {f"t{i}": np.ones((8, 9), np.uint32) for i in range(500)}, copyable=False)
    plan = build(source.specs, [(n, axes.transpose(axes.read(s))) for n, s in source.specs.items()])
    read = source.read

    def failing(name, rows=None):
        if name == "t5":
            raise InputError("broken", where=name)
        time.sleep(0.001)
        return read(name, rows)

    source.read = failing
    with pytest.raises(InputError, match="broken"):
        run(source, plan, tmp_path / "out", workers=workers)
    assert len(source.calls) < 100
    assert os.listdir(tmp_path) == ["in"]


def interrupted(folder: Path, workers: int) -> None:
    """Run a plan whose source sends a real interrupt after twenty reads; called in a process of its own."""
    source = RawSource(folder / "in", {f"t{i}": np.ones((8, 9), np.uint32) for i in range(2000)}, copyable=False)
    plan = build(source.specs, [(n, axes.transpose(axes.read(s))) for n, s in source.specs.items()])
    main = threading.main_thread().ident
    first = threading.Lock()  # a second interrupt would end the clearing up
    read = source.read

    def slow(name, rows=None):
        if len(source.calls) >= 20 and first.acquire(blocking=False):
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.002)
        return read(name, rows)

    source.read = slow
    with pytest.raises(KeyboardInterrupt):
        run(source, plan, folder / "out", workers=workers)
    assert len(source.calls) < 1500
    assert os.listdir(folder) == ["in"]
    print("interrupted")


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupt_stops_the_workers_and_clears_the_staging_area(tmp_path, workers):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, test_execute as t; "
    code += "t.interrupted(pathlib.Path(sys.argv[2]), int(sys.argv[3]))"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.parametrize("damage", ["touch", "grow", "replace", "remove"])
def test_a_source_that_changes_during_the_run_is_an_error(tmp_path, damage):
    source = RawSource(tmp_path / "in", arrays())
    plan = everything(source)

    class Changing(RawSink):
        def begin(self, specs, metadata):
            super().begin(specs, metadata)
            path = source.path
            if damage == "touch":
                os.utime(path, ns=(1, 1))
            elif damage == "grow":
                path.open("ab").write(b"x")
            elif damage == "replace":
                (path.parent / "new").write_bytes(path.read_bytes())
                (path.parent / "new").rename(path)
            else:
                path.rename(path.parent / "gone")

    with Staging(tmp_path / "out", digest=plan.digest, overwrite=True, directory=False) as staging:
        sink = Changing(staging.create("out"))
        if damage == "remove":
            source.read = lambda name, rows=None: np.zeros(source.specs[name].shape, source.specs[name].dtype.carrier())
        with pytest.raises(InputError, match=r"changed|cannot be opened") as caught:
            execute.run(plan, source, sink, kernels=lambda name: {}, metadata={}, workers=1)
    assert str(source.path) in caught.value.where
    assert not sink.finished
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("digests", [True, False])
def test_a_source_that_ends_early_is_an_error(tmp_path, digests):
    source = RawSource(tmp_path / "in", {"x": np.zeros(300_000, np.uint32)})
    plan = build(source.specs, [("x", axes.read(source.specs["x"]))])
    os.truncate(source.path, 500_000)
    with pytest.raises(InputError, match="earlier than its header promises"):
        run(source, plan, tmp_path / "out", digests=digests)


def test_running_tasks_hold_no_more_than_the_memory_given(tmp_path):
    source = RawSource(tmp_path / "in", {f"t{i}": np.ones((100, 100), np.uint32) for i in range(40)}, copyable=False)
    plan = build(source.specs, [(n, axes.transpose(axes.read(s))) for n, s in source.specs.items()])
    lock, now, peak = threading.Lock(), [0], [0]
    read = source.read

    def counted(name, rows=None):
        with lock:
            now[0] += 1
            peak[0] = max(peak[0], now[0])
        time.sleep(0.005)
        data = read(name, rows)
        with lock:
            now[0] -= 1
        return data

    source.read = counted
    for memory, most in ((100_000, 2), (1, 1), (10**9, 8)):
        peak[0] = 0
        run(source, plan, tmp_path / "out", workers=8, memory=memory)
        assert peak[0] <= most
    assert peak[0] > 2


def test_a_stack_of_transposed_experts_never_holds_more_than_one_and_a_block(tmp_path):
    size = 1 << 20
    source = RawSource(tmp_path / "in", {f"e{i}": np.ones((512, size // 2048), np.uint32) for i in range(12)})
    parts = [axes.reshape(axes.transpose(axes.read(s)), (1, size // 2048, 512)) for s in source.specs.values()]
    plan = build(source.specs, [("stack", axes.join(parts))])
    assert plan.step_bytes(plan.steps[0]) == 12 * size
    with Staging(tmp_path / "out", digest=plan.digest, overwrite=True, directory=False) as staging:
        sink = RawSink(staging.create("out"))
        execute.run(plan, source, sink, kernels=lambda name: {}, metadata={}, workers=1)  # imports
        tracemalloc.start()
        execute.run(plan, source, sink2(staging), kernels=lambda name: {}, metadata={}, workers=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.5 * size


def sink2(staging: Staging) -> RawSink:
    return RawSink(staging.create("again"))


def test_progress_rises_to_the_total_and_is_called_one_at_a_time(tmp_path):
    source = RawSource(tmp_path / "in", {f"t{i}": np.ones((8, 9), np.uint32) for i in range(200)}, copyable=False)
    plan = build(source.specs, [(n, axes.transpose(axes.read(s))) for n, s in source.specs.items()])
    read = source.read

    def slow(name, rows=None):
        time.sleep(0.002)
        return read(name, rows)

    source.read = slow
    seen, busy = [], threading.Lock()

    def progress(done, total):
        assert busy.acquire(blocking=False)
        seen.append((done, total))
        busy.release()

    start = time.monotonic()
    run(source, plan, tmp_path / "out", workers=3, progress=progress)
    assert 2 <= len(seen) <= 20 * (time.monotonic() - start) + 2
    assert seen == sorted(seen)
    assert seen[-1] == (plan.nbytes, plan.nbytes)


def test_ten_thousand_tiny_tensors_take_about_a_second(tmp_path):
    source = RawSource(tmp_path / "in", {f"layer.{i}.w": np.ones((4, 4), np.uint16) for i in range(10_000)})
    for turn in (False, True):
        leaves = {n: axes.read(s) for n, s in source.specs.items()}
        plan = build(source.specs, [(n, axes.transpose(x) if turn else x) for n, x in leaves.items()])
        start = time.process_time()
        run(source, plan, tmp_path / "out", workers=2)
        assert time.process_time() - start < 20  # 0.3 and 0.6 s alone on the machine

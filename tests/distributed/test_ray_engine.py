"""The Ray engine: the bytes of a local run from two machines, one of which dies; and shares without any cluster."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorabridge import formats
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard, reshard_files
from lorabridge.actions.whole import WholeRecipe
from lorabridge.conversion import engines, shares
from lorabridge.conversion.engines import Engine
from lorabridge.conversion.plan import Plan
from lorabridge.errors import InputError, StorageError, UsageError
from lorabridge.files.fsio import Staging
from lorabridge.formats.ranges import PlacedSink, ranged
from lorabridge.tensors import Extent, Source

DATA = Path(__file__).parent / "data"
RANKS = DATA / "ranks" / "tp4pp2_opt2"
FROM = (DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt",)
TO = (DATA / "strategies" / "tp4pp2_opt_all" / "merged.ckpt",)
RAY = Engine("ray")
TENSORS = 24

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass(frozen=True)
class Slow:
    """A recipe whose source takes its time for every tensor and notes which process read it.

    ``meet``: nobody goes on before so many processes read. ``deadly``: tensors whose first reader dies.
    """

    source: Path
    notes: Path
    seconds: float = 0.0
    meet: int = 0
    deadly: tuple[str, ...] = ()

    def open(self) -> tuple[Plan, Source]:
        plan, source = WholeRecipe(self.source, (), None).open()
        inner = source.read

        def read(name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
            first = self.notes / f"first-{name}"
            (self.notes / f"{name}-{os.getpid()}").touch()
            if name in self.deadly and not first.exists():
                first.touch()
                os._exit(1)
            self.wait()
            time.sleep(self.seconds)
            return inner(name, rows)

        source.read = read  # type: ignore[method-assign]
        source.extents = lambda name: ()  # type: ignore[method-assign]
        return plan, source

    def wait(self) -> None:
        until = time.monotonic() + 60
        while not (self.notes / "met").exists() and time.monotonic() < until:
            if len({path.name.rpartition("-")[2] for path in self.notes.iterdir()}) >= self.meet:
                (self.notes / "met").touch()
            time.sleep(0.01)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(11)
    tensors = {f"layers.{i}.weight": rng.standard_normal((1025, 1024)).astype(np.float32) for i in range(TENSORS)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "ms"})
    (tmp_path / "notes").mkdir()
    return tmp_path / "model.safetensors"


def written(recipe: shares.Recipe, target: Path, engine: Engine, progress: engines.Progress | None = None) -> bytes:
    plan, source = recipe.open()
    with Staging(target, digest="0" * 12, overwrite=False, directory=False) as staging:
        format = formats.format_for(target)
        sink = formats.make_sink(format, staging.create, target.name, flavour="ms")
        engines.run(plan, source, sink, engine=engine, recipe=recipe, format=format, metadata={}, workers=0,
                    progress=progress)  # fmt: skip
        staging.commit()
    source.close()
    return target.read_bytes()


# Shares, without a cluster


def test_shares_done_in_other_processes_twice_and_backwards_give_the_bytes_of_a_local_run(
    model: Path, tmp_path: Path
) -> None:
    recipe = WholeRecipe(model, (), None)
    plan, source = recipe.open()
    local = written(recipe, tmp_path / "local.ckpt", Engine())
    with Staging(tmp_path / "shared.ckpt", digest="0" * 12, overwrite=False, directory=False) as staging:
        sink = formats.make_sink("mindspore", staging.create, "shared.ckpt")
        sink.begin(plan.specs, {})
        places = {spec.name: ranged(sink, "mindspore").ranges(spec.name) for spec in plan.specs}
        terms, tasks = shares.terms_of(recipe, plan, source)
        cut = list(shares.shares(terms, tasks, places, 2))
        assert len(cut) > 8
        assert [share.start for share in cut[1:]] == [share.stop for share in cut[:-1]]
        assert sum(share.nbytes for share in cut) == plan.nbytes
        (tmp_path / "cut").write_bytes(pickle.dumps([*reversed(cut), *cut[::3]]))
        code = "import pickle,sys; from lorabridge.conversion.shares import do\n" \
               "assert all(do(s) == s.nbytes for s in pickle.load(open(sys.argv[1], 'rb')))"  # fmt: skip
        subprocess.run([sys.executable, "-c", code, tmp_path / "cut"], check=True)
        sink.finish()
        staging.commit()
    assert (tmp_path / "shared.ckpt").read_bytes() == local


def test_a_worker_refuses_another_input_another_version_and_files_that_it_does_not_see(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = WholeRecipe(model, (), None)
    plan, source = recipe.open()
    terms, tasks = shares.terms_of(recipe, plan, source)
    gone = {spec.name: (Extent(tmp_path / "gone", 0, spec.nbytes),) for spec in plan.specs}
    share = next(shares.shares(terms, tasks, gone, 1))

    def refusal(share: shares.Share) -> shares.Refused:
        done = shares.do(share)
        assert isinstance(done, shares.Refused)
        return pickle.loads(pickle.dumps(done))

    unseen = refusal(share).error()
    assert isinstance(unseen, StorageError)
    assert "does not see the output's files" in unseen.problem
    assert not (tmp_path / "gone").exists()
    older = refusal(replace(share, terms=replace(terms, version="0.0.1"))).error()
    assert isinstance(older, UsageError)
    assert "the driver has 0.0.1" in older.problem
    os.utime(model, ns=(1, 1))
    monkeypatch.setattr(shares, "_OPENED", shares._Opened())  # as in another process
    other = refusal(share).error()
    assert isinstance(other, InputError)
    assert "sees another input" in other.problem


def test_bytes_outside_a_tensor_are_never_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(16))
    sink = PlacedSink({"a": (Extent(path, 2, 3), Extent(path, 9, 2))})
    sink.write("a", 1, np.arange(1, 5, dtype=np.uint8))
    with pytest.raises(ValueError, match="outside"):
        sink.write("a", 3, np.ones(3, np.uint8))
    sink.finish()
    assert path.read_bytes() == bytes([0, 0, 0, 1, 2, 0, 0, 0, 0, 3, 4, 0, 0, 0, 0, 0])


def test_an_address_without_ray_and_ray_that_is_not_installed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="add --engine ray"):
        reshard(RANKS, tmp_path / "out", ReshardOptions(strategies=FROM, to=TO, engine=Engine(address="auto")))
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lorabridge\[ray\]'"):
        reassemble(RANKS, tmp_path / "out.ckpt", ConvertOptions(strategies=FROM), engine=RAY)
    assert list(tmp_path.iterdir()) == []


# A cluster of two machines and a head without work


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # workers import Slow from here
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        soon = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": soon}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            made.add_node(num_cpus=2)
            ray.init(address=made.address, log_to_driver=False)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


@needs_ray
@pytest.mark.parametrize("name", ["whole.safetensors", "whole.ckpt", "shards/"])
def test_a_cluster_reassembles_the_bytes_of_a_local_run(
    name: str, cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").symlink_to(RANKS.parent.parent)
    options = ConvertOptions(
        strategies=(Path("in/strategies/tp4pp2_opt2/merged.ckpt"),), max_shard_size=2000 if name == "shards/" else None
    )
    for folder, engine in (("one", Engine()), ("two", RAY)):
        Path(folder).mkdir()
        reassemble("in/ranks/tp4pp2_opt2", f"{folder}/{name}", options, engine=engine)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "one")) == (1 if name != "shards/" else len(list(Path("one/shards").iterdir())))


@needs_ray
@pytest.mark.parametrize("format", ["mindspore", "safetensors"])
def test_a_cluster_cuts_the_ranks_of_a_local_run(format: str, cluster: object, tmp_path: Path) -> None:
    options = ReshardOptions(strategies=FROM, to=TO, format=format)
    reshard(RANKS, tmp_path / "one", options)
    reshard(RANKS, tmp_path / "two", replace(options, engine=RAY))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "two")) == 16 + 2
    reshard_files(tmp_path / "two", tmp_path / "three", ReshardOptions(engine=RAY), shards=2)
    reshard_files(tmp_path / "two", tmp_path / "four", ReshardOptions(), shards=2)
    assert files(tmp_path / "three") == files(tmp_path / "four")


@pytest.mark.slow
@needs_ray
def test_a_machine_that_dies_in_the_middle_leaves_the_bytes_of_a_local_run(
    cluster: object, model: Path, tmp_path: Path
) -> None:
    recipe = Slow(model, tmp_path / "notes", seconds=0.4, meet=4)
    doomed = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    lost: list[int] = []

    def progress(done: int, total: int) -> None:
        if not lost and done:
            lost.append(done)
            time.sleep(0.2)  # half of a read: whoever finished one is within the next
            cluster.remove_node(doomed, allow_graceful=False)

    got = written(recipe, tmp_path / "ray.safetensors", RAY, progress)
    assert 0 < lost[0] < TENSORS * 1025 * 4096 / 2
    readers = [p.name.rpartition("-")[0] for p in (tmp_path / "notes").glob("layers*")]
    assert len(set(readers)) == TENSORS
    assert len(readers) > TENSORS  # what the lost machine had begun was begun again by another process
    assert got == written(replace(recipe, seconds=0.0, meet=0), tmp_path / "local.safetensors", Engine())


@pytest.mark.slow
@needs_ray
def test_workers_that_die_are_replaced(cluster: object, model: Path, tmp_path: Path) -> None:
    recipe = Slow(model, tmp_path / "notes", deadly=("layers.3.weight", "layers.17.weight"))
    got = written(recipe, tmp_path / "ray.ckpt", RAY)
    assert len(list((tmp_path / "notes").glob("first-*"))) == 2
    assert got == written(replace(recipe, deadly=()), tmp_path / "local.ckpt", Engine())


@needs_ray
def test_what_other_machines_cannot_write_is_refused_and_nothing_is_left(cluster: object, tmp_path: Path) -> None:
    known = ConvertOptions(strategies=FROM)
    for name, options, said in [
        ("out.pt", known, "torch files cannot be written by several machines"),
        ("out.ckpt", replace(known, crc=True), "with a checksum"),
        ("out/", replace(known, target_dialect="ms"), "under the names they have"),
    ]:
        with pytest.raises(UsageError, match=said):
            reassemble(RANKS, str(tmp_path / name), options, engine=RAY)
    with pytest.raises(UsageError, match="DCP"):
        reshard(RANKS, tmp_path / "dcp", ReshardOptions(strategies=FROM, dcp=2, engine=RAY))
    assert list(tmp_path.iterdir()) == []

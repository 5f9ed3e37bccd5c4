"""The Ray engine on a real cluster of several nodes on this machine, one of which dies: the bytes of a local run."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray_sources
from ray_sources import TENSORS, Slow, written

from lorabridge.actions import convert as converting
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard, reshard_files
from lorabridge.conversion import engine_ray
from lorabridge.conversion.engines import Engine
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import StorageError, UsageError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

HERE = Path(__file__).parent
DATA = HERE / "data"
EXAMPLES = HERE.parent.parent / "examples"
RANKS = DATA / "ranks" / "tp4pp2_opt2"
FROM = (DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt",)
TO = (DATA / "strategies" / "tp4pp2_opt_all" / "merged.ckpt",)
RAY = Engine("ray")
BLIND = """
import os
toggle, opened, stat = {toggle!r}, os.open, os.stat
def refused(path):
    try:
        fd = opened(toggle, os.O_RDONLY)
    except FileNotFoundError:
        return
    hidden = os.read(fd, 4096).decode()
    os.close(fd)
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(hidden):
        raise FileNotFoundError(2, "hidden", path)
def blind(call):
    def made(path, *args, **kwargs):
        refused(path)
        return call(path, *args, **kwargs)
    return made
os.open, os.stat = blind(opened), blind(stat)
"""
"""What makes workers of a machine blind to paths: a machine that mounts something else there."""


class Machines:
    """A running cluster, and a file whose content is what the workers of its lasting machine do not see."""

    def __init__(self, cluster: Any, lasting: Any, toggle: Path) -> None:
        self.cluster = cluster
        self.lasting = lasting
        self.toggle = toggle


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return ray_sources.model(tmp_path)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A head without work and one machine with two CPUs; tests add and kill others."""
    folder = tmp_path_factory.mktemp("machines")
    (folder / "sitecustomize.py").write_text(BLIND.format(toggle=str(folder / "hidden")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # workers wait for nobody on a busy machine
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)  # workers import ray_sources from here
        import ray
        from ray.cluster_utils import Cluster

        soon = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4}
        small = {"object_store_memory": engine_ray.STORE, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": soon, **small})
        try:
            paths = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
            lasting = made.add_node(num_cpus=2, env_vars={"PYTHONPATH": paths}, **small)
            ray.init(address=made.address, log_to_driver=False)
            yield Machines(made, lasting, folder / "hidden")
        finally:
            ray.shutdown()
            made.shutdown()


# Conversions


def test_a_model_is_converted_to_the_bytes_of_a_local_run(machines: Machines, tmp_path: Path) -> None:
    source = ray_sources.llama(tmp_path / "llama")
    options = ConvertOptions(family="llama", dtype="bfloat16")
    reports = {}
    for folder, engine in (("one", Engine()), ("two", RAY)):
        (tmp_path / folder).mkdir()
        made, back = tmp_path / folder / "ms.ckpt", f"{tmp_path / folder}/hf/"
        reports[folder] = convert(source, made, replace(options, engine=engine))
        convert(made, back, replace(options, dtype=None, max_shard_size=100_000, engine=engine))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "two")) > 4
    assert reports["two"].rounding == reports["one"].rounding
    assert len(reports["two"].rounding) > 10


def test_an_adapter_comes_with_its_digests_and_goes_back_bit_for_bit(machines: Machines, tmp_path: Path) -> None:
    source = EXAMPLES / "token-classifier"
    options = ConvertOptions(target_dialect="mindpet", family="bert")
    for folder, engine in (("one", Engine()), ("two", RAY)):
        (tmp_path / folder).mkdir()
        convert(source, tmp_path / folder / "out.ckpt", replace(options, engine=engine))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    back = convert(tmp_path / "two" / "out.ckpt", f"{tmp_path}/back/", ConvertOptions(engine=RAY))
    assert "restored bit for bit from the manifest" in back.notes
    weights = "adapter_model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (source / weights).read_bytes()


def test_a_merge_gives_the_bytes_and_the_account_of_a_local_run(machines: Machines, tmp_path: Path) -> None:
    base = ray_sources.llama(tmp_path / "base")
    adapter = ray_sources.adapter(tmp_path / "adapter")
    reports = {}
    for folder, engine in (("one", Engine()), ("two", RAY)):
        reports[folder] = merge(base, adapter, f"{tmp_path / folder}/", MergeOptions(engine=engine))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert reports["two"].rows == reports["one"].rows
    assert len(reports["two"].rows) == 4
    with pytest.raises(UsageError, match="such as an undo file"):
        merge(base, adapter, f"{tmp_path}/three/", MergeOptions(engine=RAY), undo=tmp_path / "undo")
    assert not (tmp_path / "three").exists()


# Ranks


@pytest.mark.parametrize("name", ["whole.safetensors", "whole.ckpt", "whole.pt", "whole.npz", "whole.gguf", "shards/"])
def test_a_cluster_reassembles_the_bytes_of_a_local_run(
    name: str, machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").symlink_to(RANKS.parent.parent)
    options = ConvertOptions(
        strategies=(Path("in/strategies/tp4pp2_opt2/merged.ckpt"),), max_shard_size=2000 if name == "shards/" else None
    )
    for folder, engine in (("one", Engine()), ("two", RAY)):
        Path(folder).mkdir()
        reassemble("in/ranks/tp4pp2_opt2", f"{folder}/{name}", replace(options, engine=engine))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "one")) == (1 if name != "shards/" else len(list(Path("one/shards").iterdir())))


def test_ranks_become_an_adapter_in_one_pass(machines: Machines, tmp_path: Path) -> None:
    options = ConvertOptions(target_dialect="peft", facts=Facts((Fact("*", "alpha", 12.0),)))
    for folder, engine in (("one", Engine()), ("two", RAY)):
        reassemble(DATA / "dcp_peft_fsdp2", f"{tmp_path / folder}/", replace(options, engine=engine))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert "adapter_model.safetensors" in files(tmp_path / "two")


def test_a_cluster_cuts_the_ranks_of_a_local_run(machines: Machines, tmp_path: Path) -> None:
    options = ReshardOptions(strategies=FROM, to=TO, format="mindspore")
    reshard(RANKS, tmp_path / "one", options)
    reshard(RANKS, tmp_path / "two", replace(options, engine=RAY))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert len(files(tmp_path / "two")) == 16 + 2
    reshard_files(tmp_path / "two", tmp_path / "three", ReshardOptions(engine=RAY), shards=2)
    reshard_files(tmp_path / "two", tmp_path / "four", ReshardOptions(), shards=2)
    assert files(tmp_path / "three") == files(tmp_path / "four")
    reshard(RANKS, tmp_path / "five", ReshardOptions(strategies=FROM, dcp=3, engine=RAY))
    reshard(RANKS, tmp_path / "six", ReshardOptions(strategies=FROM, dcp=3))
    assert files(tmp_path / "five") == files(tmp_path / "six")
    assert len(files(tmp_path / "six")) == 4


# Machines that die


def test_a_machine_that_dies_in_a_conversion_leaves_the_bytes_of_a_local_run(
    machines: Machines, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ConvertOptions(target_dialect="ms", family="identity", dtype="bfloat16")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    convert(model, tmp_path / "one" / "out.ckpt", options)
    doomed = machines.cluster.add_node(num_cpus=2, object_store_memory=engine_ray.STORE)
    machines.cluster.wait_for_nodes()
    raylet = doomed.all_processes["raylet"][0].process.pid
    lost: list[int] = []

    def progress(done: int, total: int) -> None:
        """Kill the machine in the middle of a read, its workers first."""
        within = [] if lost else [pid for pid in reading(tmp_path / "notes") if parent(pid) == raylet]
        for pid in within:
            os.kill(pid, signal.SIGKILL)
        if within:
            lost.append(done)
            machines.cluster.remove_node(doomed, allow_graceful=False)

    class Watched:
        of = staticmethod(lambda *_: Slow(model, tmp_path / "notes", seconds=0.4, meet=4))

    monkeypatch.setattr(converting, "InputOpener", Watched)
    report = convert(model, tmp_path / "two" / "out.ckpt", replace(options, engine=RAY), progress=progress)
    assert 0 < lost[0] < report.nbytes
    readers = [p.name.rpartition("-")[0] for p in (tmp_path / "notes").glob("layers*")]
    assert len(set(readers)) == TENSORS
    assert len(readers) > TENSORS  # what the lost machine had begun was begun again by another process
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_workers_that_die_are_replaced(machines: Machines, model: Path, tmp_path: Path) -> None:
    opener = Slow(model, tmp_path / "notes", deadly=("layers.3.weight", "layers.17.weight"))
    got = written(opener, tmp_path / "ray.ckpt", RAY)
    assert len(list((tmp_path / "notes").glob("first-*"))) == 2
    assert got == written(replace(opener, deadly=()), tmp_path / "local.ckpt", Engine())


# Refusals


def test_what_other_machines_cannot_write_is_refused_and_nothing_is_left(machines: Machines, tmp_path: Path) -> None:
    known = ConvertOptions(strategies=FROM, engine=RAY)
    with pytest.raises(UsageError, match="with a checksum"):
        reassemble(RANKS, tmp_path / "out.ckpt", replace(known, crc=True))
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_the_shared_file_system_is_named_before_anything_is_written(
    machines: Machines, tmp_path: Path
) -> None:
    options = ConvertOptions(strategies=FROM, engine=RAY)
    machines.toggle.write_text(str(tmp_path))
    try:
        with pytest.raises(StorageError, match="1 machine of the cluster cannot write the output") as told:
            reassemble(RANKS, tmp_path / "out.ckpt", options)
    finally:
        machines.toggle.unlink()
    (where,) = told.value.where
    assert os.uname().nodename in where
    assert f"does not see what the driver wrote in {tmp_path}" in where
    assert "mounts under the same path" in told.value.hint
    assert list(tmp_path.iterdir()) == []


def test_another_version_of_ray_is_named_and_sigterm_is_heard_outside_of_ray(machines: Machines) -> None:
    code = """
import os, signal, sys, ray
from lorabridge.conversion import engine_ray
from lorabridge.errors import UsageError
def mine(number, frame):
    raise TimeoutError
signal.signal(signal.SIGTERM, mine)
own, ray.__version__ = ray.__version__, "2.40.0"
try:
    with engine_ray.cluster(sys.argv[1]):
        sys.exit("joined")
except UsageError as error:
    print(error.text())
ray.__version__ = own
try:
    with engine_ray.cluster(sys.argv[1]) as machines:
        print(sum(machine.cpus for machine in machines))
        os.kill(os.getpid(), signal.SIGTERM)
        engine_ray._wait([ray.put(1)], seconds=5)
        print("too far")
except TimeoutError:
    print("heard", signal.getsignal(signal.SIGTERM) is mine, ray.is_initialized())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, machines.cluster.address], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "the cluster runs another Ray or Python than this process"
    assert lines[2].startswith("  The cluster was started with: Ray: ")
    assert ": Ray: 2.40.0, Python: " in lines[3]
    assert lines[-2:] == ["2", "heard True False"]


def test_a_cluster_of_its_own_ends_with_the_run(tmp_path: Path) -> None:
    mark = f"LORABRIDGE_TEST_MARK={tmp_path}"
    done = subprocess.run(
        [sys.executable, "-m", "lorabridge", "reassemble", RANKS, tmp_path / "out.ckpt", "--strategy", *FROM,
         "--engine", "ray", "--address", "local", "--json"],
        capture_output=True, text=True, env={**os.environ, "LORABRIDGE_TEST_MARK": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert done.stdout.endswith("}\n")
    until = time.monotonic() + 20
    while (left := list(marked(mark))) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_a_cluster_without_machines_is_given_up_and_nothing_is_left(
    machines: Machines, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test: no machine is there after it."""
    monkeypatch.setattr(engine_ray, "GONE", 1.0)
    (tmp_path / "out").mkdir()

    def progress(done: int, total: int) -> None:
        if machines.lasting is not None:
            machines.cluster.remove_node(machines.lasting, allow_graceful=False)
            machines.lasting = None

    with pytest.raises(StorageError, match="every machine of the cluster with a CPU is gone"):
        written(Slow(model, tmp_path / "notes", seconds=0.1), tmp_path / "out" / "ray.ckpt", RAY, progress)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(UsageError, match="no machine of the cluster has a CPU for this"):
        written(Slow(model, tmp_path / "notes"), tmp_path / "out" / "ray.ckpt", RAY)


def reading(notes: Path) -> list[int]:
    """Return the processes that are within a read."""
    begun = [path.name for path in notes.glob("layers*")]
    return [int(name.rpartition("-")[2]) for name in begun if not (notes / f"done-{name}").exists()]


def parent(pid: int) -> int:
    """Return a process's parent; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def marked(mark: str) -> Iterator[int]:
    """Yield the processes whose environment holds a mark."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            held = mark.encode() in path.read_bytes().split(b"\0")
        except OSError:
            continue
        if held:
            yield int(path.parent.name)

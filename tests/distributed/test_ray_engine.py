"""The Ray engine without a cluster: shares of a run, what machines are asked, and addresses."""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray_sources
from ray_sources import Slow, whole, written
from safetensors.numpy import save_file

from lorabridge import formats
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard
from lorabridge.axes import cast, read, scale
from lorabridge.conversion import endpoint, engines, execute, shares, survey
from lorabridge.conversion.accounts import Numeric
from lorabridge.conversion.engines import Engine
from lorabridge.conversion.plan import build
from lorabridge.conversion.shares import InputOpener
from lorabridge.conversion.tasks import cut
from lorabridge.distributed import open_distributed
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, LorabridgeError, StorageError, UsageError
from lorabridge.files.fsio import Staging
from lorabridge.formats import keys
from lorabridge.formats.ranges import PlacedSink, ranged
from lorabridge.tensors import Extent, Source

DATA = Path(__file__).parent / "data"
RANKS = DATA / "ranks" / "tp4pp2_opt2"
FROM = (DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt",)
TO = (DATA / "strategies" / "tp4pp2_opt_all" / "merged.ckpt",)
RAY = Engine("ray")

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return ray_sources.model(tmp_path)


@dataclass(frozen=True)
class Swapped(InputOpener):
    """Ranks whose strategy says otherwise: two tensors of one shape change places."""

    def open(self) -> Source:
        source = open_distributed(self.path, strategies=self.strategies)
        assert source is not None
        placed = dict(source.arrangement.placed)
        placed["n.b0.up.w"], placed["n.b1.up.w"] = placed["n.b1.up.w"], placed["n.b0.up.w"]
        source.arrangement = replace(source.arrangement, placed=placed)
        return source


def cut_in_shares(
    opener: shares.Opener, source: Source, places: dict[str, tuple[Extent, ...]], stamps: shares.Stamps | None = None
) -> list[shares.Share]:
    plan = whole(source)
    tasks = cut(plan, {name: source.extents(name) for name in source.specs}, whole=False)
    known = shares.stamps_of(source) if stamps is None else stamps
    return list(shares.shares(shares.terms_of(opener, source), tasks, places, 2, stamps=known, arithmetic=Numeric()))


# What is refused


@needs_ray
def test_stores_and_keys_stay_with_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"a": np.ones((2, 3), np.float32)}, source)
    options = ConvertOptions(target_dialect="ms", family="identity", engine=RAY)
    with pytest.raises(UsageError, match="what lies in a store is read and written by one process"):
        convert(source, "memory://ray-out/out.ckpt", options)
    sealed = tmp_path / "sealed.ckpt"
    with keys.using(keys.Key(b"0123456789abcdef", "a test")):
        convert(source, sealed, replace(options, engine=Engine(), encrypt="aes-gcm"))
        with pytest.raises(UsageError, match="the key of an encrypted checkpoint is not given to other machines"):
            convert(sealed, tmp_path / "out.safetensors", ConvertOptions(family="identity", engine=RAY))
    assert not (tmp_path / "out.safetensors").exists()


# Shares, without a cluster


@pytest.mark.parametrize("seen", ["copied", "read"])
def test_shares_done_in_other_processes_twice_and_backwards_give_the_bytes_of_a_local_run(
    seen: str, model: Path, tmp_path: Path
) -> None:
    opener = InputOpener.of(model) if seen == "copied" else Slow(model, tmp_path / "notes")
    source = opener.open()
    local = written(opener, tmp_path / "local.ckpt", Engine())
    with Staging(tmp_path / "shared.ckpt", digest="0" * 12, overwrite=False, directory=False) as staging:
        sink = formats.make_sink("mindspore", staging.create, "shared.ckpt")
        sink.begin(whole(source).specs, {})
        places = {name: ranged(sink, "mindspore").ranges(name) for name in source.specs}
        made = cut_in_shares(opener, source, places)
        assert len(made) > 8
        assert sum(share.nbytes for share in made) == whole(source).nbytes
        (tmp_path / "made").write_bytes(pickle.dumps([*reversed(made), *made[::3]]))
        code = "import pickle,sys; from lorabridge.conversion.shares import do\n" \
               "for s in pickle.load(open(sys.argv[1], 'rb')):\n" \
               "    done = do(s).outcome; assert done.bytes_copied + done.bytes_computed == s.nbytes"  # fmt: skip
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "made"], check=True, env={**os.environ, "PYTHONPATH": paths}
        )
        sink.finish()
        staging.commit()
    assert (tmp_path / "shared.ckpt").read_bytes() == local


def refusal(share: shares.Share) -> LorabridgeError:
    done = shares.do(share)
    assert isinstance(done, shares.Refused)
    return pickle.loads(pickle.dumps(done)).error()


def test_a_worker_refuses_another_input_another_version_and_files_that_it_does_not_see(
    model: Path, tmp_path: Path
) -> None:
    opener = InputOpener.of(model)
    source = opener.open()
    gone = {spec.name: (Extent(tmp_path / "gone", 0, spec.nbytes),) for spec in source.specs.values()}
    share = cut_in_shares(opener, source, gone)[0]
    unseen = refusal(share)
    assert isinstance(unseen, StorageError)
    assert "does not see the output's files" in unseen.problem
    assert not (tmp_path / "gone").exists()
    older = refusal(replace(share, terms=replace(share.terms, version="0.0.1")))
    assert isinstance(older, UsageError)
    assert "the driver has 0.0.1" in older.problem
    os.utime(model, ns=(1, 1))
    other = refusal(share)
    assert isinstance(other, InputError)
    assert "sees another input" in other.problem


def test_a_worker_refuses_a_source_whose_tensors_are_put_together_otherwise(
    tmp_path: Path,
) -> None:
    right, other = InputOpener.of(RANKS, FROM), Swapped(RANKS, FROM)
    source, there = right.open(), other.open()
    assert source.specs == there.specs
    assert shares.stamps_of(source) == shares.stamps_of(there)
    out = {spec.name: (Extent(tmp_path / "out", 0, spec.nbytes),) for spec in source.specs.values()}
    (tmp_path / "out").write_bytes(bytes(1 << 20))
    share = cut_in_shares(right, source, out)[0]
    assert not isinstance(shares.do(share), shares.Refused)
    assert "sees another input" in refusal(replace(share, terms=replace(share.terms, opener=other))).problem


def test_arithmetic_done_in_parts_notes_what_one_run_notes(tmp_path: Path) -> None:
    f32, bf16 = BY_NAME["float32"], BY_NAME["bfloat16"]
    rng = np.random.default_rng(5)
    save_file(
        {f"t{i}": rng.standard_normal((300, 40)).astype(np.float32) for i in range(9)}, tmp_path / "in.safetensors"
    )
    opener = InputOpener.of(tmp_path / "in.safetensors")
    source = opener.open()
    outputs = [(name, scale(read(spec), 0.3, f32) if name < "t5" else cast(read(spec), bf16))
               for name, spec in source.specs.items()]  # fmt: skip
    plan = build(source.specs, outputs)
    there, here = Numeric(), Numeric()
    with Staging(tmp_path / "out.safetensors", digest="0" * 12, overwrite=False, directory=False) as staging:
        sink = formats.make_sink("safetensors", staging.create, "out.safetensors")
        outcome = execute.run(plan, source, sink, kernels=here.kernels, metadata={}, workers=1, digests=True)
        staging.commit()
    with Staging(tmp_path / "two.safetensors", digest="0" * 12, overwrite=False, directory=False) as staging:
        sink = formats.make_sink("safetensors", staging.create, "two.safetensors")
        sink.begin(plan.specs, {})
        places = {name: ranged(sink, "safetensors").ranges(name) for name, _ in outputs}
        tasks = cut(plan, {name: source.extents(name) for name in source.specs}, whole=True)
        found: dict[str, str] = {}
        for task in tasks:
            (share,) = shares.shares(
                shares.terms_of(opener, source), [task], places, 1, stamps={}, arithmetic=there, digests=True
            )
            done = shares.do(pickle.loads(pickle.dumps(share)))
            assert isinstance(done, shares.Done)
            back = pickle.loads(pickle.dumps(done))
            there.absorb(back.arithmetic)
            found.update(back.outcome.digests)
        for name in places:
            ranged(sink, "safetensors").settle(name)
        sink.finish()
        staging.commit()
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert found == outcome.digests
    assert there.notes.rounding == here.notes.rounding
    assert there.notes.residues == here.notes.residues
    assert len(here.notes.rounding) == 9
    assert here.notes.residues


# What machines are asked


def test_machines_say_what_they_do_not_see_and_a_probe_file_goes_away(model: Path, tmp_path: Path) -> None:
    stamps = {str(model): shares.stamp(str(model)), str(tmp_path / "other"): None}
    names = ["one (10.0.0.1)", "two (10.0.0.2)"]
    with survey.probing(tmp_path, 2) as probe:
        good = survey.reply(probe.inquiry(0, stamps))
        survey.judge(probe, {0: good}, names)
        assert not probe.answered(1)
        with pytest.raises(StorageError, match="what it writes does not arrive here"):
            survey.judge(probe, {0: good, 1: replace(good, machine="two")}, names)
        inquiry = probe.inquiry(1, {str(model): (1, 1), str(tmp_path / "gone"): (1, 1)})
        blind = survey.reply(inquiry)
        assert blind.inputs == (f"sees another {model}", f"does not see {tmp_path / 'gone'}")
        with pytest.raises(InputError, match="1 machine of the cluster cannot read the inputs") as told:
            survey.judge(probe, {0: good, 1: blind}, names)
        assert told.value.where[0] == f"two (10.0.0.2): sees another {model}"
        elsewhere = survey.reply(replace(inquiry, probe=str(tmp_path / "elsewhere" / "probe")))
        assert elsewhere.output == (f"does not see what the driver wrote in {tmp_path / 'elsewhere'}",)
        assert survey.reply(replace(inquiry, word=b"x" * 32)).output == (
            f"sees something else in {tmp_path} than the driver wrote",
        )
        with pytest.raises(StorageError, match="cannot write the output"):
            survey.judge(probe, {0: good, 1: elsewhere}, names)
        old = survey.reply(replace(inquiry, version="0.0.1"))
        assert old.software[0].endswith("the driver has 0.0.1")
        with pytest.raises(UsageError, match="2 machines of the cluster cannot take part"):
            survey.judge(probe, {0: old, 1: "no answer: it died"}, names)
    assert not list(tmp_path.glob("probe*"))


@pytest.mark.parametrize(
    ("address", "said"),
    [("6379", "HOST:PORT"), ("host:", "HOST:PORT"), ("host:70000", "HOST:PORT"), ("ray://host:10001", "client")],
)
def test_addresses_of_another_form_are_refused(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        endpoint.parsed(address)
    assert endpoint.parsed("[::1]:6379") == ("::1", 6379)


def test_a_head_is_asked_for_an_answer_of_its_protocol() -> None:
    def answers(reply: bytes | None) -> str:
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                if reply is not None:
                    client, _ = server.accept()
                    with client:
                        client.recv(64)
                        client.sendall(reply)

            thread = threading.Thread(target=serve)
            thread.start()
            said = endpoint.refusal("127.0.0.1", server.getsockname()[1], seconds=0.3 if reply is None else 5)
            thread.join()
        return said

    assert answers(bytes([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 100])) == ""
    assert answers(b"HTTP/1.1 400 Bad Request\r\n\r\n") == "what answers there is no Ray head"
    assert answers(b"") == "what answers there is no Ray head"
    assert answers(None) == "nothing answers there within 0.3 seconds"


@needs_ray
@pytest.mark.parametrize("said_by", ["--address", "RAY_ADDRESS"])
def test_an_address_where_nothing_answers_is_refused_at_once(
    said_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", free)
    engine = Engine("ray", free if said_by == "--address" else None)
    with pytest.raises(UsageError, match="no Ray cluster answers: connection refused") as told:
        reassemble(RANKS, tmp_path / "out.ckpt", ConvertOptions(strategies=FROM, engine=engine))
    assert told.value.exit_code == 2
    assert told.value.where == (f"{free}, given {'with' if said_by == '--address' else 'in'} {said_by}",)
    assert "ray start --head" in told.value.hint
    assert list(tmp_path.iterdir()) == []


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
        reassemble(RANKS, tmp_path / "out.ckpt", ConvertOptions(strategies=FROM, engine=RAY))
    assert list(tmp_path.iterdir()) == []

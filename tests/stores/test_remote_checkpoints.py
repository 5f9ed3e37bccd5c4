"""Inputs and outputs in stores: what is read and written there is what would be on disk, and the marker decides."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import mindspore
import numpy as np
import pytest
import torch
from botocore.exceptions import ClientError
from gguf import GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from s3fs import S3FileSystem
from safetensors.numpy import save_file

import lorabridge
from lorabridge.actions.reassemble import reassemble
from lorabridge.commands._run import run
from lorabridge.errors import InputError, LorabridgeError, OutputError, StorageError, UsageError
from lorabridge.files import placeholders, stores
from lorabridge.files.stores import Remote
from lorabridge.files.uploading import staged

EXAMPLE = Path(__file__).parents[2] / "examples" / "token-classifier"
RANKS = Path(__file__).parents[1] / "distributed" / "data"
Send = Callable[[Path, str], str]


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with lorabridge.open_checkpoint(path) as checkpoint:
        return {
            name: (str(spec.dtype), spec.shape, np.ascontiguousarray(checkpoint[name]).tobytes())
            for name, spec in checkpoint.specs.items()
        }


def marker(s3: S3FileSystem, key: str) -> dict[str, object]:
    held: dict[str, object] = json.loads(s3.cat_file(key))
    return held


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Linear(32, 40, bias=False))


@pytest.mark.parametrize("name", ["out.ckpt", "out.npz", "out.bin", "out.safetensors"])
def test_a_remote_input_gives_the_bytes_that_a_local_one_gives(send: Send, tmp_path: Path, name: str) -> None:
    url = send(EXAMPLE, "adapter")
    (tmp_path / "local").mkdir()
    lorabridge.convert(EXAMPLE, tmp_path / "local" / name)
    lorabridge.convert(url, tmp_path / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    again = send(tmp_path / name, f"other/{name}")
    assert tensors(placeholders.input_path(again)) == tensors(tmp_path / name)


def test_a_gguf_file_is_read_in_the_store(send: Send, tmp_path: Path) -> None:
    writer = GGUFWriter(str(tmp_path / "lora.gguf"), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    rng = np.random.default_rng(2)
    for side, shape in (("a", (4, 32)), ("b", (48, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    url = send(tmp_path / "lora.gguf", "lora.gguf")
    assert tensors(placeholders.input_path(url)) == tensors(tmp_path / "lora.gguf")


def test_there_and_back_in_the_store_restores_every_bit(send: Send, s3: S3FileSystem, bucket: str) -> None:
    url = send(EXAMPLE, "adapter")
    lorabridge.convert(url, f"s3://{bucket}/deep/er/out.ckpt")
    lorabridge.convert(f"s3://{bucket}/deep/er/out.ckpt", f"s3://{bucket}/back/")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert s3.cat_file(f"{bucket}/back/{name}") == (EXAMPLE / name).read_bytes()
    done = marker(s3, f"{bucket}/deep/er/out.ckpt.lorabridge-commit.json")
    assert done["state"] == "committed"
    sizes = {"out.ckpt", "out.ckpt.lorabridge.json"}
    assert done["files"] == [{"name": n, "size": s3.info(f"{bucket}/deep/er/{n}")["size"]} for n in sorted(sizes)]


def test_mindspore_loads_what_was_sent(send: Send, s3: S3FileSystem, bucket: str, tmp_path: Path) -> None:
    lorabridge.convert(send(EXAMPLE, "adapter"), f"s3://{bucket}/out.ckpt")
    s3.get_file(f"{bucket}/out.ckpt", str(tmp_path / "out.ckpt"))
    held = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    assert {name: value.asnumpy().tobytes() for name, value in held.items()} == {
        name: data for name, (_, _, data) in tensors(tmp_path / "out.ckpt").items()
    }


def test_inspecting_reads_the_header_only(
    send: Send, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"layer.{i}.weight": np.full((512, 1024), i, np.float32) for i in range(12)}
    save_file(weights, tmp_path / "model.safetensors")
    url = send(tmp_path / "model.safetensors", "model.safetensors")
    asked: list[int] = []
    real = Remote.fetch

    def counted(self: Remote, offset: int, length: int) -> bytes:
        asked.append(length)
        return real(self, offset, length)

    monkeypatch.setattr(Remote, "fetch", counted)
    assert run(["inspect", url]) == 0
    assert "12 tensors, 25.2 MB" in capsys.readouterr().out
    assert 0 < sum(asked) <= 2 * stores.BLOCK < sum(value.nbytes for value in weights.values())


def test_a_sharded_set_is_read_by_its_index_and_written_as_one(
    send: Send, s3: S3FileSystem, bucket: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    weights = {f"w{i}": rng.standard_normal((64, 64)).astype(np.float32) for i in range(6)}
    save_file(weights, tmp_path / "model.safetensors")
    cut = lorabridge.ConvertOptions(max_shard_size=40_000, family="identity", target_dialect="hf")
    lorabridge.convert(tmp_path / "model.safetensors", f"s3://{bucket}/cut/", cut)
    shards = [name for name in s3.ls(f"{bucket}/cut") if name.endswith(".safetensors")]
    assert len(shards) == 3
    kept = lorabridge.ConvertOptions(family="identity", target_dialect="hf")
    lorabridge.convert(f"s3://{bucket}/cut", tmp_path / "whole.safetensors", kept)
    assert {n: data for n, (_, _, data) in tensors(tmp_path / "whole.safetensors").items()} == {
        n: value.tobytes() for n, value in weights.items()
    }
    again = lorabridge.ConvertOptions(max_shard_size=80_000, family="identity", target_dialect="hf", overwrite=True)
    lorabridge.convert(tmp_path / "model.safetensors", f"s3://{bucket}/cut/", again)
    assert len([name for name in s3.ls(f"{bucket}/cut") if name.endswith(".safetensors")]) == 2
    assert tensors(placeholders.input_path(f"s3://{bucket}/cut")) == tensors(tmp_path / "whole.safetensors")


def test_merging_in_the_store_is_merging_on_disk(
    model: torch.nn.Module, send: Send, s3: S3FileSystem, bucket: str, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, base)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], init_lora_weights=False))
    assert isinstance(tuned, PeftModel)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    lorabridge.merge(base, [tmp_path / "adapter"], tmp_path / "merged.safetensors")
    lorabridge.merge(
        send(base, "base.safetensors"), [send(tmp_path / "adapter", "adapter")], f"s3://{bucket}/merged.safetensors"
    )
    s3.get_file(f"{bucket}/merged.safetensors", str(tmp_path / "again.safetensors"))
    assert tensors(tmp_path / "again.safetensors") == tensors(tmp_path / "merged.safetensors")


def test_a_merge_is_verified_from_its_record_wherever_its_files_lie(
    model: torch.nn.Module, send: Send, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.safetensors"
    save_file({name: value.numpy() for name, value in model.state_dict().items()}, base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)).save_pretrained(
        str(tmp_path / "adapter")
    )
    far, adapter = send(base, "base.safetensors"), send(tmp_path / "adapter", "adapters/one")
    places = ("merged.safetensors", "models/merged.safetensors")
    for target in [*(f"s3://{bucket}/{place}" for place in places), str(tmp_path / "merged.safetensors")]:
        assert run(["merge", far, adapter, target, "--undo", f"{target}.undo"]) == 0
        placeholders._PLACED = placeholders._Placed()  # another process
        assert run(["verify", far, target]) == 0
        assert f"{adapter} merged into it again" in capsys.readouterr().out
        back = f"{target}.back.safetensors"
        assert run(["unmerge", target, back, "--adapter", adapter, "--undo", f"{target}.undo"]) == 0
        assert run(["diff", str(base), back]) == 0
    assert b"lorabridge-remote" not in (tmp_path / "merged.safetensors").read_bytes()


def test_what_is_extracted_in_the_store_names_its_base_as_the_store_does(
    model: torch.nn.Module, send: Send, s3: S3FileSystem, bucket: str, tmp_path: Path
) -> None:
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "base.safetensors")
    weights["0.weight"] = weights["0.weight"] + np.outer(np.ones(32), np.arange(24)).astype(np.float32)
    save_file(weights, tmp_path / "tuned.safetensors")
    base = send(tmp_path / "base.safetensors", "base.safetensors")
    tuned = send(tmp_path / "tuned.safetensors", "tuned.safetensors")
    assert run(["extract", base, tuned, f"s3://{bucket}/found/", "--rank", "2"]) == 0
    assert json.loads(s3.cat_file(f"{bucket}/found/adapter_config.json"))["base_model_name_or_path"] == base
    assert not any(b"lorabridge-remote" in s3.cat_file(key) for key in s3.find(f"{bucket}/found"))


def test_tables_lie_in_the_store_too(send: Send, bucket: str, tmp_path: Path) -> None:
    table = (Path(__file__).parents[2] / "mappings" / "llama.toml").read_text().replace('"llama"', '"mine"', 1)
    (tmp_path / "mine.toml").write_text(table)
    send(tmp_path / "mine.toml", "tables/mine.toml")
    assert run(["tables", "check", f"s3://{bucket}/tables/mine.toml"]) == 0
    assert run(["tables", "show", "mine", "--mappings", f"s3://{bucket}/tables"]) == 0


def test_reports_name_places_as_the_store_does(send: Send, bucket: str) -> None:
    url = send(EXAMPLE, "adapter")
    done = lorabridge.convert(url, f"s3://{bucket}/out.ckpt")
    assert (done.source, done.target) == (url, f"s3://{bucket}/out.ckpt")
    assert lorabridge.inspect(url).path == url
    with lorabridge.open_checkpoint(url) as checkpoint:
        assert url in repr(checkpoint)


def test_ranks_are_cut_into_the_store_and_put_together_again(
    model: torch.nn.Module, send: Send, s3: S3FileSystem, bucket: str, tmp_path: Path
) -> None:
    base = tmp_path / "base.safetensors"
    save_file({name: value.numpy() for name, value in model.state_dict().items() if value.ndim == 2}, base)
    assert run(["reshard", str(base), f"s3://{bucket}/ranks", "--opt-shard", "2"]) == 0
    assert f"{bucket}/ranks/rank_1/checkpoint.safetensors" in s3.find(f"{bucket}/ranks")
    assert run(["reassemble", f"s3://{bucket}/ranks", f"s3://{bucket}/whole.safetensors"]) == 0
    assert tensors(placeholders.input_path(f"s3://{bucket}/whole.safetensors")) == tensors(base)


@pytest.mark.parametrize(
    "name", ["dcp_peft_fsdp2", "deepspeed_zero3_lora", "deepspeed_parallel/pipeline", "torch_ranks/tp", "universal"]
)
def test_ranks_in_the_store_are_reassembled_as_on_disk(send: Send, tmp_path: Path, name: str) -> None:
    ranks = RANKS / name
    if name == "universal":  # as ds_to_universal writes it; its tag is read from a file too
        ranks = tmp_path / name
        for layer in ("0.weight", "1.bias"):
            (ranks / "step1_universal" / "zero" / layer).mkdir(parents=True)
            torch.save({"param": torch.randn(4, 4)}, ranks / "step1_universal" / "zero" / layer / "fp32.pt")
        (ranks / "latest_universal").write_text("step1_universal\n")
    reassemble(ranks, tmp_path / "local.safetensors", lorabridge.ConvertOptions())
    reassemble(send(ranks, "ranks"), tmp_path / "far.safetensors", lorabridge.ConvertOptions())
    assert (tmp_path / "far.safetensors").read_bytes() == (tmp_path / "local.safetensors").read_bytes()


def test_an_output_that_was_never_completed_is_not_read_and_is_written_over(
    send: Send, s3: S3FileSystem, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"s3://{bucket}/out/"
    lorabridge.convert(EXAMPLE, target)
    held = marker(s3, f"{bucket}/out/lorabridge-commit.json")
    s3.pipe_file(f"{bucket}/out/lorabridge-commit.json", json.dumps({**held, "state": "writing"}).encode())
    with pytest.raises(InputError, match="never completed") as caught:
        lorabridge.convert(target, f"s3://{bucket}/next.ckpt")
    assert f"s3://{bucket}/out/adapter_model.ckpt" in caught.value.where
    lorabridge.convert(EXAMPLE, target)
    lorabridge.convert(target, f"s3://{bucket}/next.ckpt")


def test_a_failed_run_takes_back_what_it_sent(
    send: Send, s3: S3FileSystem, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = send(EXAMPLE, "adapter")
    real, sent = stores.Store.put, []

    def failing(self: stores.Store, path: Path, key: str) -> Remote:
        if sent:
            with self.asked(key):
                raise ClientError({"Error": {"Code": "SlowDown", "Message": "Reduce your request rate"}}, "PutObject")
        sent.append(key)
        return real(self, path, key)

    monkeypatch.setattr(stores.Store, "put", failing)
    with pytest.raises(StorageError, match="Reduce your request rate"):
        lorabridge.convert(url, f"s3://{bucket}/out/")
    assert sent
    assert s3.find(f"{bucket}/out") == []


def test_what_was_under_way_when_a_run_was_interrupted_is_never_read(
    s3: S3FileSystem, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stores.Store.put

    def interrupted(self: stores.Store, path: Path, key: str) -> Remote:
        real(self, path, key)
        raise KeyboardInterrupt

    monkeypatch.setattr(stores.Store, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorabridge.convert(EXAMPLE, f"s3://{bucket}/out.ckpt")
    assert not s3.exists(f"{bucket}/out.ckpt")
    s3.pipe_file(f"{bucket}/out.ckpt", b"the rest of it arrives")
    with pytest.raises(InputError, match="never completed"):
        lorabridge.convert(f"s3://{bucket}/out.ckpt", f"s3://{bucket}/next/")
    monkeypatch.setattr(stores.Store, "put", real)
    lorabridge.convert(EXAMPLE, f"s3://{bucket}/out.ckpt")
    assert marker(s3, f"{bucket}/out.ckpt.lorabridge-commit.json")["state"] == "committed"


def test_a_failed_overwriting_leaves_a_marker_that_says_so(
    s3: S3FileSystem, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorabridge.convert(EXAMPLE, f"s3://{bucket}/out/")

    def refused(self: stores.Store, path: Path, key: str) -> Remote:
        raise StorageError("the store refused")

    monkeypatch.setattr(stores.Store, "put", refused)
    with pytest.raises(StorageError):
        lorabridge.convert(EXAMPLE, f"s3://{bucket}/out/", lorabridge.ConvertOptions(overwrite=True))
    assert marker(s3, f"{bucket}/out/lorabridge-commit.json")["state"] == "writing"
    with pytest.raises(InputError, match="never completed"):
        lorabridge.convert(f"s3://{bucket}/out/", f"s3://{bucket}/next.ckpt")


def test_an_existing_output_is_refused_without_overwrite(s3: S3FileSystem, bucket: str) -> None:
    lorabridge.convert(EXAMPLE, f"s3://{bucket}/out.ckpt")
    before = s3.info(f"{bucket}/out.ckpt")["ETag"]
    with pytest.raises(OutputError, match="exists already"):
        lorabridge.convert(EXAMPLE, f"s3://{bucket}/out.ckpt")
    assert s3.info(f"{bucket}/out.ckpt")["ETag"] == before
    with pytest.raises(OutputError, match="inside the input"):
        lorabridge.convert(send_example(s3, bucket), f"s3://{bucket}/in/out.ckpt")


def send_example(s3: S3FileSystem, bucket: str) -> str:
    for file in EXAMPLE.iterdir():
        s3.put_file(str(file), f"{bucket}/in/{file.name}")
    return f"s3://{bucket}/in"


def test_an_input_that_is_written_again_meanwhile_is_refused(
    send: Send, s3: S3FileSystem, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = send(EXAMPLE, "adapter")
    real = Remote.fetch
    other = (EXAMPLE / "adapter_model.safetensors").read_bytes()[:-4] + b"\0\0\0\0"

    def swapped(self: Remote, offset: int, length: int) -> bytes:
        data = real(self, offset, length)
        if self.key.endswith(".safetensors"):
            s3.pipe_file(self.key, other)
        return data

    monkeypatch.setattr(Remote, "fetch", swapped)
    with pytest.raises(InputError, match="changed during the run") as caught:
        lorabridge.convert(url, tmp_path / "out.ckpt")
    assert caught.value.where == (f"{url}/adapter_model.safetensors",)
    assert list(tmp_path.iterdir()) == []


def test_messages_and_reports_use_the_names_of_the_store(
    send: Send, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = send(EXAMPLE, "adapter")
    assert run(["inspect", url, "--html", str(tmp_path / "page.html")]) == 0
    assert run(["convert", url, f"s3://{bucket}/out.ckpt"]) == 0
    assert run(["verify", url, f"s3://{bucket}/out.ckpt", "--depth", "tensors", "--report", f"{tmp_path}/v.html"]) == 0
    assert run(["verify", url, f"s3://{bucket}/out.ckpt", "--depth", "tensors", "--json"]) == 0
    assert run(["convert", f"s3://{bucket}/absent", str(tmp_path / "x.ckpt")]) == 3
    said = capsys.readouterr()
    written = "".join((tmp_path / name).read_text() for name in ("page.html", "v.html"))
    assert f"s3://{bucket}/absent" in said.err
    assert "lorabridge-remote" not in said.out + said.err + written
    assert f"s3:/<wbr>/<wbr>{bucket}/<wbr>adapter" in written or f"s3://<wbr>{bucket}" in written


def test_a_report_can_be_sent_to_the_store(send: Send, s3: S3FileSystem, bucket: str) -> None:
    url = send(EXAMPLE, "adapter")
    assert run(["inspect", url, "--html", f"s3://{bucket}/pages/a.html"]) == 0
    assert b"token-classifier" in s3.cat_file(f"{bucket}/pages/a.html") or s3.size(f"{bucket}/pages/a.html") > 1000


@pytest.mark.parametrize(
    ("location", "kind", "said"),
    [
        ("https://example.org/adapter.bin", UsageError, "web addresses"),
        ("gopher://a/b", UsageError, "no store"),
        ("s3://no-such-bucket-here/adapter", InputError, "no such object"),
        ("s3://a/../b", UsageError, "dotted"),
    ],
)
def test_locations_that_lead_nowhere(
    options: object, location: str, kind: type[LorabridgeError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        lorabridge.convert(location, tmp_path / "out.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_the_cure_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stores.store.cache_clear()
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "s3fs", raising=False)
    with pytest.raises(UsageError, match="s3fs not installed") as caught:
        lorabridge.convert("s3://a/b", tmp_path / "out.ckpt")
    assert "lorabridge[remote]" in caught.value.hint


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    once = {"retries": {"total_max_attempts": 1}}
    dead = {"endpoint_url": "http://127.0.0.1:9", "key": "k", "secret": "s", "config_kwargs": once}
    monkeypatch.setitem(fsspec.config.conf, "s3", dead)
    monkeypatch.setattr(placeholders, "_PLACED", placeholders._Placed())
    stores.store.cache_clear()
    try:
        with pytest.raises(StorageError, match="the store refused") as caught:
            lorabridge.convert("s3://a/b", tmp_path / "out.ckpt")
    finally:
        stores.store.cache_clear()
    assert caught.value.where == ("s3://a/b",)
    assert "FSSPEC_S3_ENDPOINT_URL" in caught.value.hint


def test_obs_is_reached_through_its_s3_interface(
    send: Send, options: dict[str, object], bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = send(EXAMPLE, "adapter")
    monkeypatch.setitem(fsspec.config.conf, "obs", options)
    monkeypatch.delitem(fsspec.config.conf, "s3")
    lorabridge.convert(url.replace("s3://", "obs://"), f"obs://{bucket}/out.ckpt")
    lorabridge.convert(f"obs://{bucket}/out.ckpt", tmp_path / "back")
    assert (tmp_path / "back/adapter_model.safetensors").read_bytes() == (
        EXAMPLE / "adapter_model.safetensors"
    ).read_bytes()


def test_no_placeholder_is_taken_for_a_file(send: Send) -> None:
    path = placeholders.input_path(send(EXAMPLE, "adapter")) / "adapter_model.safetensors"
    assert path.read_text().startswith("This file stands for s3://")
    shutil.copy(path, copied := path.with_name("copied.safetensors"))
    with pytest.raises(InputError):
        lorabridge.open_checkpoint(copied)


def test_an_area_of_the_store_keeps_only_open_files_on_disk(bucket: str, s3: S3FileSystem) -> None:
    target = placeholders.output_path(f"s3://{bucket}/out/")
    with staged(Path(target), digest="a" * 64, overwrite=False, directory=True) as area:
        file = area.create("one.bin")
        file.allocate(1 << 20)
        file.write(0, b"x" * (1 << 20))
        assert file.path.stat().st_size == 1 << 20
        file.close()
        assert file.path.stat().st_size < 200
        assert s3.info(f"{bucket}/out/one.bin")["size"] == 1 << 20
        assert marker(s3, f"{bucket}/out/lorabridge-commit.json")["state"] == "writing"
        area.commit()
    assert marker(s3, f"{bucket}/out/lorabridge-commit.json")["state"] == "committed"


def test_large_objects_travel_in_blocks_and_parts(
    send: Send, s3: S3FileSystem, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PART", 5 << 20)  # the least that S3 allows
    rng = np.random.default_rng(3)
    save_file({"w": rng.standard_normal((3000, 1500)).astype(np.float32)}, tmp_path / "model.safetensors")
    kept = lorabridge.ConvertOptions(family="identity", target_dialect="ms")
    url = send(tmp_path / "model.safetensors", "model.safetensors")
    lorabridge.convert(url, f"s3://{bucket}/model.ckpt", kept)
    lorabridge.convert(f"s3://{bucket}/model.ckpt", tmp_path / "back.safetensors")
    assert s3.info(f"{bucket}/model.ckpt")["ETag"].strip('"').endswith("-4")  # as many parts as were sent
    assert tensors(tmp_path / "back.safetensors") == tensors(tmp_path / "model.safetensors")


def test_cleaning_a_store_is_refused_with_what_to_do(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["clean", f"s3://{bucket}/out"]) == 2
    assert "run the command" in capsys.readouterr().err


def test_a_killed_run_leaves_a_directory_that_the_next_one_removes(
    options: dict[str, object], send: Send, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal; from lorabridge.files import placeholders as p, stores as s;"
        "p._PLACED.path(s.Store('s3', None), 'bucket/key'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environ, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    own = placeholders.input_path(send(EXAMPLE, "adapter"))
    assert not left.exists()
    assert own.is_dir()
    assert own.is_relative_to(tmp_path)

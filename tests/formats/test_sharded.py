"""Sharded sets against transformers, huggingface_hub, torch and MindSpore, over every container."""

from __future__ import annotations

import json
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from disk_files import DiskFile, into
from huggingface_hub import save_torch_state_dict
from huggingface_hub.serialization._base import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, LorabridgeError, MappingError, UsageError
from lorabridge.files.fsio import Staging
from lorabridge.formats import FORMATS, WHOLE, make_sink, open_source
from lorabridge.formats.sharded import MAX_OPEN, open_index
from lorabridge.formats.shardsink import main_file, split
from lorabridge.tensors import Source, TensorSpec

FILES = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin", "mindspore": "model.ckpt"}

STATE = {
    "z.weight": np.arange(20, dtype=np.float32).reshape(4, 5),
    "a.weight": np.arange(6, dtype=np.int64),
    "none": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.5, np.float64),
    "big": np.arange(50, dtype=np.float16),
    "last": np.array([1, 0, 1], bool),
}


def specs(state: dict[str, np.ndarray]) -> list[TensorSpec]:
    return [TensorSpec(name, BY_NAME[str(value.dtype)], value.shape) for name, value in state.items()]


def write(
    directory: Path, format: str, *, size: int | None, state: dict[str, np.ndarray] = STATE, seed: int = 0
) -> Path:
    sink = make_sink(format, into(directory), FILES[format], max_shard_size=size)
    sink.begin(specs(state), {})
    order = list(state)
    random.Random(seed).shuffle(order)
    for name in order:
        sink.write(name, 0, state[name])
    sink.finish()
    index = directory / f"{FILES[format]}.index.json"
    return index if index.exists() else directory / FILES[format]


def check(source: Source, state: dict[str, np.ndarray]) -> None:
    assert {name: spec.shape for name, spec in source.specs.items()} == {n: v.shape for n, v in state.items()}
    for name, value in state.items():
        assert source.read(name).tobytes() == value.tobytes()
        if value.ndim:
            assert (
                source.read(name, (value.shape[0] // 2, value.shape[0])).tobytes()
                == value[value.shape[0] // 2 :].tobytes()
            )


@pytest.mark.parametrize("format", FILES)
def test_shards_of_every_container_round_trip(format: str, tmp_path: Path) -> None:
    state = {name: value for name, value in STATE.items() if value.size or format != "mindspore"}
    path = write(tmp_path, format, size=100, state=state)
    assert path.name == main_file(specs(state), FILES[format], 100) == f"{FILES[format]}.index.json"
    source = open_source(path)
    assert source.format == format
    assert source.path == path
    check(source, state)
    source.close()
    check(open_source(tmp_path), state)
    suffix = Path(FILES[format]).suffix
    shards = sorted(p.name for p in tmp_path.iterdir() if p.suffix == suffix)
    stem = FILES[format].removesuffix(suffix)
    assert shards == [f"{stem}-{i:05d}-of-{len(shards):05d}{suffix}" for i in range(1, len(shards) + 1)]
    assert len(shards) > 1


@pytest.mark.parametrize("format", FILES)
def test_one_shard_is_a_plain_file_without_index(format: str, tmp_path: Path) -> None:
    state = {name: value for name, value in STATE.items() if value.size or format != "mindspore"}
    path = write(tmp_path, format, size=10**6, state=state)
    assert [p.name for p in tmp_path.iterdir()] == [FILES[format]]
    assert main_file(specs(state), FILES[format], 10**6) == main_file(specs(state), FILES[format], None) == path.name
    check(open_source(path), state)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert write(plain, format, size=None, state=state).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("format", WHOLE)
def test_containers_without_shards_say_so(format: str, tmp_path: Path) -> None:
    assert {*WHOLE, *FILES} == set(FORMATS)
    with pytest.raises(UsageError, match="not split"):
        make_sink(format, into(tmp_path), f"a.{format}", max_shard_size=100)


def test_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    contents = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        write(folder, "safetensors", size=60, seed=seed)
        contents.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert contents[0] == contents[1] == contents[2]


def test_sets_hold_what_huggingface_hub_puts_into_them(tmp_path: Path) -> None:
    state = {name: torch.from_numpy(value.copy()) for name, value in STATE.items()}
    (tmp_path / "hub").mkdir()
    save_torch_state_dict(state, tmp_path / "hub", max_shard_size=100)
    (tmp_path / "ours").mkdir()
    ours = write(tmp_path / "ours", "safetensors", size=100)
    theirs = tmp_path / "hub" / "model.safetensors.index.json"
    assert json.loads(ours.read_text())["weight_map"] == json.loads(theirs.read_text())["weight_map"]
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    check(open_source(theirs), STATE)
    for name in set(json.loads(ours.read_text())["weight_map"].values()):
        theirs_state = safetensors.torch.load_file(tmp_path / "hub" / name)
        ours_state = safetensors.torch.load_file(tmp_path / "ours" / name)
        assert set(theirs_state) == set(ours_state)
        assert all(torch.equal(theirs_state[key], ours_state[key]) for key in ours_state)


@settings(deadline=None, max_examples=200)
@given(sizes=st.lists(st.integers(0, 12), max_size=12), limit=st.integers(1, 15))
def test_sets_are_cut_where_huggingface_hub_cuts_them(sizes: list[int], limit: int) -> None:
    wanted = {f"t{i}": TensorSpec(f"t{i}", BY_NAME["uint8"], (size,)) for i, size in enumerate(sizes)}
    theirs = (
        split_state_dict_into_shards_factory(
            wanted, get_storage_size=lambda spec: spec.nbytes, filename_pattern="m{suffix}", max_shard_size=limit
        )
        if wanted
        else None
    )
    ours = [[spec.name for spec in part] for part in split(list(wanted.values()), limit)]
    assert ours == (list(theirs.filename_to_tensors.values()) if theirs else [[]])


def test_transformers_sets_are_read_and_ours_are_loaded_by_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50, n_positions=8)
    config.bos_token_id = config.eos_token_id = 0
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    source = open_source(tmp_path / "theirs")
    assert source.format == "safetensors"
    assert dict(source.metadata) == {"format": "pt"}
    saved = {n: t for n, t in model.state_dict().items() if n in source.specs}
    assert len(saved) == len(source.specs) > 20
    for name, tensor in saved.items():
        assert source.read(name).tobytes() == tensor.numpy().tobytes()
    (tmp_path / "ours").mkdir()
    sink = make_sink("safetensors", into(tmp_path / "ours"), "model.safetensors", max_shard_size=3000)
    sink.begin(list(source.specs.values()), source.metadata)
    for name in source.specs:
        for extent in source.extents(name):
            sink.copy(name, 0, extent)
    sink.finish()
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    assert len(list((tmp_path / "ours").glob("model-*"))) > 2
    for folder in ("theirs", "ours"):  # the same spelling: two spaces, sorted keys, a line end
        text = (tmp_path / folder / "model.safetensors.index.json").read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_torch_sets_go_both_ways(tmp_path: Path) -> None:
    state = {name: torch.from_numpy(value.copy()) for name, value in STATE.items()}
    (tmp_path / "hub").mkdir()
    save_torch_state_dict(state, tmp_path / "hub", max_shard_size=100, safe_serialization=False)
    check(open_source(tmp_path / "hub" / "pytorch_model.bin.index.json"), STATE)
    write(tmp_path, "torch", size=100)
    loaded: dict[str, torch.Tensor] = {}
    for shard in tmp_path.glob("pytorch_model-*.bin"):
        loaded |= torch.load(shard, weights_only=True)
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_mindspore_shards_load_in_mindspore(tmp_path: Path) -> None:
    mindspore = pytest.importorskip("mindspore")
    mindspore.train.serialization._get_available_memory = lambda: None
    state = {name: value for name, value in STATE.items() if value.size}
    index = write(tmp_path, "mindspore", size=100, state=state)
    for name, shard in json.loads(index.read_text())["weight_map"].items():
        assert mindspore.load_checkpoint(str(tmp_path / shard))[name].asnumpy().tobytes() == state[name].tobytes()
    sink = make_sink("safetensors", into(tmp_path), "ms.safetensors", max_shard_size=100, flavour="ms")
    sink.begin(specs(state), {})
    for name, value in state.items():
        sink.write(name, 0, value)
    sink.finish()
    weights = json.loads((tmp_path / "ms.safetensors.index.json").read_text())["weight_map"]
    for name, shard in weights.items():
        loaded = mindspore.load_checkpoint(str(tmp_path / shard), format="safetensors")
        assert loaded[name].asnumpy().tobytes() == state[name].tobytes()


def test_mindspores_param_name_map_is_an_index(tmp_path: Path) -> None:
    state = {name: torch.from_numpy(value.copy()) for name, value in STATE.items()}
    halves = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    weights = {}
    for number, half in enumerate(halves):
        safetensors.torch.save_file(half, tmp_path / f"part{number}.safetensors", metadata={"format": "ms"})
        weights |= dict.fromkeys(half, f"part{number}.safetensors")
    (tmp_path / "param_name_map.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weights}, indent=4)
    )
    source = open_source(tmp_path)
    assert source.metadata == {"format": "ms"}
    check(source, STATE)


def test_metadata_that_differs_between_shards_is_kept_under_the_shards_name(tmp_path: Path) -> None:
    for name, note in (("a", "one"), ("b", "two")):
        safetensors.torch.save_file(
            {name: torch.ones(1)}, tmp_path / f"{name}.safetensors", metadata={"format": "pt", "note": note}
        )
    (tmp_path / "x.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    )
    found = open_source(tmp_path).metadata
    assert found == {"format": "pt", "a.safetensors/note": "one", "b.safetensors/note": "two"}


def test_a_manifest_in_the_metadata_is_written_once(tmp_path: Path) -> None:
    sink = make_sink("safetensors", into(tmp_path), "model.safetensors", max_shard_size=50)
    sink.begin(specs(STATE), {"manifest": "m" * 1000, "format": "np"})
    for name, value in STATE.items():
        sink.write(name, 0, value)
    sink.finish()
    assert sum(b"mmmm" in p.read_bytes() for p in tmp_path.iterdir()) == 1
    assert open_source(tmp_path).metadata == {"manifest": "m" * 1000, "format": "np"}


def test_staging_publishes_a_sharded_set(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", digest="0123456789ab", overwrite=False, directory=True) as staging:
        sink = make_sink("safetensors", staging.create, "model.safetensors", max_shard_size=100)
        sink.begin(specs(STATE), {})
        for name, value in STATE.items():
            sink.write(name, 0, value)
        sink.finish()
        staging.commit()
    check(open_source(tmp_path / "out"), STATE)


def test_more_shards_than_descriptors_are_written_and_read_by_threads(tmp_path: Path) -> None:
    state = {f"t{i}": np.full(4, i, np.int32) for i in range(300)}
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + MAX_OPEN + 30, hard))
    try:
        DiskFile.opened = DiskFile.most = 0  # other tests leave files open
        path = write(tmp_path, "safetensors", size=16, state=state, seed=4)
        assert DiskFile.most < 8
        source = open_index(path)
        assert len(source.specs) == 300
        with ThreadPoolExecutor(8) as pool:
            values = list(pool.map(lambda i: source.read(f"t{i * 7 % 300}").tolist(), range(900)))
        assert values == [[i * 7 % 300] * 4 for i in range(900)]
        source.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_shard_that_changes_while_it_is_closed_is_noticed(tmp_path: Path) -> None:
    state = {f"t{i}": np.full(4, i, np.int32) for i in range(MAX_OPEN + 5)}
    source = open_index(write(tmp_path, "safetensors", size=16, state=state))
    first = tmp_path / f"model-00001-of-{len(state):05d}.safetensors"
    first.unlink()
    safetensors.torch.save_file({"t0": torch.zeros(5)}, first)
    with pytest.raises(InputError, match="changed") as caught:
        source.read("t0")
    assert caught.value.where == (str(first),)


def test_what_a_shard_cannot_hold_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    sink = make_sink("safetensors", into(tmp_path), "m.safetensors", max_shard_size=4)
    wanted = [TensorSpec("a", BY_NAME["float32"], (1,)), TensorSpec("b", BY_NAME["complex128"], (1,))]
    with pytest.raises(MappingError, match="complex128"):
        sink.begin(wanted, {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tensor_is_a_defect_and_leaves_no_index(tmp_path: Path) -> None:
    sink = make_sink("safetensors", into(tmp_path), "m.safetensors", max_shard_size=40)
    sink.begin(specs(STATE), {})
    for name in list(STATE)[:-1]:
        sink.write(name, 0, STATE[name])
    with pytest.raises(LorabridgeError, match="last"):
        sink.finish()
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("size", [0, -5])
def test_shards_of_no_size_are_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        make_sink("safetensors", into(tmp_path), "m.safetensors", max_shard_size=size)

"""Selection, casts, containers, determinism, and the promise that a failure leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lorabridge import ConvertOptions, convert, open_checkpoint
from lorabridge.errors import InputError, LorabridgeError, MappingError, OutputError, UsageError

EXAMPLE = Path(__file__).parents[2] / "examples" / "token-classifier"
BARE = EXAMPLE.with_name("token-classifier-bin") / "peft_adapter.bin"


def files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()}


def test_every_container_holds_the_same_bits(tmp_path: Path) -> None:
    expected = load_file(EXAMPLE / "adapter_model.safetensors")
    for name in ("a.ckpt", "a.safetensors", "a.bin", "a.pt"):
        to = "loralib-ms" if name.endswith(".ckpt") else "peft"
        convert(EXAMPLE, tmp_path / name, ConvertOptions(target_dialect=to))
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert sorted(a.tobytes() for a in checkpoint.values()) == sorted(a.tobytes() for a in expected.values())
    assert sorted(torch.load(tmp_path / "a.pt", weights_only=True)) == sorted(expected)


def test_select_layers_and_modules(tmp_path: Path) -> None:
    report = convert(EXAMPLE, tmp_path / "out.ckpt", ConvertOptions(include=("*.query",), layers="0-5:2"))
    assert [m.path.split(".")[3] for m in report.modules] == ["0", "2", "4"]
    assert len(report.unselected) == 26 - 6
    assert report.left_out == ()
    with pytest.raises(MappingError, match="matches no module"):
        convert(EXAMPLE, tmp_path / "none.ckpt", ConvertOptions(include=("*.key",)))
    with pytest.raises(UsageError, match="layers"):
        convert(EXAMPLE, tmp_path / "none.ckpt", ConvertOptions(layers="5-1"))


def test_casts_round_once(tmp_path: Path) -> None:
    report = convert(EXAMPLE, tmp_path / "out.safetensors", ConvertOptions(target_dialect="peft", dtype="bf16"))
    assert report.rounding
    source = torch.from_numpy(load_file(EXAMPLE / "adapter_model.safetensors")["base_model.model.classifier.weight"])
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        made = checkpoint["base_model.model.classifier.weight"]
    assert made.tobytes() == source.to(torch.bfloat16).view(torch.int16).numpy().tobytes()


@pytest.mark.parametrize(("policy", "value"), [("saturate", 65504.0), ("inf", np.inf)])
def test_overflow_is_an_error_unless_told(policy: str, value: float, tmp_path: Path) -> None:
    save_file({"w": np.array([1.0, 7e4], np.float32)}, tmp_path / "in.safetensors")
    options = ConvertOptions(target_dialect="ms", family="identity", dtype="fp16")
    with pytest.raises(MappingError, match="fit"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.ckpt", options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]
    options = ConvertOptions(target_dialect="ms", family="identity", dtype="fp16", on_overflow=policy)
    convert(tmp_path / "in.safetensors", tmp_path / "out.ckpt", options)
    with open_checkpoint(tmp_path / "out.ckpt") as checkpoint:
        assert checkpoint["w"].tolist() == [1.0, value]


def test_a_dtype_that_the_target_lacks_names_the_tensor(tmp_path: Path) -> None:
    torch.save({"h.w": torch.zeros(3, dtype=torch.float8_e4m3fn), "h.v": torch.zeros(2)}, tmp_path / "in.pt")
    with pytest.raises(MappingError) as raised:
        convert(tmp_path / "in.pt", tmp_path / "out.ckpt", ConvertOptions(family="identity"))
    assert "h.w" in str(raised.value)
    assert "--dtype" in raised.value.hint
    convert(tmp_path / "in.pt", tmp_path / "out.ckpt", ConvertOptions(family="identity", dtype="fp16"))


def test_output_bytes_do_not_depend_on_workers_or_input_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"h.{i}.w": rng.standard_normal((64, 32), dtype=np.float32) for i in range(20)}
    seen = set()
    for k, workers in enumerate((1, 2, 5)):
        order = [list(tensors)[i] for i in rng.permutation(len(tensors))]
        torch.save({name: torch.from_numpy(tensors[name]) for name in order}, tmp_path / f"{k}.pt")
        out = tmp_path / f"{k}.ckpt"
        convert(tmp_path / f"{k}.pt", out, ConvertOptions(family="identity", workers=workers))
        with open_checkpoint(out) as checkpoint:
            assert list(checkpoint.specs) == list(tensors)
        seen.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(seen) == 1


def test_output_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    seen = []
    for seed in ("0", "1", "2"):
        out = tmp_path / seed
        out.mkdir()
        command = [sys.executable, "-m", "lorabridge", "convert", str(EXAMPLE), str(out / "out.ckpt"),
                   "--family", "bert", "--to", "mindpet", "--exclude", "classifier*"]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True)
        seen.append(files(out))
    assert seen[0] == seen[1] == seen[2]


def test_nothing_is_written_over_without_leave(tmp_path: Path) -> None:
    (tmp_path / "out.ckpt").write_text("mine")
    with pytest.raises(OutputError) as raised:
        convert(EXAMPLE, tmp_path / "out.ckpt")
    assert raised.value.exit_code == 5
    assert (tmp_path / "out.ckpt").read_text() == "mine"
    convert(EXAMPLE, tmp_path / "out.ckpt", ConvertOptions(overwrite=True))
    with open_checkpoint(tmp_path / "out.ckpt") as checkpoint:
        assert len(checkpoint) == 26
    with pytest.raises(OutputError, match="input"):
        convert(BARE, BARE, ConvertOptions(overwrite=True, target_dialect="peft"))


def test_dry_run_writes_nothing_and_plans_the_same(tmp_path: Path) -> None:
    dry = convert(EXAMPLE, tmp_path / "out.ckpt", ConvertOptions(dry_run=True))
    assert not list(tmp_path.iterdir())
    real = convert(EXAMPLE, tmp_path / "out.ckpt")
    assert dry.digest == real.digest
    assert dry.nbytes == real.nbytes


def damaged(folder: Path, change) -> Path:
    """Return a copy of the example with its tensors changed."""
    tensors = load_file(EXAMPLE / "adapter_model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_bytes((EXAMPLE / "adapter_config.json").read_bytes())
    return folder


PREFIX = "base_model.model.bert.encoder.layer.2.attention.self.query."
DAMAGE = {
    "half a pair": lambda t: t.pop(PREFIX + "lora_B.weight"),
    "unknown tensor": lambda t: t.update({PREFIX + "mystery": np.zeros(3, np.float32)}),
    "rank differs": lambda t: t.update({PREFIX + "lora_A.weight": np.zeros((4, 384), np.float32)}),
    "two prefixes": lambda t: t.update({"other.x.lora_A.weight": t.pop(PREFIX + "lora_A.weight")}),
    "emptied by ZeRO-3": lambda t: t.update({PREFIX + "lora_A.weight": np.zeros((0,), np.float32)}),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    source = damaged(tmp_path / "in", DAMAGE[name])
    with pytest.raises(LorabridgeError) as raised:
        convert(source, tmp_path / "out.ckpt")
    assert raised.value.exit_code in (3, 4)
    assert raised.value.where
    assert raised.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_truncated_input_is_refused(tmp_path: Path) -> None:
    data = BARE.read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.bin").write_bytes(data[:length])
        with pytest.raises(InputError):
            convert(tmp_path / "cut.bin", tmp_path / "out.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.bin"]


def test_shards_need_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="directory"):
        convert(EXAMPLE, tmp_path / "out.ckpt", ConvertOptions(max_shard_size=1000))


def test_sharded_model_and_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    save_file({f"h.{i}.w": rng.standard_normal((16, 16), dtype=np.float32) for i in range(8)},
              tmp_path / "in" / "model.safetensors")  # fmt: skip
    options = ConvertOptions(family="identity", target_dialect="ms", max_shard_size=3000)
    convert(tmp_path / "in", tmp_path / "out/", options)
    assert len(list((tmp_path / "out").glob("*.ckpt"))) == 4
    convert(tmp_path / "out", tmp_path / "back")
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "back"))
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}


def test_compress_to_a_rank(tmp_path: Path) -> None:
    report = convert(EXAMPLE, tmp_path / "out", ConvertOptions(target_dialect="peft", compress="4"))
    assert {module.rank for module in report.modules} == {4}
    tensors = load_file(EXAMPLE / "adapter_model.safetensors")
    small = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (tensors[PREFIX + f"lora_{x}.weight"].astype(np.float64) for x in "AB")
    c, d = (small[PREFIX + f"lora_{x}.weight"].astype(np.float64) for x in "AB")
    singular = np.linalg.svd(2 * b @ a, compute_uv=False)
    scaling = next(m.scaling for m in report.modules if PREFIX.removeprefix("base_model.model.")[:-1] == m.path)
    assert np.linalg.norm(2 * b @ a - scaling * d @ c) == pytest.approx(np.linalg.norm(singular[4:]), rel=1e-4)

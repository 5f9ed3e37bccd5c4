"""Encrypted checkpoints on the command line: keys from files and the environment, both ways, through MindSpore."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest

import lorabridge
from lorabridge.actions.choices import ConvertOptions
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import InputError, UsageError
from lorabridge.formats import keys

EXAMPLE = Path(__file__).parents[2] / "examples" / "token-classifier"
SECRET = b"0123456789abcdef"


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    monkeypatch.delenv(keys.FILE_VARIABLE, raising=False)


def run(*args: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lorabridge", *map(str, args)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_an_adapter_goes_out_encrypted_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(SECRET + b"\n")
    out = tmp_path / "out.ckpt"
    said = run("convert", EXAMPLE, out, "--encrypt", "aes-gcm", "--key-file", tmp_path / "key")
    assert "manifest beside is not encrypted" in said
    loaded = ms.load_checkpoint(str(out), dec_key=SECRET, dec_mode="AES-GCM")
    assert len(loaded) == 26
    said = run("inspect", out, code=3)
    assert "encrypted with AES-GCM" in said
    assert "--key-file" in said
    assert "modules    12" in run("inspect", out, "--key-file", tmp_path / "key")
    assert "equal" in run("verify", EXAMPLE, out, "--depth", "tensors", "--key-file", tmp_path / "key")
    said = run("convert", out, tmp_path / "back", "--key-file", tmp_path / "key")
    assert "restored bit for bit" in said
    assert "the output is not" in said
    here, there = (folder / "adapter_model.safetensors" for folder in (EXAMPLE, tmp_path / "back"))
    assert here.read_bytes() == there.read_bytes()


def test_a_key_is_changed_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.arange(12, dtype=np.float32).reshape(3, 4)
    ms.save_checkpoint([{"name": "layer.lora_A", "data": ms.Tensor(data)}, {"name": "layer.lora_B",
                       "data": ms.Tensor(data.T.copy())}], str(tmp_path / "a.ckpt"), enc_key=SECRET)  # fmt: skip
    (tmp_path / "new").write_bytes(b"hex:" + bytes(range(32)).hex().encode())
    monkeypatch.setenv(keys.VARIABLE, SECRET.decode())
    options = ConvertOptions(
        target_dialect="loralib-ms", encrypt="aes-cbc", new_key_file=tmp_path / "new",
        facts=Facts((Fact("*", "alpha", 3),)),
    )  # fmt: skip
    lorabridge.convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt", options)
    loaded = ms.load_checkpoint(str(tmp_path / "b.ckpt"), dec_key=bytes(range(32)), dec_mode="AES-CBC")
    assert loaded["layer.lora_A"].asnumpy().tobytes() == data.tobytes()


def test_options_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(SECRET)
    for options, error, words in (
        (ConvertOptions(encrypt="aes-gcm"), InputError, "needs a key"),
        (ConvertOptions(new_key_file=tmp_path / "key"), UsageError, "none is asked for"),
        (ConvertOptions(encrypt="rot13", new_key_file=tmp_path / "key"), UsageError, "unknown encryption"),
        (ConvertOptions(encrypt="aes-gcm", new_key_file=tmp_path / "none"), InputError, "no such file"),
        (ConvertOptions(encrypt="aes-gcm", new_key_file=tmp_path / "key", crc=True), UsageError, "checksum"),
    ):
        with pytest.raises(error, match=words):
            lorabridge.convert(EXAMPLE, tmp_path / "out.ckpt", options)
    with pytest.raises(UsageError, match="cannot be encrypted"):
        lorabridge.convert(
            EXAMPLE, tmp_path / "out.bin", ConvertOptions(encrypt="aes-gcm", new_key_file=tmp_path / "key")
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key"]

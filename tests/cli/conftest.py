"""Run the command line, in this process and in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from console import Invoke, Result, clean_environ, factors
from safetensors.numpy import save_file

from lorabridge.commands._run import run


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run in this process, exactly as the console script does, up to the exit."""

    def call(*args: object) -> Result:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def launch() -> Invoke:
    """Run ``python -m lorabridge`` in a process of its own with a clean environment."""

    def call(*args: object, python: tuple[str, ...] = (), raw: bool = False, **environ: str) -> Result:
        done = subprocess.run(
            [sys.executable, *python, "-m", "lorabridge", *(str(arg) for arg in args)],
            capture_output=True,
            env=clean_environ() | environ,
            timeout=120,
            check=False,
        )
        decode = "latin-1" if raw else "utf-8"
        return Result(done.returncode, done.stdout.decode(decode), done.stderr.decode(decode))

    return call


@pytest.fixture
def peft_dir(tmp_path: Path) -> Path:
    """A small adapter as peft writes it: two Linear modules, rank 4, alpha 8."""
    import json

    rng = np.random.default_rng(0)
    tensors = {}
    for module in ("query", "value"):
        a, b = factors(rng)
        tensors[f"base_model.model.layer.0.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.layer.0.{module}.lora_B.weight"] = b
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def hostile_names(tmp_path: Path) -> Path:
    """A well-formed file whose tensor names try to take over the terminal."""
    names = [
        "evil\x1b[2J\u202etxt",
        "bell\x07",
        "c1\x9b5m",
        "line\nerror: forged",
        "<script>",
        "漢字é",
        "\u2066hidden\u200b",
    ]
    path = tmp_path / "hostile.safetensors"
    save_file({name: np.zeros(2, np.float32) for name in names}, path)
    return path

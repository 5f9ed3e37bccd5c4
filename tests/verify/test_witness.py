"""A second witness: MindNLP 0.5.1 runs what came out of a MindSpore file, on the kernels of MindSpore 2.7.0.

Not run by default: ``LORABRIDGE_WITNESS=1 pytest -m witness`` makes a virtual environment (3 GB, kept in pytest's
cache), for MindNLP pins versions of its own. ``LORABRIDGE_WITNESS_PYTHON`` names the interpreter of one that exists.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from model_runs import run, said
from small import SMALL, VOCAB, build, converted, save

from lorabridge import open_checkpoint
from lorabridge.actions.convert import ConvertOptions, convert

pytestmark = [
    pytest.mark.witness,
    pytest.mark.skipif(os.environ.get("LORABRIDGE_WITNESS") != "1", reason="set LORABRIDGE_WITNESS=1"),
]

PINNED = ["mindspore==2.7.0", "mindnlp==0.5.1", "transformers==4.57.1", "peft==0.17.1", "accelerate==1.10.1",
          "diffusers==0.35.2", "safetensors==0.6.2"]  # fmt: skip
"""Installed without their dependencies: MindNLP asks for datasets, whose pyarrow needs numpy 2, and peft for torch."""
NEEDED = ["numpy==1.26.4", "huggingface_hub<1.0", "tokenizers<0.23", "protobuf<7", "scipy<1.16", "ml_dtypes<0.6",
          "regex", "requests", "pyyaml", "filelock", "packaging", "tqdm", "asttokens", "pillow", "psutil", "astunparse",
          "dill", "cloudpickle", "jinja2", "fsspec", "importlib_metadata", "setuptools", "ftfy", "addict",
          "sentencepiece"]  # fmt: skip


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> Path:
    given = os.environ.get("LORABRIDGE_WITNESS_PYTHON")
    if given:
        return Path(given)
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("witness")
    made = folder / "venv" / "bin" / "python"
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], check=True)
        subprocess.run([made, "-m", "pip", "install", "-q", "--no-deps", *PINNED], check=True)
        subprocess.run([made, "-m", "pip", "install", "-q", *NEEDED], check=True)
        done.write_text("\n".join(PINNED))
    return made


@pytest.mark.parametrize("name", SMALL)
def test_mindnlp_computes_the_same_from_what_the_mindspore_file_holds(name: str, python: Path, tmp_path: Path) -> None:
    small = SMALL[name]
    base, adapter = save(small, tmp_path)
    target = converted(small, tmp_path)
    assert run(adapter, target, base).ok
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(target.read_bytes())  # without its manifest: read back by names, shapes and flags
    facts = {"alpha": 10} | ({"use_rslora": True} if "use_rslora" in small.lora else {})
    options = ConvertOptions(family=small.family, facts=said(**facts), config=base / "config.json")
    convert(bare, tmp_path / "back", options)
    if small.task == "TOKEN_CLS":
        config = tmp_path / "back" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": small.task}))
    ids = np.random.default_rng(5).integers(0, VOCAB, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    np.savez(tmp_path / "tokens.npz", ids=ids, mask=mask)

    script = Path(__file__).with_name("witness_run.py")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [python, script, tmp_path, small.architecture]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    used = json.loads(done.stdout.strip().splitlines()[-1])
    assert "mindtorch" in used["torch"]
    assert used["mindspore"] == "2.7.0"

    found = np.load(tmp_path / "witness.npz")
    with open_checkpoint(target) as checkpoint:
        assert {f"ckpt:{key}" for key in checkpoint} == set(found) - {"logits"}
        for key, value in checkpoint.items():
            assert found[f"ckpt:{key}"].tobytes() == value.tobytes()
    want = wanted(name, adapter, ids, mask)
    kept = mask.astype(bool)
    close = 2e-4 if name == "gpt2" else 2e-5  # GPT-2's GELU takes MindSpore's tanh, which is 1e-4 off near 5 on the CPU
    assert np.abs(found["logits"] - want)[kept].max() < close * np.abs(want).max()
    assert np.abs(want).max() > 1


def wanted(name: str, adapter: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return what torch and the installed peft compute from the adapter that was converted."""
    import peft

    module = peft.PeftModel.from_pretrained(build(SMALL[name]), str(adapter)).eval().get_base_model()
    with torch.no_grad():
        return module(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()

"""The wheel by itself: built, installed in a clean environment without any framework, and converting."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy of what is committed or about to be, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_tables_and_no_strangers(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lorabridge"}
    tables = sorted(path.name for path in (ROOT / "mappings").glob("*.toml"))
    assert sorted(Path(n).name for n in names if n.startswith("lorabridge/mappings/") and n.endswith(".toml")) == tables
    assert "lorabridge/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lorabridge").rglob("*.py")}
    assert modules <= set(names), modules - set(names)


def test_it_converts_without_any_framework(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    installed = {line.split()[0].lower() for line in run(python, "-m", "pip", "list").splitlines()[2:]}
    assert not installed & {"torch", "mindspore", "protobuf", "peft", "transformers"}
    command = tmp_path / "venv" / "bin" / "lorabridge"
    out = tmp_path / "out.ckpt"
    run(command, "convert", ROOT / "examples" / "token-classifier-bin" / "peft_adapter.bin", out,
        "--to", "mindpet", "--family", "bert")  # fmt: skip
    run(command, "convert", out, tmp_path / "back")
    original = ROOT / "examples" / "token-classifier" / "adapter_model.safetensors"
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == original.read_bytes()
    assert "gpt2" in run(command, "tables", "list")

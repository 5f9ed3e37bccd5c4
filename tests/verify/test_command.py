"""The command verify: verdict first, exit codes, one JSON document, refused depths."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from adapters import checked, configure, converted, peft_adapter, without_manifest

from lorabridge import frameworks
from lorabridge.commands._run import run
from lorabridge.errors import UsageError


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    source = peft_adapter(tmp_path / "peft", target_modules=["up"])
    return str(source), str(converted(source, tmp_path / "out.ckpt"))


def test_equal_files(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", *pair]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"equal: {pair[0]} and {pair[1]}: tensors ok (2 compared, every bit); layers ok (2 compared"
    )
    assert any("torch and peft" in line and "MindSpore cells" in line for line in lines)
    assert any("random" in line for line in lines)


@pytest.mark.parametrize("dialect", ["mlx", "mcore", "vllm"])
def test_a_dialect_whose_layers_nothing_runs(dialect: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = peft_adapter(tmp_path / "peft", target_modules=["up"])
    out = str(tmp_path / "out")
    assert run(["convert", str(source), out + "/", "--to", dialect, "-q"]) == 0
    capsys.readouterr()
    assert run(["verify", str(source), out]) == 0
    said = capsys.readouterr().out
    assert said.startswith("equal: ")
    assert f"layers run as peft, loralib, loralib-ms, mindpet, not as {dialect}" in said
    assert run(["verify", str(source), out, "--depth", "layers"]) == 2
    assert f"not as {dialect}" in capsys.readouterr().err


def test_different_files(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    configure(Path(pair[0]), lora_alpha=9)
    assert run(["verify", *pair, "--depth", "tensors"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("different: ")
    assert "layers.0.up" in lines[0]
    assert any(line.startswith("tensors: not so: facts about the target") for line in lines)
    assert lines[1].startswith("module")
    assert lines[2].startswith("layers.")
    assert "DST's delta is 0.888889 times SRC's" in lines[2]


def test_quiet_says_the_verdict(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", *pair, "--depth", "tensors", "-q"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_verbose_lists_every_module_and_check(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", *pair, "--depth", "tensors", "-v"]) == 0
    out = capsys.readouterr().out
    assert "sha256 of 4 tensors" in out
    assert sum(line.startswith("layers.") for line in out.splitlines()) == 2


def test_one_json_document(pair: tuple[str, str]) -> None:
    """Also where frameworks that like to talk are imported."""
    command = [sys.executable, "-m", "lorabridge", "verify", *pair, "--json", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert (found["schema"], found["verdict"]) == ("lorabridge/verify/1", "equal")
    depths = {depth["name"]: depth for depth in found["depths"]}
    assert [depths[name]["ok"] for name in ("tensors", "layers")] == [True, True]
    row = depths["layers"]["modules"][0]
    assert {"path", "kind", "rank", "scaling", "max_abs", "max_rel", "ulps", "cosine", "bound", "ok"} <= row.keys()
    assert 0 < row["max_abs"] < row["bound"] * 2
    words = shlex.split(found["command"])
    assert words == ["lorabridge", "verify", *pair, "--seed", "3"]
    again = json.loads(subprocess.run([sys.executable, "-m", *words, "--json"], capture_output=True, check=True).stdout)
    del found["seconds"], again["seconds"]
    for document in (found, again):
        for depth in document["depths"]:
            del depth["seconds"]
    assert again == found


def test_json_of_different_files(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    configure(Path(pair[0]), use_rslora=True)
    assert run(["verify", *pair, "--json", "--depth", "tensors"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "different"
    assert [row["ok"] for row in found["depths"][0]["modules"]] == [False, False]


def test_other_failures_have_their_own_codes(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    bare = str(without_manifest(Path(pair[1])))
    assert run(["verify", pair[0], bare]) == 4  # alpha is not known
    assert "--alpha" in capsys.readouterr().err
    assert run(["verify", pair[0], bare, "--alpha", "8", "--depth", "tensors"]) == 0
    assert run(["verify", pair[0], "nowhere.ckpt"]) == 3
    assert run(["verify", pair[0], bare, "--depth", "deep"]) == 2
    assert run(["verify", pair[0], bare, "--family", "lama"]) == 2


def test_a_missing_framework_is_named_and_the_rest_runs(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frameworks, "_installed", lambda name: name != "mindspore")
    report = checked(Path(pair[0]), Path(pair[1]))
    layers = report.depth("layers")
    assert layers is not None
    assert layers.state == "refused"
    assert layers.reason == "mindspore not installed; pip install 'lorabridge[mindspore]'"
    assert report.verdict == "equal"
    assert "layers refused (mindspore not installed" in report.summary()
    with pytest.raises(UsageError, match="'layers' cannot run") as raised:
        checked(Path(pair[0]), Path(pair[1]), "layers")
    assert "mindspore not installed" in raised.value.where[0]


def test_each_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frameworks, "_installed", lambda name: False)
    assert frameworks.missing("torch", "peft") == ("torch", "peft")
    said = frameworks.refusal("torch", "peft")
    assert said == "torch and peft not installed; pip install 'lorabridge[torch]' 'lorabridge[verify]'"
    frameworks.load.cache_clear()
    with pytest.raises(UsageError, match="loralib is needed"):
        frameworks.load("loralib")


def test_without_any_framework(pair: tuple[str, str]) -> None:
    """In a process in which nothing can be imported: the files are compared, the layers refused."""
    code = (
        "import sys\n"
        "for name in ('torch', 'mindspore', 'peft', 'transformers', 'loralib'): sys.modules[name] = None\n"
        "from lorabridge.commands._run import run\n"
        f"sys.exit(run(['verify', {pair[0]!r}, {pair[1]!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("equal: ")
    assert "layers refused (mindspore and peft and torch and transformers not installed" in done.stdout


def test_a_framework_that_cannot_be_imported_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "loralib.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lorabridge import frameworks, errors\n"
        "try: frameworks.load('loralib')\n"
        "except errors.UsageError as error: print(error.problem, '|', error.where[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("loralib is installed and cannot be imported | OSError: libtorch_cpu.so")


def test_settings_of_the_frameworks_are_put_back() -> None:
    import mindspore
    import torch

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    torch.set_float32_matmul_precision("medium")
    try:
        with frameworks.exact_arithmetic("torch", "mindspore"):
            assert mindspore.get_context("mode") == mindspore.PYNATIVE_MODE
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_grad_enabled()
        assert mindspore.get_context("mode") == mindspore.GRAPH_MODE
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_grad_enabled()
    finally:
        mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
        torch.set_float32_matmul_precision("highest")

"""``convert``: options reach the library, results and notes reach the right streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from console import Invoke, clean_environ
from safetensors.numpy import load_file

from lorabridge import ConvertOptions
from lorabridge.actions import convert as action
from lorabridge.dialects.adapter import Fact


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object, ConvertOptions]]:
    """What the command asks of the library; the conversion itself is not run."""
    calls: list[tuple[object, object, ConvertOptions]] = []

    class Stop(Exception):
        pass

    def convert(source: object, target: object, options: ConvertOptions, *, progress: object) -> None:
        assert callable(progress)
        calls.append((source, target, options))
        raise Stop

    monkeypatch.setattr(action, "convert", convert)
    return calls


def test_without_options_the_library_s_defaults_hold(asked: list, invoke: Invoke) -> None:
    invoke("convert", "a", "b")
    assert asked == [(Path("a"), "b", ConvertOptions())]


def test_every_option_reaches_the_library(
    asked: list, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    monkeypatch.chdir(tmp_path)
    line = (
        "convert in out.ckpt --from loralib --to mindpet --family bert --config c.json --layout qkv=grouped "
        "--layout mlp=plain --mappings tables --alpha 16 --alpha enc.*=32 --rank 8 --enable-lora T,F,T "
        "--fan-in-fan-out --use-rslora no --kernel-size 3,3 --groups 2 --out-features 768 --conv-form peft "
        "--merged no --kind e.*=embedding --dtype bf16 --on-overflow saturate --include *.query --exclude *.value "
        "--layers 0-11:2 --compress 4 --adapter-only --max-shard-size 5GB --crc --workers 3 --dry-run --overwrite"
    )
    invoke(*line.split())
    ((source, target, options),) = asked
    assert (source, target) == (Path("in"), "out.ckpt")
    stated = {(f.pattern, f.field): f.value for f in options.facts.entries}
    assert options == ConvertOptions(
        source_dialect="loralib", target_dialect="mindpet", family="bert", config=Path("c.json"),
        layout={"qkv": "grouped", "mlp": "plain"}, mappings=Path("tables"), facts=options.facts, dtype="bf16",
        on_overflow="saturate", include=("*.query",), exclude=("*.value",), layers="0-11:2", compress="4",
        adapter_only=True, max_shard_size=5 * 10**9, crc=True, workers=3, dry_run=True, overwrite=True,
    )  # fmt: skip
    assert options.facts.entries[:2] == (Fact("enc.*", "alpha", 32), Fact("e.*", "kind", "embedding"))
    assert stated == {
        ("*", "alpha"): 16, ("enc.*", "alpha"): 32, ("*", "rank"): 8, ("*", "enable_lora"): [True, False, True],
        ("*", "fan_in_fan_out"): True, ("*", "use_rslora"): False, ("*", "kernel_size"): [3, 3], ("*", "groups"): 2,
        ("*", "out_features"): 768, ("*", "conv_form"): "peft", ("*", "merged"): False, ("e.*", "kind"): "embedding",
    }  # fmt: skip


def test_every_option_of_the_library_has_one_on_the_command_line() -> None:
    from dataclasses import fields

    from lorabridge.commands.reassemble import Given  # what convert takes, and what is about ranks

    assert {f.name for f in fields(ConvertOptions)} - {"facts"} <= set(Given.__annotations__)


def test_options_come_from_the_environment_too(asked: list, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABRIDGE_WORKERS", "2")
    monkeypatch.setenv("LORABRIDGE_MAPPINGS", "tables")
    monkeypatch.setenv("LORABRIDGE_CONVERT_OVERWRITE", "1")
    monkeypatch.setenv("LORABRIDGE_CONVERT_ALPHA", "16 enc.*=32")
    invoke("convert", "a", "b")
    ((_, _, options),) = asked
    assert (options.workers, options.mappings, options.overwrite) == (2, Path("tables"), True)
    assert [f.value for f in options.facts.entries] == [32, 16]


def test_an_option_without_its_value_does_not_swallow_a_path(asked: list, invoke: Invoke) -> None:
    invoke("convert", "--compress", "--fan-in-fan-out", "a", "b")
    ((source, target, options),) = asked
    assert (source, target, options.compress) == (Path("a"), "b", "1e-6")
    assert options.facts.entries == (Fact("*", "fan_in_fan_out", True),)


def test_a_trailing_slash_survives(asked: list, invoke: Invoke) -> None:
    invoke("convert", "a", "back.v2/")
    assert asked[0][1] == "back.v2/"


def test_there_and_back(peft_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    there = invoke("convert", peft_dir, tmp_path / "out.ckpt")
    assert there.code == 0, there.err
    assert there.out.startswith("converted 2 modules, 4 tensors (peft safetensors -> loralib-ms mindspore) to ")
    assert there.out.count("\n") == 1
    assert f"next: lorabridge inspect {tmp_path / 'out.ckpt'}\n" in there.err
    back = invoke("convert", tmp_path / "out.ckpt", tmp_path / "back", "--to", "peft")
    assert back.code == 0, back.err
    before, after = (load_file(d / "adapter_model.safetensors") for d in (peft_dir, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_json_is_one_document_with_the_modules(peft_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("convert", peft_dir, tmp_path / "out.ckpt", "--json")
    document = json.loads(result.out)
    assert result.err == ""
    assert document["schema"] == "lorabridge/convert/1"
    assert document["target"] == str(tmp_path / "out.ckpt")
    assert [m["path"] for m in document["modules"]] == ["layer.0.query", "layer.0.value"]
    assert document["dry_run"] is False


def test_a_dry_run_writes_nothing_and_has_the_run_s_digest(peft_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    before = sorted(tmp_path.rglob("*"))
    dry = json.loads(invoke("convert", peft_dir, tmp_path / "out.ckpt", "--dry-run", "--json").out)
    assert sorted(tmp_path.rglob("*")) == before
    wet = json.loads(invoke("convert", peft_dir, tmp_path / "out.ckpt", "--json").out)
    assert dry["digest"] == wet["digest"]
    assert invoke("convert", peft_dir, tmp_path / "b.ckpt", "-n").out.startswith("would convert ")


def test_an_existing_target_is_exit_code_five(peft_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "out.ckpt").write_bytes(b"precious")
    result = invoke("convert", peft_dir, tmp_path / "out.ckpt")
    assert (result.code, result.out) == (5, "")
    assert "--overwrite" in result.err
    assert (tmp_path / "out.ckpt").read_bytes() == b"precious"
    assert invoke("convert", peft_dir, tmp_path / "out.ckpt", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("more", "code"),
    [(["--layers", "x"], 2), (["--dtype", "fp99"], 2), (["--include", "nothing.*"], 4), (["--family", "brt"], 2),
     (["--compress", "3.5"], 2), (["--max-shard-size", "big"], 2), (["--layout", "qkv"], 2), (["--workers", "-1"], 2)],
)  # fmt: skip
def test_wrong_values_are_refused_and_nothing_is_written(
    more: list[str], code: int, peft_dir: Path, tmp_path: Path, invoke: Invoke
) -> None:
    result = invoke("convert", peft_dir, tmp_path / "out.ckpt", *more)
    assert (result.code, result.out) == (code, ""), result.err
    assert result.err.startswith("error: ")
    assert not (tmp_path / "out.ckpt").exists()


def test_a_misspelt_family_gets_the_nearest(peft_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("convert", peft_dir, tmp_path / "out.ckpt", "--family", "brt")
    assert "did you mean bert" in result.err


def test_verbose_lists_modules_and_quiet_says_nothing(peft_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    loud = invoke("convert", peft_dir, tmp_path / "a.ckpt", "-v", "--include", "*.query")
    assert "layer.0.query" in loud.out
    assert "not selected: base_model.model.layer.0.value.lora_A.weight" in loud.out
    plain = invoke("convert", peft_dir, tmp_path / "b.ckpt", "--include", "*.query")
    assert "note: 2 tensors not selected; -v lists them" in plain.err
    silent = invoke("convert", peft_dir, tmp_path / "c.ckpt", "-q")
    assert (silent.code, silent.out, silent.err) == (0, "", "")


def test_the_next_command_is_quoted_for_the_shell(peft_dir: Path, tmp_path: Path, invoke: Invoke) -> None:
    result = invoke("convert", peft_dir, tmp_path / "a b.ckpt")
    assert f"next: lorabridge inspect '{tmp_path / 'a b.ckpt'}'\n" in result.err


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "mindspore", "peft", "loralib") or name == "google.protobuf":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
from lorabridge.commands._run import run
for line in sys.argv[1:]:
    code = run(line.split("|"))
    if code:
        sys.exit(f"{line} -> {code}")
found = [n for n in sys.modules if n.partition(".")[0] in ("torch", "mindspore", "peft") or n == "google.protobuf"]
sys.exit(str(found) if found else 0)
"""


def test_no_command_imports_a_framework(peft_dir: Path, tmp_path: Path) -> None:
    lines = [
        f"convert|{peft_dir}|{tmp_path}/out.ckpt",
        f"convert|{tmp_path}/out.ckpt|{tmp_path}/back",
        f"convert|{peft_dir}|{tmp_path}/out.pt",
        f"convert|{tmp_path}/out.pt|{tmp_path}/again.ckpt|--alpha|8",
        f"convert|{peft_dir}|{tmp_path}/ms.ckpt|--to|mindpet|--dtype|bf16",
        f"inspect|{tmp_path}/out.ckpt|--norms|--module|*",
        f"inspect|{tmp_path}/out.pt|--json",
        f"inspect|{peft_dir}|--tensors",
        "tables|list",
        "tables|show|gpt2",
        f"clean|{tmp_path}",
        "env",
        "convert|--help",
    ]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER, *lines], capture_output=True, text=True, env=clean_environ(), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr

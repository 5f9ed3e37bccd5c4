"""What vLLM 0.33.0 loaded with peft's deltas is what is written today (``judge_vllm.py`` ran vLLM)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from judge_vllm import CASES, HERE, REFUSED, digest, expected, with_head, written
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.errors import MappingError

JUDGED = json.loads((HERE / "vllm_judged.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_what_vllm_loaded_is_what_is_written(case: str, tmp_path: Path) -> None:
    assert JUDGED[case]["difference"] < 1e-7
    folder = written(case, tmp_path)
    assert digest(folder) == JUDGED[case]["digest"]
    convert(folder, tmp_path / "back")
    found, wanted = expected(tmp_path / "back"), expected(tmp_path / f"{case}_peft")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)


def test_vllm_itself_refuses_what_is_refused_for_it() -> None:
    assert set(JUDGED["refused"]) == set(REFUSED)
    assert all(JUDGED["refused"].values())


def test_vllm_reads_patterns_and_one_head_of_peft_s_own_directory(tmp_path: Path) -> None:
    assert JUDGED["peft"]["difference"] < 1e-7
    assert JUDGED["peft"]["head"] is True
    folder, _ = with_head(tmp_path / "peft")
    with pytest.raises(MappingError, match="whole modules") as caught:
        convert(folder, tmp_path / "out", ConvertOptions(target_dialect="vllm"))
    assert "vLLM 0.33 loads one 'score' beside the factors of a peft directory (--to peft)" in caught.value.hint
    assert "merge" in caught.value.hint
    with pytest.raises(MappingError, match="whole modules") as caught:
        convert(folder, tmp_path / "out", ConvertOptions(target_dialect="vllm-mindspore", exclude=("*embed*", "lm_*")))
    assert "0.33" not in caught.value.hint


def test_another_module_has_no_such_cure(tmp_path: Path) -> None:
    folder, _ = with_head(tmp_path / "peft")
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({n.replace("score", "other"): t for n, t in load_file(file).items()}, file)
    config.write_text(config.read_text("utf-8").replace('"score"', '"other"'), "utf-8")
    with pytest.raises(MappingError, match="whole modules") as caught:
        convert(folder, tmp_path / "out", ConvertOptions(target_dialect="vllm"))
    assert "0.33" not in caught.value.hint

"""What vLLM 0.33.0 loaded with peft's deltas is what is written today (``judge_vllm.py`` ran vLLM)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from judge_vllm import CASES, HERE, REFUSED, digest, expected, written

from lorabridge import convert

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

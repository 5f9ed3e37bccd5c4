"""``tables``, ``clean`` and ``env``."""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
from console import Invoke

from lorabridge.actions.env import environment, problems
from lorabridge.files.staging import Area, staging_path

MAPPINGS = Path(__file__).parents[2] / "mappings"
TABLE = """
schema = 1
family = "mine"
match = { model_type = ["mine"] }
[sizes]
hidden = "hidden_size"
layers = "num_hidden_layers"
[holes]
i = "layers"
[[linear]]
hf = "layers.{i}.fc"
ms = "blocks.{i}.dense"
out = "hidden"
in = "hidden"
"""


def test_every_shipped_table_is_listed_shown_and_checked(invoke: Invoke) -> None:
    listed = json.loads(invoke("tables", "list", "--json").out)
    assert listed["schema"] == "lorabridge/tables-list/1"
    assert {t["file"] for t in listed["tables"]} == {path.name for path in MAPPINGS.glob("*.toml")}
    text = invoke("tables", "list").out
    for table in listed["tables"]:
        assert re.search(rf"^{table['family']} ", text, re.MULTILINE)
        shown = json.loads(invoke("tables", "show", table["family"], "--json").out)
        assert (shown["schema"], shown["table"]["family"]) == ("lorabridge/tables-show/1", table["family"])
        checked = invoke("tables", "check", MAPPINGS / table["file"])
        assert (checked.code, checked.err) == (0, "")
        assert f"is a valid table of family {table['family']} (" in checked.out


def test_a_table_is_shown_as_correspondences(invoke: Invoke) -> None:
    out = invoke("tables", "show", "gpt2").out
    assert re.search(
        r"^transformer\.h\.\{i\}\.attn\.c_attn\n  → .*attention\.dense1, .*dense3\n    linear: split", out, re.M
    )
    assert "(gpt2.toml:" in out


def test_tables_of_one_s_own(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text(TABLE)
    assert "mine" in invoke("tables", "list", "--mappings", tmp_path).out
    assert invoke("tables", "show", "mine").code == 2
    monkeypatch.setenv("LORABRIDGE_MAPPINGS", str(tmp_path))
    assert "layers.{i}.fc" in invoke("tables", "show", "mine").out


def test_a_table_with_problems_is_exit_code_one(tmp_path: Path, invoke: Invoke) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TABLE + 'surprise = "\\u001b[2J"\n')
    result = invoke("tables", "check", path)
    assert result.code == 1
    assert "surprise" in result.out
    assert "\x1b" not in result.out
    document = json.loads(invoke("tables", "check", path, "--json").out)
    assert (document["ok"], len(document["problems"])) == (False, 1)
    assert invoke("tables", "check", tmp_path / "none.toml").code == 3


def leave_staging(target: Path) -> Path:
    """Leave what a run that was killed leaves: a staging directory that nobody holds."""
    path = staging_path(target, "0" * 64)
    area = Area(path)
    area.close()
    return path


def test_clean_removes_what_killed_runs_left(tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "finished.ckpt").write_bytes(b"x")
    left = leave_staging(tmp_path / "out.ckpt")
    assert left.exists()
    dry = invoke("clean", tmp_path, "--dry-run")
    assert dry.code == 0
    assert dry.out.startswith("would remove ")
    assert left.exists()
    document = json.loads(invoke("clean", tmp_path, "--json").out)
    assert document["schema"] == "lorabridge/clean/1"
    assert [row["path"] for row in document["removed"]] == [str(left)]
    assert not left.exists()
    assert invoke("clean", tmp_path).out == f"nothing to remove in {tmp_path}\n"
    assert (tmp_path / "finished.ckpt").read_bytes() == b"x"


def test_clean_leaves_a_running_conversion_alone(tmp_path: Path, invoke: Invoke) -> None:
    path = staging_path(tmp_path / "out.ckpt", "0" * 64)
    area = Area(path)
    try:
        result = invoke("clean", tmp_path)
        assert result.out == f"nothing to remove in {tmp_path}\n"
        assert "belongs to a running conversion" in result.err
        assert path.exists()
    finally:
        area.close()


def test_clean_of_no_directory_is_an_input_error(tmp_path: Path, invoke: Invoke) -> None:
    assert invoke("clean", tmp_path / "none").code == 3


def test_env_names_versions_without_importing(invoke: Invoke) -> None:
    result = invoke("env", "--json")
    document = json.loads(result.out)
    assert document["schema"] == "lorabridge/env/1"
    for name in ("numpy", "torch", "mindspore", "click", "ml_dtypes"):
        assert document["packages"][name] == metadata.version(name)
    assert document["cpus"] == len(os.sched_getaffinity(0))
    assert document["memory_bytes"] > document["available_bytes"] > 0
    text = invoke("env").out
    assert all(re.search(rf"^{name} +\S", text, re.M) for name in document["packages"])


def test_env_shows_our_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABRIDGE_DEBUG", "1")
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    assert environment().variables == {"LORABRIDGE_DEBUG": "1"}


@pytest.mark.parametrize(
    ("packages", "flagged"),
    [
        ({"numpy": "2.1.0", "mindspore": "2.10.0"}, True),
        ({"numpy": "1.26.4", "mindspore": "2.10.0"}, False),
        ({"numpy": "2.1.0", "mindspore": None}, False),
        ({"numpy": None, "mindspore": "2.10.0"}, False),
        ({"numpy": "10.0", "mindspore": "2.10.0"}, True),
    ],
)
def test_numpy_two_next_to_mindspore_is_flagged_with_its_cure(packages: dict[str, str | None], flagged: bool) -> None:
    found = problems(packages)
    assert bool(found) is flagged
    assert all("numpy<2" in text for text in found)

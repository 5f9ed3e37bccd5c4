"""``inspect`` on what ranks wrote: layouts, slices, copies, gaps, and the page that draws them."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from console import Invoke
from safetensors.numpy import load_file, save_file

from lorabridge.actions.inspect import inspect
from lorabridge.actions.inspect_ranks import RanksReport, spans
from lorabridge.actions.inspect_report import InspectReport
from lorabridge.errors import InputError

DATA = Path(__file__).parents[1] / "distributed" / "data"
RANKS = DATA / "ranks" / "tp4pp2_opt2"
STRATEGY = DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt"


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Return a copy of 16 ranks (two stages of tensor parallel 4 and optimizer shards of 2) to spoil."""
    return Path(shutil.copytree(RANKS, tmp_path / "ranks"))


def laid(report: InspectReport) -> RanksReport:
    assert report.ranks is not None
    return report.ranks


def test_layouts_are_told_once_each() -> None:
    found = laid(inspect(RANKS, strategies=[STRATEGY]))
    assert (found.ranks, found.stages, found.kind) == (16, 2, "mindspore ranks")
    rows = {(row.stage, row.example): row for row in found.layouts}
    down = rows[0, "n.b0.down.w"]
    assert (down.grid, down.slices, down.copies, down.ranks) == ((2, 4), 8, "1", tuple(range(8)))
    assert down.cut == "axis 0 in 2 (2 optimizer shards), axis 1 in 4"
    assert rows[0, "n.b0.down.b"].copies == "4"
    assert sum(row.tensors for row in found.layouts) == 8
    assert not found.shown


def test_every_slice_is_where_the_runtime_put_it() -> None:
    full = np.load(RANKS / "full.npz")
    shown = laid(inspect(RANKS, strategies=[STRATEGY], slices="n.b*.?*.w")).shown
    assert {tensor.name for tensor in shown} == {"n.b0.up.w", "n.b0.down.w", "n.b1.up.w", "n.b1.down.w"}
    for tensor in shown:
        for row in tensor.slices:
            box = tuple(slice(s, s + n) for s, n in zip(row.start, row.shape, strict=True))
            for rank in row.ranks:
                held = load_file(RANKS / f"rank_{rank}" / f"net{rank}.safetensors")[tensor.name]
                assert np.array_equal(held, full[tensor.name][box])


def test_copies_are_compared_when_asked(ranks: Path) -> None:
    agreed = inspect(ranks, strategies=[STRATEGY], check_replicas=True)
    assert "4, equal" in {row.copies for row in laid(agreed).layouts}
    assert agreed.problems == ()
    file = ranks / "rank_6" / "net6.safetensors"
    tensors = load_file(file)
    tensors["n.b0.down.b"][0] += 1
    save_file(tensors, file)
    unread = inspect(ranks, strategies=[STRATEGY])
    assert unread.problems == ()
    found = inspect(ranks, strategies=[STRATEGY], check_replicas=True, slices="n.b0.down.b")
    assert [row.apart for row in laid(found).shown[0].slices] == [(6,), ()]
    assert [problem.problem for problem in found.problems] == ["1 tensor differs between ranks that should hold copies"]
    assert found.problems[0].where == ("n.b0.down.b: rank 0 and rank 6",)


def test_lost_ranks_are_a_problem_and_not_an_error(ranks: Path, invoke: Invoke) -> None:
    shutil.rmtree(ranks / "rank_1")
    found = inspect(ranks, strategies=[STRATEGY], slices="n.b0.up.w")
    (tensor,) = laid(found).shown
    assert tensor.missing == 1
    (lost,) = (row for row in tensor.slices if row.missing)
    assert (lost.start, lost.shape, lost.ranks) == ((64, 0), (32, 64), (1,))
    assert found.problems[0].problem.startswith("the ranks do not make up one checkpoint")
    told = invoke("inspect", ranks, "--strategy", STRATEGY)
    assert told.code == 0
    assert "8, 1 missing" in told.out
    refused = invoke("reassemble", ranks, ranks.parent / "out.safetensors", "--strategy", STRATEGY)
    assert refused.code != 0


def test_without_a_strategy_each_rank_is_described() -> None:
    found = inspect(RANKS)
    assert {row.cut for row in laid(found).layouts} == {"not told"}
    assert "give --strategy" in found.problems[0].where[0]


def test_a_broken_strategy_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "s.ckpt").write_bytes(b"\x00nothing")
    found = inspect(RANKS, strategies=[tmp_path / "s.ckpt"])
    assert "no strategy file" in found.problems[0].problem
    assert laid(found).ranks == 16


def test_a_missing_file_of_dcp_leaves_the_rest_described(tmp_path: Path) -> None:
    run = shutil.copytree(DATA / "dcp_peft_fsdp2", tmp_path / "run")
    (run / "__2_0.distcp").unlink()
    found = inspect(run)
    assert "1 file of the checkpoint cannot be read" in found.problems[0].problem
    rows = laid(found).layouts
    assert sum(row.tensors for row in rows) == 12
    assert sum(row.missing for row in rows) > 0


def test_a_missing_file_of_an_iteration_leaves_the_rest_described(tmp_path: Path) -> None:
    run = shutil.copytree(DATA / "mindformers_ckpt2" / "iteration_00000001", tmp_path / "run")
    (run / "llm-model-0000002-0000008.safetensors").unlink()
    found = inspect(run)
    assert found.problems[0].problem == "1 file of the iteration cannot be read"
    assert any(row.missing for row in laid(found).layouts)


def test_zero_s_flat_pieces_are_elements() -> None:
    found = laid(inspect(DATA / "deepspeed_zero3_lora", slices="*q_proj.lora_A*"))
    tensor = found.shown[0]
    assert tensor.flat
    assert tensor.cut == "elements in 2"
    assert [(row.start, row.shape, row.ranks) for row in tensor.slices] == [
        ((0,), (768,), (0,)),
        ((768,), (768,), (1,)),
    ]


def test_json_holds_what_the_text_shows(invoke: Invoke) -> None:
    told = json.loads(invoke("inspect", RANKS, "--strategy", STRATEGY, "--slices", "n.b0.up.b", "--json").out)
    assert told["ranks"]["layouts"][0]["grid"] == [2, 4]
    assert told["ranks"]["shown"][0]["slices"][1] == {
        "start": [32], "shape": [32], "ranks": [4], "missing": False, "apart": None,
    }  # fmt: skip
    assert "examples" not in told["ranks"]


def test_other_files_have_no_slices(peft_dir: Path, invoke: Invoke) -> None:
    assert inspect(peft_dir).ranks is None
    told = invoke("inspect", peft_dir, "--check-replicas")
    assert told.code == 2
    assert "no distributed checkpoint" in told.err


def test_a_name_that_no_tensor_has(invoke: Invoke) -> None:
    told = invoke("inspect", RANKS, "--strategy", STRATEGY, "--slices", "nothing")
    assert told.code == 2
    assert "no tensor is called nothing" in told.err


class Page(HTMLParser):
    """Count the elements of a page, by class, and refuse scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.classes: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        for name in (dict(attrs).get("class") or "").split():
            self.classes[name] = self.classes.get(name, 0) + 1


def test_the_page_draws_slices_and_devices(ranks: Path, tmp_path: Path, invoke: Invoke) -> None:
    shutil.rmtree(ranks / "rank_1")
    page = tmp_path / "page.html"
    told = invoke("inspect", ranks, "--strategy", STRATEGY, "--slices", "n.b0.up.w", "--html", page)
    assert told.code == 0
    text = page.read_text("utf-8")
    seen = Page()
    seen.feed(text)
    assert seen.classes["held"] == 7 + 7
    assert seen.classes["lost"] == 1 + 1 + 1  # the slice, its device, the legend
    assert "[64:96, 0:64]: on no rank; should be on 1" in text
    assert invoke("inspect", ranks, "--strategy", STRATEGY, "--html", page).code == 0  # replaces its own page
    (tmp_path / "other.html").write_text("mine")
    assert invoke("inspect", ranks, "--html", tmp_path / "other.html").code != 0
    assert (tmp_path / "other.html").read_text() == "mine"


def test_names_from_files_do_not_become_markup(tmp_path: Path, invoke: Invoke) -> None:
    for rank in range(2):
        (tmp_path / "run" / f"rank_{rank}").mkdir(parents=True)
        tensors = {"<script>alert(1)</script>": np.full(2, rank, np.float32), "a\u202eb": np.zeros(1, np.float32)}
        save_file(tensors, tmp_path / "run" / f"rank_{rank}" / "net.safetensors")
    assert invoke("inspect", tmp_path / "run", "--html", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text("utf-8")
    Page().feed(text)
    assert "&lt;script&gt;" in text
    assert "\u202e" not in text


def test_ranks_are_spelled_as_spans() -> None:
    assert spans([5, 0, 1, 2, 9, 2]) == "0-2, 5, 9"
    assert spans([]) == ""


def test_a_damaged_file_is_a_problem_and_its_slices_are_holes(ranks: Path) -> None:
    file = next((ranks / "rank_4").iterdir())
    file.write_bytes(file.read_bytes()[:-8])
    report = inspect(ranks, strategies=(STRATEGY,), slices="n.b0.up.w")
    (tensor,) = laid(report).shown
    assert [row.ranks for row in tensor.slices if row.missing] == [(4,)]
    assert any("rank_4" in line for problem in report.problems for line in problem.where)
    file.write_bytes(b"no checkpoint")
    report = inspect(ranks, strategies=(STRATEGY,), slices="n.b0.up.w")
    assert [row.ranks for row in laid(report).shown[0].slices if row.missing] == [(4,)]


@pytest.mark.parametrize(
    ("run", "file"),
    [
        ("deepspeed_zero3_lora", "global_step1/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("torch_ranks/fsdp", "model_world_size_4_rank_1.pt"),
        ("megatron/dense/legacy", "iter_0000003/mp_rank_01_001/model_optim_rng.pt"),
    ],
)
def test_a_damaged_file_of_torch_leaves_the_rest_described(run: str, file: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(DATA / run, tmp_path / "run"))
    (copy / file).write_bytes((copy / file).read_bytes()[:-200])
    report = inspect(copy)
    assert any(row.missing for row in laid(report).layouts)
    assert any(Path(file).name in line for problem in report.problems for line in problem.where)


def test_damaged_files_alone_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "rank_0").mkdir()
    save_file({"w": np.ones(64, np.float32)}, tmp_path / "rank_0" / "net.safetensors")
    file = tmp_path / "rank_0" / "net.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError):
        inspect(tmp_path)

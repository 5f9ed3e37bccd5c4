"""Strategy files: those of MindSpore's compiler are read, those written here are read by MindSpore."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabridge.distributed.layout import ALL, Layout
from lorabridge.distributed.strategy import fitted, read_strategy, write_strategy
from lorabridge.errors import InputError

DATA = Path(__file__).parent / "data" / "strategies"


def test_stages_of_a_merged_file_are_the_stages_files() -> None:
    folder = DATA / "tp4pp2_opt2"
    merged = read_strategy([folder / "merged.ckpt"])
    apart = read_strategy([folder / "strategy_8.ckpt", folder / "strategy_0.ckpt"])
    assert merged.stages == apart.stages
    assert merged.devices == 8
    assert merged.stages[0]["n.b0.up.w"] == Layout((2, 4), ((1,), ()), 2)


def test_json_says_what_protobuf_says_and_the_shape() -> None:
    json = read_strategy([DATA / "tp4pp2_opt2_json" / "merged.json"]).stages
    protobuf = read_strategy([DATA / "tp4pp2_opt2" / "merged.ckpt"]).stages
    assert json[0]["n.b0.up.w"] == Layout((2, 4), ((1,), ()), 2, (64, 16))
    for stage, layouts in protobuf.items():
        for name, layout in layouts.items():
            assert (layout.grid, layout.cuts) == (json[stage][name].grid, json[stage][name].cuts)


def test_an_expanded_json_layout_folds_to_the_protobufs() -> None:
    json = read_strategy([DATA / "other" / "multi_axis.json"]).stages[0]
    protobuf = read_strategy([DATA / "other" / "multi_axis.ckpt"]).stages[0]
    for name, shape in (("w", (32, 16)), ("b", (32,))):
        local = protobuf[name].local_shape(shape)
        assert local is not None
        # the two runs differ in their optimizer shards only
        folded = fitted(
            json[name], Layout(protobuf[name].grid, protobuf[name].cuts, json[name].optimizer).local_shape(shape) or ()
        )
        assert folded is not None
        assert (folded.cuts, folded.shape) == (protobuf[name].cuts, shape)
    assert fitted(json["w"], (5, 16)) is None


def test_mindspore_reads_a_strategy_written_here(tmp_path: Path) -> None:
    from mindspore.parallel._parallel_serialization import _build_searched_strategy

    layouts = {
        "w": Layout((2, 4), ((1,), ()), 2),
        "v": Layout((2, 4), ((), (1,))),
        "b": Layout((2, 2, 2), ((1, 2),), ALL),
        "m": Layout((2, 2, 2), ((1, 2), ())),
    }
    path = tmp_path / "strategy.ckpt"
    path.write_bytes(write_strategy(1, layouts))
    theirs = _build_searched_strategy(str(path))
    assert {name: list(item.dev_matrix[0].dim) for name, item in theirs.items()} == {
        name: list(layout.grid) for name, layout in layouts.items()
    }
    assert list(theirs["w"].tensor_map[0].dim) == [0, -1]
    assert [list(m.dim) for m in theirs["b"].tensor_map] == [[1, 0], []]
    assert theirs["w"].opt_weight_shard_size == 2
    with pytest.raises(InputError, match="no strategy for pipeline stage 0"):
        read_strategy([path])
    path.write_bytes(write_strategy(0, layouts))
    assert read_strategy([path]).stages == {0: layouts}


@pytest.mark.parametrize(
    "name", ["tp4pp2_opt2/strategy_0.ckpt", "tp4pp2_opt_all/strategy_0.ckpt", "other/multi_axis.ckpt"]
)
def test_what_the_compiler_wrote_is_written_again(name: str, tmp_path: Path) -> None:
    from mindspore.parallel._parallel_serialization import _build_searched_strategy

    layouts = read_strategy([DATA / name]).stages[0]
    again = tmp_path / "again.ckpt"
    again.write_bytes(write_strategy(0, layouts))
    ours, theirs = _build_searched_strategy(str(again)), _build_searched_strategy(str(DATA / name))
    assert {k: str(v) for k, v in ours.items()} == {k: str(v) for k, v in theirs.items()}


def test_files_that_are_no_strategy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not begin as a ParallelStrategyMap"):
        read_strategy([DATA / "other" / "group.pb"])
    whole = (DATA / "other" / "tp_only.ckpt").read_bytes()
    for length in range(0, len(whole), 7):
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(whole[:length])
        try:
            found = read_strategy([cut])
        except InputError:
            continue
        assert set(found.stages[0]) < set(read_strategy([DATA / "other" / "tp_only.ckpt"]).stages[0])
    bad = tmp_path / "bad.json"
    bad.write_text('{"parallel_layout_item": {"w": {"dev_matrix": [2], "tensor_map": [3], "tensor_shape": [4]}}}')
    with pytest.raises(InputError, match="names axes that the device matrix"):
        read_strategy([bad])
    bad.write_text(
        '{"parallel_layout_item": {"w": {"dev_matrix": [2], "tensor_map": [0], "tensor_shape": [4], "field": 3}}}'
    )
    assert read_strategy([bad]).stages[0]["w"].field == 3
    bad.write_text(
        '{"parallel_layout_item": {"w": {"dev_matrix": [2], "tensor_map": [0], "tensor_shape": [4],'
        ' "param_split_shape": [1, 2, 1]}}}'
    )
    with pytest.raises(InputError, match="it says the rows of 3 slices, and there are 2"):
        read_strategy([bad])


def test_one_stage_alone_is_not_a_run() -> None:
    with pytest.raises(InputError, match="no strategy for pipeline stage 0"):
        read_strategy([DATA / "tp4pp2_opt2" / "strategy_8.ckpt"])

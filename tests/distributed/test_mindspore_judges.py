"""MindSpore's own merging of slices on the inputs that are put together here, and the law of resharding."""

from __future__ import annotations

import shutil
from pathlib import Path

import mindspore
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor
from safetensors.numpy import load_file, save_file

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.inspect import inspect
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard
from lorabridge.distributed.layout import Layout
from lorabridge.distributed.parallel import Sizes
from lorabridge.distributed.ranks import open_ranks
from lorabridge.distributed.strategy import write_strategy
from lorabridge.errors import InputError, MappingError

DATA = Path(__file__).parent / "data"


def run(folder: Path, layout: Layout, slices: list[np.ndarray]) -> Path:
    """Write a stage's ranks and their strategy."""
    for rank, value in enumerate(slices):
        (folder / f"rank_{rank}").mkdir(parents=True)
        save_file({"table": np.ascontiguousarray(value)}, folder / f"rank_{rank}" / "net.safetensors")
    (folder / "strategy").mkdir()
    (folder / "strategy" / "stage_0.ckpt").write_bytes(write_strategy(0, {"table": layout}))
    return folder


def theirs(folder: Path, slices: list[np.ndarray]) -> np.ndarray:
    strategy = mindspore.build_searched_strategy(str(folder / "strategy" / "stage_0.ckpt"))
    parts = [Parameter(Tensor(value), name="table") for value in slices]
    return mindspore.merge_sliced_parameter(parts, strategy).asnumpy()


def values(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (Layout((4,), ((0,), ()), rows=(3, 1, 0, 5)), [(3, 2), (1, 2), (0, 2), (5, 2)]),
        (Layout((2, 2), ((0,), (1,)), rows=(3, 3, 2, 2)), [(3, 2), (3, 2), (2, 2), (2, 2)]),
        (Layout((2, 2), ((1,), (0,)), rows=(3, 3, 2, 2)), [(3, 2), (2, 2), (3, 2), (2, 2)]),
        (Layout((2, 2), ((0,), ()), rows=(4, 1)), [(4, 2), (4, 2), (1, 2), (1, 2)]),
        (Layout((4,), ((0,), ()), field=3), [(6, 2)] * 4),
        (Layout((2, 2), ((0, 1), ()), field=2), [(2, 3)] * 4),
        (Layout((2, 4), ((1,), ())), [(2, 3)] * 8),
        (Layout((2, 2, 2), ((0,), (2,))), [(2, 3)] * 8),
    ],
)
def test_slices_make_what_merge_sliced_parameter_makes(
    layout: Layout, shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    slices = values(*shapes)
    for index, ranks in layout.holders().items():
        for rank in ranks[1:]:
            slices[rank] = slices[ranks[0]]
        assert layout.place(ranks[0]) == index
    source = open_ranks(run(tmp_path / "run", layout, slices))
    expected = theirs(tmp_path / "run", slices)
    assert source.specs["table"].shape == expected.shape
    assert np.array_equal(source.read("table").view(np.float32), expected)
    source.check_replicas()


def test_lost_rows_of_an_embedding_are_named_and_shown(tmp_path: Path) -> None:
    uneven = run(tmp_path / "uneven", Layout((3,), ((0,), ()), rows=(3, 1, 5)), values((3, 2), (1, 2), (5, 2)))
    fields = run(tmp_path / "fields", Layout((2,), ((0,), ()), field=2), values((4, 2), (4, 2)))
    (uneven / "rank_1" / "net.safetensors").rename(uneven / "rank_1" / "net.gone")
    (fields / "rank_1" / "net.safetensors").rename(fields / "rank_1" / "net.gone")
    with pytest.raises(InputError, match="table: 1 of its slices are on no rank that is there: rank 1"):
        open_ranks(uneven)
    for folder, missing in ((uneven, [(3, 0)]), (fields, [(2, 0), (6, 0)])):
        report = inspect(folder, slices="table")
        assert report.ranks is not None
        (tensor,) = report.ranks.shown
        assert [row.start for row in tensor.slices if row.missing] == missing
        assert tensor.shape == ((9, 2) if folder is uneven else (8, 2))


def test_slices_of_other_rows_than_the_strategy_says_are_refused(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", Layout((2,), ((0,), ()), rows=(3, 1)), values((3, 2), (2, 2)))
    with pytest.raises(InputError, match=r"rank 1 holds shape \(2, 2\) where the strategy says \(1, 2\)"):
        open_ranks(folder)
    layout = Layout((2,), ((0,), ()), field=3)
    with pytest.raises(InputError, match="are not those of 3 fields"):
        open_ranks(run(tmp_path / "fields", layout, values((4, 2), (4, 2))))
    save_file({"table": np.zeros((8, 2), np.float32)}, tmp_path / "whole.safetensors")
    to = tmp_path / "fields" / "strategy" / "stage_0.ckpt"
    with pytest.raises(MappingError, match=r"table: shape .* cannot be cut as the strategy says"):
        reshard(tmp_path / "whole.safetensors", tmp_path / "out", ReshardOptions(to=(to,)))


def test_unified_safetensors_makes_the_same_of_the_same_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = type("Memory", (), {"percent": 1.0, "available": 1 << 40, "total": 1 << 40})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    strategy = DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt"
    mindspore.unified_safetensors(
        str(DATA / "ranks" / "tp4pp2_opt2"), str(strategy), str(tmp_path / "theirs"), max_process_num=1
    )
    found = {
        name: value
        for p in sorted((tmp_path / "theirs").glob("part*.safetensors"))
        for name, value in load_file(p).items()
    }
    reassemble(DATA / "ranks" / "tp4pp2_opt2", tmp_path / "ours.safetensors", ConvertOptions(strategies=(strategy,)))
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == found.keys()
    assert all(np.array_equal(ours[name], found[name]) for name in ours)
    reassembled = tmp_path / "again.safetensors"
    done = ConvertOptions(target_dialect="ms", source_dialect="ms")
    from lorabridge.actions.convert import convert

    convert(tmp_path / "theirs", reassembled, done)
    again = load_file(reassembled)
    assert all(np.array_equal(again[name], ours[name]) for name in ours)


SIZES = st.builds(
    lambda tp, pp, shards, copies: Sizes(tp, pp, shards, shards * copies),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2]),
)  # fmt: skip


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=SIZES, then=SIZES, number=st.integers(0, 1 << 30))
def test_resharding_twice_is_resharding_once(first: Sizes, then: Sizes, number: int, tmp_path: Path) -> None:
    work = tmp_path / f"{number} {first} {then}"
    shutil.rmtree(work, ignore_errors=True)
    rng = np.random.default_rng(number)
    model = {f"model.layers.{i}.attention.{w}.weight": (8, 16) for i in range(2) for w in ("wq", "wo")}
    model |= {"model.tok_embeddings.embedding_weight": (16, 8), "model.norm_out.weight": (8,), "global_step": (1,)}
    work.mkdir()
    save_file({n: rng.standard_normal(s).astype(np.float32) for n, s in model.items()}, work / "m.safetensors")
    for source, target, sizes in (("m.safetensors", "n", then), ("m.safetensors", "m", first), ("m", "m_n", then)):
        options = ReshardOptions(sizes=sizes, format="safetensors")
        reshard(work / source, work / target, options)
    held = [
        {p.relative_to(work / f): p.read_bytes() for p in (work / f).rglob("*") if p.is_file()} for f in ("n", "m_n")
    ]
    assert held[0] == held[1]

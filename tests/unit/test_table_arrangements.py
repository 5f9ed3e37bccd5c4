"""The grammar's row orders, axes, stacks, spans and shared modules: inverses as expressions, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge import axes, inversion
from lorabridge.dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, MappingError, UsageError
from lorabridge.families.arrangements import Arrangement
from lorabridge.families.tables import Table, check_complete, map_adapter, names, read_table, sizes_from_config
from lorabridge.sizes import SizeError
from lorabridge.tensors import TensorSpec

F32 = BY_NAME["float32"]
GOOD = """schema = 1
family = "toy"
[sizes]
hidden = "d_model"
heads = "n_head"
kv = "n_kv"
head = "d_head"
half = "d_head / 2"
dense = "n_dense"
layers = "n_layer"
extra = "n_extra or 0"
experts = "n_expert"
[holes]
i = "layers"
d = "dense"
m = "dense .. layers"
n = { count = "extra", hf = "layers", ms = "0" }
e = "experts"
[[linear]]
hf = "h.{i}.q"
ms = "b.{i}.wq"
out = "heads * head"
in = "hidden"
bias = true
ms_rows = "heads 2 half -> heads half 2"
[[linear]]
hf = { "k v" = "h.{i}.kv", o = "h.{i}.o" }
ms = { k = "b.{i}.wk", "v o" = "b.{i}.vo" }
out = { k = "kv * head", v = "kv * head", o = "kv * head" }
in = "hidden"
hf_groups = { "k v" = "kv" }
[[linear]]
hf = "h.{d}.up"
ms = "b.{d}.w1"
out = "7"
in = "hidden"
[[linear]]
hf = { g = "h.{m}.experts.{e}.g", u = "h.{m}.experts.{e}.u" }
ms = { gu = "b.{m}.gu.{e}" }
out = { g = "5", u = "5" }
in = "hidden"
ms_order = "in out"
[[stack]]
ms = "b.{m}.gu"
item = "b.{m}.gu.{e}.weight"
flat = true
[[linear]]
hf = "h.{n}.q"
ms = "more.{n}.wq"
out = "heads * head"
in = "hidden"
optional = true
[[param]]
hf = "conv.weight"
ms = "conv.weight"
axes = "hidden 4 3"
ms_axes = "4 hidden 1 3"
[[param]]
hf = "place.weight"
ms = "place.table"
axes = "6 hidden"
ms_axes = "(6 hidden)"
[[conv]]
hf = "first"
ms = "first"
out = "hidden"
in = "4"
kernel = "3"
bias = true
ms_axes = "out in 1 3"
[[param]]
hf = "embed.weight"
ms = "embed.weight"
axes = "11 hidden"
[[tied]]
hf = "h.{n}.embed.weight"
to = "embed.weight"
"""
CONFIG = {"d_model": 6, "n_head": 4, "n_kv": 2, "d_head": 4, "n_dense": 1, "n_layer": 3, "n_extra": 2, "n_expert": 3}


@pytest.fixture
def table() -> Table:
    return read_table(GOOD, "toy.toml")


def whole(shapes: dict[str, tuple[int, ...]]) -> Adapter:
    extras = [Extra(*n.rpartition(".")[::2], axes.Read(n, F32, shape), "base") for n, shape in shapes.items()]
    return Adapter((), tuple(extras))


def test_names_and_shapes_of_both_sides(table: Table) -> None:
    sizes = sizes_from_config(table, CONFIG)
    hf, ms = (names(table, sizes, side, optional=True) for side in ("hf", "ms"))  # type: ignore[arg-type]
    assert hf["h.2.kv.weight"] == (16, 6)
    assert ms["b.2.vo.weight"] == (16, 6)
    assert [name for name in hf if ".up" in name] == ["h.0.up.weight"]
    assert {name for name in hf if "experts" in name} == {
        f"h.{m}.experts.{e}.{p}.weight" for m in (1, 2) for e in range(3) for p in "gu"
    }
    assert ms["b.2.gu"] == (18, 10)
    assert "b.0.gu" not in ms
    assert {name for name in ms if "more" in name} == {"more.0.wq.weight", "more.1.wq.weight"}
    assert {"h.3.q.weight", "h.4.q.weight"} <= set(hf)
    assert (ms["conv.weight"], ms["place.table"], ms["first.weight"]) == ((4, 6, 1, 3), (36,), (6, 4, 1, 3))
    assert (hf["conv.weight"], hf["place.weight"], hf["first.weight"]) == ((6, 4, 3), (6, 6), (6, 4, 3))


def test_there_and_back_is_the_identity(table: Table) -> None:
    sizes = sizes_from_config(table, CONFIG)
    shapes = names(table, sizes, "hf", optional=True)
    there = map_adapter(table, whole(shapes), to="ms", sizes=sizes)
    assert {extra.name: extra.value.shape for extra in there.extras} == names(table, sizes, "ms", optional=True)
    said = {extra.name: extra.value for extra in there.extras}
    back = map_adapter(table, whole({name: value.shape for name, value in said.items()}), to="hf", sizes=sizes)
    assert {e.name: axes.substitute(e.value, said) for e in back.extras} == {
        name: axes.Read(name, F32, shape) for name, shape in shapes.items()
    }
    assert inversion.invert(said).lost == ()
    assert table.reverse().reverse() == table


def test_rows_are_counted_as_the_pattern_says(table: Table) -> None:
    """Weight, bias, factor B, magnitude and the bias of B: all rows lie the same way."""
    sizes = sizes_from_config(table, CONFIG)
    order = np.arange(16).reshape(4, 2, 2).transpose(0, 2, 1).reshape(-1)
    bits = {
        name: np.arange(np.prod(shape), dtype="<u4").reshape(shape)
        for name, shape in {"h.1.q.weight": (16, 6), "h.1.q.bias": (16,), "a": (3, 6), "b": (16, 3), "m": (16,),
                            "lb": (16,)}.items()
    }  # fmt: skip

    def value(expr: axes.Expr) -> np.ndarray:
        return axes.evaluate(expr, bits.__getitem__, {})

    there = map_adapter(table, whole({n: bits[n].shape for n in ("h.1.q.weight", "h.1.q.bias")}), to="ms", sizes=sizes)
    made = {extra.name: value(extra.value) for extra in there.extras}
    assert (made["b.1.wq.weight"] == bits["h.1.q.weight"][order]).all()
    assert (made["b.1.wq.bias"] == bits["h.1.q.bias"][order]).all()
    a, b, m, lb = (axes.Read(n, F32, bits[n].shape) for n in ("a", "b", "m", "lb"))
    lora = LoraModule("h.1.q", "linear", 16, (Term(a, b, 0, 16),), Scaling(1, 3), magnitude=m, lora_bias=lb)
    (turned,) = map_adapter(table, Adapter((lora,)), to="ms", sizes=sizes).modules
    assert turned.magnitude is not None
    assert turned.lora_bias is not None
    assert (value(turned.terms[0].b) == bits["b"][order]).all()
    assert (value(turned.magnitude) == bits["m"][order]).all()
    assert (value(turned.lora_bias) == bits["lb"][order]).all()
    assert turned.terms[0].a == a
    (again,) = map_adapter(table, Adapter((turned,)), to="hf", sizes=sizes).modules
    assert (again.terms, again.magnitude, again.lora_bias) == (lora.terms, m, lb)


def test_modules_that_share_parts_otherwise_on_either_side(table: Table) -> None:
    """hf holds k and v head by head in one module; ms holds v and o in one."""
    sizes = sizes_from_config(table, CONFIG)
    a, b = axes.Read("a", F32, (2, 6)), axes.Read("b", F32, (16, 2))
    kv = LoraModule("h.0.kv", "linear", 16, (Term(a, b, 0, 16),), Scaling(1, 2))
    vo, k = map_adapter(table, Adapter((kv,)), to="ms", sizes=sizes).modules
    bits = {"b": np.arange(32, dtype="<u4").reshape(16, 2)}
    assert (k.path, k.out, vo.path, vo.out) == ("b.0.wk", 8, "b.0.vo", 16)
    grouped = bits["b"].reshape(2, 2, 4, 2)
    assert (axes.evaluate(k.terms[0].b, bits.__getitem__, {}) == grouped[:, 0].reshape(8, 2)).all()
    (v,) = vo.terms
    assert (v.start, v.stop) == (0, 8)
    assert (axes.evaluate(v.b, bits.__getitem__, {}) == grouped[:, 1].reshape(8, 2)).all()
    (again,) = map_adapter(table, Adapter((k, vo)), to="hf", sizes=sizes).modules
    assert again.terms == kv.terms


def test_a_convolution_of_another_rank_keeps_its_factors_elements(table: Table) -> None:
    a, b = axes.Read("a", F32, (2, 4, 3)), axes.Read("b", F32, (6, 2, 1))
    conv = LoraModule("first", "conv1d", 6, (Term(a, b, 0, 6),), Scaling(1, 2), kernel_size=(3,))
    sizes = sizes_from_config(table, CONFIG)
    (turned,) = map_adapter(table, Adapter((conv,)), to="ms", sizes=sizes).modules
    assert (turned.kind, turned.kernel_size) == ("conv2d", (1, 3))
    assert (turned.terms[0].a.shape, turned.terms[0].b.shape) == ((2, 4, 1, 3), (6, 2, 1, 1))
    (again,) = map_adapter(table, Adapter((turned,)), to="hf", sizes=sizes).modules
    assert again.terms == conv.terms
    assert (again.kind, again.kernel_size) == ("conv1d", (3,))


def test_numbers_shift_between_the_sides_and_need_a_config(table: Table) -> None:
    sizes = sizes_from_config(table, CONFIG)
    shapes = {"h.4.q.weight": (16, 6), "h.4.embed.weight": (11, 6), "embed.weight": (11, 6)}
    there = map_adapter(table, whole(shapes), to="ms", sizes=sizes)
    assert {extra.name for extra in there.extras} == {"more.1.wq.weight", "embed.weight"}
    assert there.left_out == (("h.4.embed.weight", "tied: equal to embed.weight"),)
    with pytest.raises(MappingError) as error:
        map_adapter(table, whole({"h.4.q.weight": (16, 6)}), to="ms")
    assert "h.4.q.weight: its number decides between toy.toml:" in error.value.where[0]
    assert "--config config.json" in error.value.hint
    with pytest.raises(MappingError, match=r"number 5, but the numbers \{n\} are 3 ... 4|its number decides"):
        map_adapter(table, whole({"h.5.q.weight": (16, 6)}), to="ms", sizes=sizes)
    with pytest.raises(MappingError, match="the name alone does not tell"):
        check_complete(table, {"h.0.q.weight": (16, 6)}, side="hf")
    none = sizes_from_config(table, CONFIG | {"n_extra": 0, "n_dense": 0})
    assert not any("more" in name or "up" in name for name in names(table, none, "ms", optional=True))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("heads 2 half -> heads half 2", "heads 2 half -> heads half", "does not have each of heads 2 half once"),
        ("heads 2 half -> heads half 2", "heads 2 half", "is not 'a b c -> a c b'"),
        ("heads 2 half -> heads half 2", "heads (2 half) -> heads half 2", "is not 'a b c -> a c b'"),
        ("heads 2 half -> heads half 2", "heads 2 rest -> heads rest 2", "'rest' in 'rest' is not in [sizes]"),
        ('ms_axes = "4 hidden 1 3"', 'ms_axes = "4 hidden 1"', "does not have each of hidden 4 3 once"),
        ('ms_axes = "(6 hidden)"', 'ms_axes = "(6 hidden"', "brackets that do not pair"),
        ('ms_axes = "(6 hidden)"', 'ms_axes = "((6 hidden))"', "brackets that do not pair"),
        ('ms_axes = "out in 1 3"', 'ms_axes = "in out 1 3"', "keeps the order out, in, kernel"),
        ('hf_groups = { "k v" = "kv" }', 'hf_groups = { "k o" = "kv" }', "hf has no module 'k o'"),
        ('k = "b.{i}.wk", "v o"', 'k = "b.{i}.wk", "v k"', "or name each of k, v, o once"),
        ('item = "b.{m}.gu.{e}.weight"', 'item = "b.{m}.gu.weight"', "and one more, the items' number"),
        ('item = "b.{m}.gu.{e}.weight"', 'item = "b.{m}.ug.{e}.weight"', "is no parameter of a rule"),
        ('ms = "b.{m}.gu"\n', 'ms = "b.{m}.gu"\nhf = "x.{m}"\n', "a stack lies on one side"),
        ('n = { count = "extra", hf = "layers", ms = "0" }', "n = 3", "a hole is 'n', 'a .. b'"),
        ('n = { count = "extra", hf = "layers", ms = "0" }', 'n = { count = "extra", hf = "dense" }',
         "can fit the same hf name"),
        ('hf = "h.{n}.embed.weight"', 'hf = "h.{x}.embed.weight"', "integer hole {x} is not in [holes]"),
        ('hf = "h.{d}.up"\nms = "b.{d}.w1"', 'hf = "h.{d:1|2}.up"\nms = "b.{d:3|4}.w1"',
         "has options here and numbers in [holes]"),
    ],
)  # fmt: skip
def test_what_breaks_a_law_is_refused(old: str, new: str, problem: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as error:
        read_table(GOOD.replace(old, new, 1), "toy.toml")
    assert any(problem in place for place in error.value.where), error.value.where


def test_rows_that_a_config_does_not_fill_are_refused() -> None:
    table = read_table(GOOD.replace("heads 2 half -> heads half 2", "kv 2 half -> kv half 2"), "toy.toml")
    with pytest.raises(MappingError, match="counts 8, not 16"):
        sizes_from_config(table, CONFIG)


def test_a_default_that_no_name_fits_lists_the_choices_that_do() -> None:
    from lorabridge.families.tables import load_family

    llama = load_family("llama")
    with pytest.raises(UsageError, match="the names do not tell which qkv_concat is meant") as error:
        map_adapter(llama, whole({"model.layers.0.attention.w_qkv.weight": (12, 4)}), to="hf")
    assert "qkv_concat=contiguous" in error.value.hint
    assert "qkv_concat=grouped" in error.value.hint
    assert "qkv_concat=off" not in error.value.hint


@settings(deadline=None, max_examples=60)
@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4), st.integers(0, 1))
def test_row_orders_are_inverse_as_expressions(order: list[int], lengths: list[int], axis: int) -> None:
    sizes = dict(zip("abcd", lengths, strict=True))
    rows = Arrangement.of_rows("a b c d -> " + " ".join("abcd"[k] for k in order))
    total = int(np.prod(lengths))
    x = axes.read(TensorSpec("x", F32, (total, 5) if axis == 0 else (5, total)))
    there = rows.store_rows(x, axis, sizes)
    assert rows.load_rows(there, axis, sizes) == x
    assert rows.store_rows(rows.load_rows(x, axis, sizes), axis, sizes) == x
    bits = np.arange(total * 5, dtype="<u4").reshape(x.shape)
    wanted = np.moveaxis(
        np.moveaxis(bits, axis, 0).reshape(*lengths, 5).transpose(*order, 4).reshape(total, 5), 0, axis
    )
    assert (axes.evaluate(there, {"x": bits}.__getitem__, {}) == wanted).all()


@settings(deadline=None, max_examples=60)
@given(st.permutations(["a", "b", "3"]), st.integers(0, 3), st.booleans())
def test_axes_are_inverse_as_expressions(order: list[str], one: int, joined: bool) -> None:
    words = [*order[:one], "1", *order[one:]]
    text = f"({words[0]} {words[1]}) {' '.join(words[2:])}" if joined else " ".join(words)
    arranged = Arrangement.of_axes(["a", "b", "3"], text)
    x = axes.read(TensorSpec("x", F32, (2, 5, 3)))
    sizes = {"a": 2, "b": 5}
    stored = arranged.store(x, sizes)
    assert stored.shape == arranged.stored_shape(sizes)
    assert arranged.load(stored, sizes) == x


def test_one_length_of_a_row_order_may_follow_from_the_others() -> None:
    rows = Arrangement.of_rows("heads 2 half -> heads half 2")
    assert rows.lengths({"heads": 3, "half": 4}, 24) == (3, 2, 4)
    with pytest.raises(SizeError, match="needs heads, half"):
        rows.lengths(None, 24)

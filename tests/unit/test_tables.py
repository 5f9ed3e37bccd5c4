"""The grammar and its load-time proofs: each law has a table that breaks it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge import axes
from lorabridge.actions.tables import check, list_tables, show
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, MappingError, UsageError
from lorabridge.families import tables
from lorabridge.families.layouts import fuse_rows, split_rows
from lorabridge.sizes import Size, SizeError, config_integer
from lorabridge.tensors import TensorSpec

GOOD = """schema = 1
family = "toy"
match = { model_type = ["toy"] }

[sizes]
hidden = "d_model"
heads = "n_head"
kv = "n_kv or n_head"
head = "d_head or d_model / n_head"
layers = "n_layer"

[holes]
i = "layers"

[prefix]
hf = { text = "model.", optional = true }
ms = "net."

[[layout]]
name = "qkv"
choices = { grouped = "2.0 and later", plain = "1.x" }

[[linear]]
hf = { q = "h.{i}.q", k = "h.{i}.k", v = "h.{i}.v" }
ms = { qkv = "b.{i}.w_qkv" }
out = { q = "heads * head", k = "kv * head", v = "kv * head" }
in = "hidden"
groups = "kv"
when = { qkv = "grouped" }

[[linear]]
hf = { q = "h.{i}.q", k = "h.{i}.k", v = "h.{i}.v" }
ms = { qkv = "b.{i}.w_qkv" }
out = { q = "heads * head", k = "kv * head", v = "kv * head" }
in = "hidden"
when = { qkv = "plain" }

[[param]]
hf = "h.{i}.{n:ln1|ln2}.{t:weight|bias}"
ms = "b.{i}.{n:norm1|norm2}.{t:gamma|beta}"
axes = "hidden"

[[embedding]]
hf = "wte.weight"
ms = "embed.table"
axes = "1000 hidden"

[[tied]]
hf = "head.weight"
to = "wte.weight"

[[buffer]]
hf = "h.{i}.mask"
drop = "rebuilt"
"""
CONFIG = {"d_model": 12, "n_head": 4, "n_kv": 2, "n_layer": 3}


def broken(old: str, new: str) -> tuple[str, ...]:
    assert old in GOOD
    with pytest.raises(InputError) as error:
        tables.read_table(GOOD.replace(old, new, 1), "toy.toml")
    return error.value.where


def line_of(text: str) -> int:
    return next(k for k, line in enumerate(GOOD.splitlines(), 1) if text in line)


def test_the_good_table_loads_and_knows_its_names() -> None:
    table = tables.read_table(GOOD, "toy.toml")
    sizes = tables.sizes_from_config(table, CONFIG)
    assert sizes == {"hidden": 12, "heads": 4, "kv": 2, "head": 3, "layers": 3}
    names = tables.names(table, sizes, "ms", layout={"qkv": "plain"})
    assert names["net.b.2.w_qkv.weight"] == (24, 12)
    assert names["net.embed.table"] == (1000, 12)
    assert len(names) == 3 * 5 + 1
    assert table.reverse().reverse() == table
    assert tables.names(table.reverse(), sizes, "hf", layout={"qkv": "plain"}) == names
    with pytest.raises(UsageError, match="nothing tells which qkv is meant"):
        tables.names(table, sizes, "ms")


@pytest.mark.parametrize(
    ("old", "new", "line", "problem"),
    [
        # unknown keys, in every kind of section
        ("schema = 1", "schema = 1\nauthor = 'me'", 2, "unknown key 'author'"),
        ("groups = \"kv\"", 'grups = "kv"', line_of('groups = "kv"'), "unknown key 'grups'"),
        ("model_type", "model_kind", 0, "unknown key 'model_kind'"),
        ("optional = true", "optionl = true", 16, "unknown key 'optionl'"),
        ('drop = "rebuilt"', 'drop = "rebuilt"\nregex = ".*"', line_of("drop") + 1, "unknown key 'regex'"),
        ("schema = 1", "schema = 2", 1, "schema must be 1"),
        ("schema = 1\n", "", 0, "schema must be 1"),
        # the same holes on both sides
        ('ms = { qkv = "b.{i}.w_qkv" }', 'ms = { qkv = "b.w_qkv" }', 23, "the same holes"),
        ('ms = "b.{i}.{n:norm1', 'ms = "b.{j}.{n:norm1', line_of("[[param]]"), "the same holes"),
        ('k = "h.{i}.k"', 'k = "h.{j}.k"', 23, "the same holes"),
        # bijective choices
        ("{t:gamma|beta}", "{t:gamma|beta|eps}", line_of("[[param]]"), "equally many options"),
        ("{t:gamma|beta}", "{t:gamma|gamma}", line_of("{t:gamma|beta}"), "repeats an option"),
        ("{n:norm1|norm2}", "{n:norm1|}", line_of("{n:norm1|norm2}"), "empty or unreadable option"),
        # templates that can be read in two ways, or are regular expressions
        ("{n:ln1|ln2}", "{i}", line_of("{n:ln1"), "uses a hole twice"),
        ("{n:ln1|ln2}", "ln(1|2)", line_of("{n:ln1"), "character other"),
        ('"h.{i}.mask"', '"h.{i}7.mask"', line_of(".mask"), "a digit after the integer"),
        # no two templates of a side fit one name
        ('v = "h.{i}.v"', 'v = "h.{i}.k"', 23, "h.{i}.k and h.{i}.k"),
        ('hf = "h.{i}.mask"', 'hf = "h.{i}.{n:ln2|ln3}.bias"', line_of("[[buffer]]"), "can fit the same hf name"),
        ('hf = "head.weight"', 'hf = "model.wte.weight"', line_of("[[tied]]"), "can fit the same hf name"),
        ('ms = "embed.table"', 'ms = "b.7.norm2.beta"', line_of("[[embedding]]"), "can fit the same ms name"),
        ("qkv = \"plain\" }", 'qkv = "grouped" }', 31, "can fit the same ms name"),
        # parts divide by groups
        ('k = "kv * head", v = "kv * head" }\nin = "hidden"\ngroups = "kv"',
         'k = "10", v = "9" }\nin = "hidden"\ngroups = "3"', 23, "part 'k' has 10 rows"),
        ('out = { q = "heads * head", k = "kv * head", v = "kv * head" }\nin = "hidden"\ngroups = "kv"',
         'out = { q = "12", k = "10", v = "9" }\nin = "hidden"\ngroups = "3"', 23, "which do not divide by groups = 3"),
        # every drop has a reason
        ('drop = "rebuilt"', "", line_of("[[buffer]]"), "drop must be given"),
        ('drop = "rebuilt"', 'drop = "  "', line_of("drop ="), "drop must be given"),
        # what is used is declared
        ('axes = "hidden"', 'axes = "hiden"', line_of("[[param]]"), "'hiden' in 'hiden' is not in [sizes]"),
        ('i = "layers"', 'j = "layers"', 23, "integer hole {i} is not in [holes]"),
        ('i = "layers"', 'i = "depth"', 0, "counts to 'depth', which is not in [sizes]"),
        ('when = { qkv = "plain" }', 'when = { qkv = "other" }', 31, "layout 'qkv' has no choice 'other'"),
        ('when = { qkv = "plain" }', 'when = { fc = "plain" }', 31, "which no [[layout]] declares"),
        ('hidden = "d_model"', 'hidden = "heads * head"', 0, "uses 'heads' before its line"),
        ('to = "wte.weight"', 'to = "wpe.weight"', line_of("[[tied]]"), "is not a parameter that a rule renames"),
        # forms
        ('ms = { qkv = "b.{i}.w_qkv" }', 'ms = { a = "b.{i}.a", b = "b.{i}.b" }', 23, "exactly one"),
        (', v = "kv * head" }', " }", line_of('out = { q'), "out must give the size of q, k, v"),
        ('in = "hidden"', 'in = "hidden -"', line_of('in = "hidden"'), "unreadable character"),
        ('in = "hidden"', 'in = "1e9 * hidden"', line_of('in = "hidden"'), "is not 'a * b'"),
        ('in = "hidden"', "in = 5", line_of('in = "hidden"'), "in must be given as a text"),
        ('choices = { grouped = "2.0 and later", plain = "1.x" }',
         'choices = { grouped = "2.0" }', 19, "two entries"),
        ('choices = { grouped = "2.0 and later", plain = "1.x" }',
         'choices = { grouped = "2.0 and later", plain = "1.x" }\nconfig = { fused = "other" }', 19,
         "config says 'other', which is not a choice"),
        ('choices = { grouped = "2.0 and later", plain = "1.x" }',
         'choices = { grouped = "2.0 and later", plain = "1.x" }\nconfig = { fused = ["grouped", "none"] }', 19,
         "config says 'none', which is not a choice"),
        ('choices = { grouped = "2.0 and later", plain = "1.x" }',
         'choices = { grouped = "2.0 and later", plain = "1.x" }\nconfig = { fused = 3 }', 0, "config is { field ="),
        ('drop = "rebuilt"', 'drop = "rebuilt"\nwhen = { fc = "plain" }', line_of("[[buffer]]"),
         "which no [[layout]] declares"),
        ("[[buffer]]", '[[refused]]\nconfig = "depth"\nwhy = "none"\n\n[[buffer]]', line_of("[[buffer]]"),
         "has over or under"),
        ("[[buffer]]", '[[refused]]\nconfig = "depth"\nover = -1\nwhy = "none"\n\n[[buffer]]', line_of("[[buffer]]"),
         "numbers of 0 or more"),
        ("[[param]]", "[param]", 0, "param must be written as [[param]]"),
        ('ms = "net."', 'ms = "net"', 17, "ends with a dot"),
    ],
)  # fmt: skip
def test_a_broken_law_is_named_with_its_line(old: str, new: str, line: int, problem: str) -> None:
    where = broken(old, new)
    assert any(problem in text for text in where), where
    if line:
        assert any(text.startswith(f"toy.toml:{line}: ") and problem in text for text in where), where


def test_every_problem_is_listed_at_once() -> None:
    text = GOOD.replace('in = "hidden"', 'in = "hiden"').replace('axes = "1000 hidden"', 'axes = "1000 widht"')
    with pytest.raises(InputError) as error:
        tables.read_table(text, "toy.toml")
    assert len(error.value.where) == 3


@pytest.mark.parametrize(
    "text",
    ["", "schema = 1", "= 1", "a = " + "[" * 5000, "a." * 3000 + "b = 1", "schema = 1\nschema = 1", "x = " + "9" * 9000,
     "\0",
     'schema = 1\nfamily = "x"\nidentity = true\n[sizes]\na = "b"', 'schema = 1\nfamily = "../x"\nidentity = true',
     "linear = 3", "linear = [3]",
     'schema = 1\nfamily = ["x"]\nlinear = [{hf = {}, ms = {}}]', "sizes = []\nprefix = 3"],
)  # fmt: skip
def test_hostile_text_is_refused_quickly(text: str) -> None:
    start = time.process_time()
    with pytest.raises(InputError):
        tables.read_table(text, "x.toml")
    assert time.process_time() - start < 20


def test_large_files_and_other_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * (1 << 20))
    with pytest.raises(InputError, match="larger than"):
        tables.load_table(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        tables.load_table(path)
    with pytest.raises(InputError, match="no such file"):
        tables.load_table(tmp_path / "none.toml")
    with pytest.raises(InputError, match="this is a directory"):
        tables.load_table(tmp_path)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(GOOD)), st.text(max_size=3), st.integers(0, 20))
def test_a_damaged_table_loads_or_is_refused(at: int, put: str, cut: int) -> None:
    try:
        table = tables.read_table(GOOD[:at] + put + GOOD[at + cut :], "toy.toml")
    except InputError as error:
        places = error.where
    else:
        assert table.reverse().reverse() == table
        return
    assert places
    assert all(place.startswith("toy.toml") for place in places)


def test_own_tables_stand_beside_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(GOOD)
    assert set(tables.load_tables(tmp_path)) >= {"toy", "gpt2", "bert", "identity"}
    (tmp_path / "mine.toml").write_text(GOOD.replace('family = "toy"', 'family = "gpt2"'))
    with pytest.raises(InputError, match="two tables claim the family 'gpt2'"):
        tables.load_tables(tmp_path)
    with pytest.raises(InputError, match="not a directory"):
        tables.load_tables(tmp_path / "none")


def test_parts_that_do_not_divide_by_groups_are_found_with_the_config() -> None:
    table = tables.read_table(GOOD.replace('groups = "kv"', 'groups = "heads"'), "toy.toml")
    with pytest.raises(MappingError, match="part 'k' has kv \\* head = 6 rows, which do not divide by groups"):
        tables.sizes_from_config(table, CONFIG)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a", 6), ("4 * a", 24), ("a / b", 3), ("a*b / 4", 3), ("x or a", 6), ("x or y or 7", 7), ("x * 2 or 5", 5),
     ("n.a or 3", 4), ("labels", 2), ("zero or a", None), ("b / a", None), ("x", None), ("a / zero", None),
     ("999999999 * 999999999", None), ("flag", None), ("text", None), ("labels.0", None), ("depths.1", 3),
     ("depths", 2), ("depths.2 or 9", 9), ("stages.1.0", 5), ("a + b", 8), ("2 * a + b / 2", 13), ("x + a or b", 2),
     ("b + x or a + 1", 7), ("a + zero", None)],
)  # fmt: skip
def test_size_expressions(text: str, value: int | None) -> None:
    config = {
        "a": 6,
        "b": 2,
        "x": None,
        "n": {"a": 4},
        "labels": {"0": "A", "1": "B"},
        "zero": 0,
        "flag": True,
        "text": "6",
        "depths": [2, 3],
        "stages": [[4], [5]],
    }
    size = Size.parse(text)
    if value is None:
        with pytest.raises(SizeError):
            size.value(lambda name: config_integer(config, name))
    else:
        assert size.value(lambda name: config_integer(config, name)) == value


@pytest.mark.parametrize(
    "text", ["", "a *", "* a", "a b", "or a", "a or", "a +", "+ a", "a - b", "(a)", "a ** b", "2.5", "-1", "? or 2"]
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(SizeError):
        Size.parse(text)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 1))
def test_row_layouts_are_inverse_as_expressions(per_group: list[int], groups: int, axis: int) -> None:
    sizes = [rows * groups for rows in per_group]

    def shape(rows: int) -> tuple[int, ...]:
        return (rows, 3) if axis == 0 else (3, rows)

    dtype = BY_NAME["float32"]
    whole = axes.read(TensorSpec("w", dtype, shape(sum(sizes))))
    pieces = split_rows(whole, sizes, groups=groups, axis=axis)
    assert [piece.shape for piece in pieces] == [shape(size) for size in sizes]
    assert fuse_rows(pieces, groups=groups, axis=axis) == whole
    parts = tuple(axes.read(TensorSpec(f"p{k}", dtype, shape(size))) for k, size in enumerate(sizes))
    assert split_rows(fuse_rows(parts, groups=groups, axis=axis), sizes, groups=groups, axis=axis) == parts


def test_lists_and_contents_can_be_shown() -> None:
    families = {line.family: line for line in list_tables().tables}
    assert families["bert"].layouts == (("mlm_head", ("cell", "script")),)
    rows = show("gpt2").rows
    fused = next(row for row in rows if row.hf == ("transformer.h.{i}.attn.c_attn",))
    assert fused.ms[1] == "backbone.blocks.{i}.attention.dense2"
    assert fused.operation == "split q[hidden] k[hidden] v[hidden], transpose"
    assert any(row.operation == "equals wte.weight" for row in rows)
    assert any(row.operation.startswith("left out: causal mask") for row in rows)
    assert show("identity").rows == ()
    with pytest.raises(UsageError, match="no table for the family 'gpt3'"):
        show("gpt3")


def test_a_file_is_checked_without_raising(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(GOOD)
    good = check(path)
    assert good.ok
    assert dict(good.counts) == {"linear": 2, "embedding": 1, "param": 1, "tied": 1, "buffer": 1, "layout": 1}
    path.write_text(GOOD.replace("drop", "dropp"))
    assert not check(path).ok
    assert any("unknown key 'dropp'" in problem for problem in check(path).problems)
    path.write_text("=")
    assert check(path).problems[0].startswith("the table is not TOML: toy.toml: ")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "mappings").glob("*.toml")), ids=lambda p: p.stem)
def test_a_shipped_table_is_proved(path: Path) -> None:
    assert tables.load_table(path) == tables.load_family(path.stem)


def test_shipped_tables_are_quick_to_load() -> None:
    count = len(tables.load_tables())
    start = time.process_time()
    tables.load_tables()
    assert time.process_time() - start < 0.2 * count


def test_the_example_of_the_grammar_page_is_a_table() -> None:
    page = (Path(__file__).parents[2] / "mappings" / "README.md").read_text("utf-8")
    table = tables.read_table(page.split("```toml\n")[1].split("```")[0], "README.md")
    config = {"d_model": 8, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "vocab_size": 9}
    sizes = tables.sizes_from_config(table, config)
    names = tables.names(table, sizes, "ms", layout={"qkv": "grouped"}, architecture="ToyForTokenClassification")
    assert names["backbone.blocks.1.w_qkv.weight"] == (16, 8)
    assert names["backbone.blocks.0.output.mapping.weight"] == (8, 32)
    assert names["classifier.weight"] == (-1, 8)


def test_a_shipped_table_is_filed_under_its_family() -> None:
    """`load_family` opens one file; it may rely on the name."""
    from lorabridge.families.tables import family_names, load_family, load_tables

    assert family_names() == sorted(load_tables())
    assert all(load_family(name).family == name for name in family_names())

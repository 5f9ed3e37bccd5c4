"""Reports of verify: what the pages hold, that they stand alone, and that nothing in a file's names gets out."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorabridge.actions import report_file
from lorabridge.actions.verify_report import Check, ComparedFile, DepthResult, ModuleRow, VerifyReport
from lorabridge.errors import OutputError, UsageError
from lorabridge.reports import svg
from lorabridge.reports.html import page
from lorabridge.reports.markdown import code, markdown, plain

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\u202eb\x1b[31m\u200b", "x' onload='y", "a|b`c``d",
    "](http://evil.example)", "</title></style><b>", "&lt;", "\ud800lone", "line\nbreak", "]]>", "<!-- -->", "-->",
]  # fmt: skip
EMPTY = {"meta", "rect", "path", "wbr"}


class Reader(HTMLParser):
    """Collect tags, attributes and text, and insist that every tag is closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in EMPTY:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def row(path: str, ok: bool | None = True, **more: object) -> ModuleRow:
    given = {"max_abs": 1e-6, "bound": 1e-5, "ratio": 0.1, "cosine": 1.0, "delta_norm": 1.0, "rank": 8} | more
    return ModuleRow(path, "linear", ok, **given)  # type: ignore[arg-type]


def report(*depths: DepthResult, paths: tuple[str, str] = ("adapter", "out.ckpt"), **more: object) -> VerifyReport:
    files = tuple(
        ComparedFile(role, path, "safetensors", "peft", "torch", 2, 2048)
        for role, path in zip(("SRC", "DST"), paths, strict=True)
    )
    given = {"relation": "adapters", "compared": ("two adapters",), "warnings": (), "command": "lorabridge verify a b",
             "seconds": 1.0} | more  # fmt: skip
    return VerifyReport(files=files, depths=depths, **given)  # type: ignore[arg-type]


def network(layers: int, bad: tuple[str, ...] = ()) -> tuple[ModuleRow, ...]:
    random.seed(1)
    names = [f"model.layers.{i}.{leaf}" for i in range(layers) for leaf in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]
    return tuple(
        row(name, name not in bad, delta_norm=random.random(), ratio=7.0 if name in bad else 0.1) for name in names
    )


def test_a_page_says_verdict_inputs_digests_depths_worst_modules_warnings_and_command() -> None:
    made = report(
        DepthResult("tensors", "run", checks=(Check("every tensor", False, "1 lost", ("lost.name",)),),
                    modules=network(3, ("model.layers.1.wk",)), seconds=1),
        DepthResult("layers", "refused", "mindspore not installed"),
        DepthResult("model", "left out", "not asked for"),
        warnings=("take care",), command="lorabridge verify a b --seed 3",
    )  # fmt: skip
    digests = {"SRC": [("adapter_model.safetensors", "ab" * 32)]}
    for text in (page(made, digests=digests, when="today"), markdown(made, digests=digests, when="today")):
        shown = text.replace("<wbr>", "")
        for said in (
            "Different", "adapter", "out.ckpt", "ab" * 32, "model.layers.1.wk", "lost.name", "take care",
            "mindspore not installed", "not asked for", "lorabridge verify a b --seed 3", "today",
        ):  # fmt: skip
            assert said in shown
        assert text.index("Worst modules") < text.index("What was compared")
    assert "Equal" in page(report(DepthResult("tensors", "run", modules=network(1))))


def test_a_page_stands_alone_without_scripts_or_network() -> None:
    text = page(report(DepthResult("tensors", "run", modules=network(32))))
    found = read(text)
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "a", "base", "use", "image"}
    assert not [
        key for _, attrs in found.tags for key in attrs if key.startswith("on") or key in ("src", "href", "style")
    ]
    assert "url(" not in text
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    policy = next(attrs for tag, attrs in found.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def everywhere(name: str) -> VerifyReport:
    """Return a report in which a name stands in every place that a file or a user fills."""
    rows = (row(name, False, origin=name, note=name), row(f"layers.0.{name}"), row(f"layers.1.{name}", None))
    ran = DepthResult("tensors", "run", proved=(name,), checks=(Check(name, False, name, (name,)),), modules=rows)
    refused = DepthResult("layers", "refused", name)
    return report(ran, refused, paths=(name, name), compared=(name,), warnings=(name,), command=name)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_and_never_become_markup(name: str) -> None:
    text = page(everywhere(name), digests={"SRC": [(name, "0")]}, versions={name: name}, when=name)
    harmless = page(everywhere("x"), digests={"SRC": [("x", "0")]}, versions={"x": "x"}, when="x")
    found, expected = read(text), read(harmless)
    tags = [tag for tag, _ in found.tags if tag != "wbr"]
    assert tags == [tag for tag, _ in expected.tags if tag != "wbr"]
    assert not set(text) & set("\u202e\x1b\u200b\ud800")
    text.encode("utf-8")
    if name.isprintable():
        assert name in "".join(found.text)
    said = markdown(everywhere(name), digests={"SRC": [(name, "0")]})
    assert not set(said) & set("\u202e\x1b\u200b\ud800")
    outside = re.sub(r"(`+)(?:(?!\1).)+?\1(?!`)", "", said.partition("## To do it again")[0])
    assert not re.search(r"(?<!\\)<(?!!-- lorabridge)", outside)
    assert "](http" not in outside.replace("\\]", "")


def test_markdown_spells_names_as_they_are() -> None:
    assert plain("a_b*c") == r"a\_b\*c"
    assert plain("- x") == r"\- x"
    assert plain("1. x") == "&#49;. x"
    assert plain("see https://x.y and (z): ok") == r"see https\://x.y and (z): ok"
    assert code("a`b") == "``a`b``"
    assert code("a|b") == r"`a\|b`"
    assert code("`a") == "`` `a ``"


def test_hundreds_of_modules_are_arranged_by_layer_and_name() -> None:
    (grid,) = svg.grids(network(40, ("model.layers.7.wo",)))
    assert grid.axis == "layer"
    assert grid.columns == tuple(str(i) for i in range(40))
    assert [name for name, _ in grid.lines] == ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    drawn = svg.strip(grid)
    assert drawn.count("<rect") == 280
    assert drawn.count('class="cell x"') == 1
    assert svg.bars(grid).count("<rect") == 280
    width = re.search(r'width="(\d+)"', drawn)
    assert width is not None
    assert int(width[1]) < 1100


def test_names_without_layers_and_too_many_kinds_are_drawn_in_their_order() -> None:
    (grid,) = svg.grids([row("classifier"), row("proj")])
    assert [name for name, _ in grid.lines] == ["classifier", "proj"]
    (grid,) = svg.grids([row(f"module_{i}") for i in range(100)])
    assert grid.axis == "module"
    assert [len(cells) for _, cells in grid.lines] == [40, 40, 20]
    (grid,) = svg.grids([row("twin"), row("twin")])
    assert sum(len(cells) for _, cells in grid.lines) == 2


def test_blocks_and_outputs_of_depth_model_have_strips_of_their_own() -> None:
    rows = [replace(row(f"model.layers.{i}"), kind="block") for i in range(3)]
    rows += [replace(row(f"logits of sequence {i}"), kind="logits") for i in range(6)]
    blocks, outputs = svg.grids(rows)
    assert (blocks.axis, len(blocks.columns)) == ("layer", 3)
    assert (outputs.axis, len(outputs.columns)) == ("sequence", 6)
    assert [name for name, _ in blocks.lines] == ["model.layers"]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (row("a", None), "n"), (row("a", False), "x"), (row("a", max_abs=0.0, ratio=0.0), "l0"),
        (row("a", ratio=1e-4), "l1"), (row("a", ratio=0.005), "l2"), (row("a", ratio=0.05), "l3"),
        (row("a", ratio=0.3), "l4"), (row("a", ratio=1.0), "l5"),
    ],
)  # fmt: skip
def test_cells_show_how_near_a_bound_is(given: ModuleRow, kind: str) -> None:
    assert svg.level(given) == kind


def test_nan_and_infinite_numbers_are_shown() -> None:
    rows = (
        row("a", False, max_abs=math.nan, ratio=math.inf, delta_norm=math.nan),
        row("b", delta_norm=math.inf),
        row("c"),
    )
    made = report(DepthResult("tensors", "run", modules=rows))
    text = page(made)
    read(text)
    assert "∞" in text
    assert "nan" in text
    assert 'class="bar odd"' in text
    assert "∞" in markdown(made)


def test_a_report_without_modules_is_a_page_too() -> None:
    made = report(DepthResult("tensors", "run", checks=(Check("bits", True),)))
    read(page(made))
    assert "## Depth tensors: equal" in markdown(made)


def files(tmp_path: Path) -> VerifyReport:
    import numpy as np
    from safetensors.numpy import save_file

    for name in ("one", "two"):
        save_file({"w": np.ones(3, np.float32)}, tmp_path / f"{name}.safetensors")
    paths = (str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors"))
    return report(DepthResult("tensors", "run", modules=network(2)), paths=paths)


def test_report_files_hold_digests_replace_reports_and_nothing_else(tmp_path: Path) -> None:
    import hashlib

    made = files(tmp_path)
    digest = hashlib.sha256((tmp_path / "one.safetensors").read_bytes()).hexdigest()
    for name in ("proof.html", "proof.md"):
        target = tmp_path / name
        report_file.write_report(made, target)
        assert digest in target.read_text("utf-8")
        report_file.write_report(replace(made, warnings=("second",)), target)
        assert "second" in target.read_text("utf-8")
    before = set(tmp_path.iterdir())
    mine = tmp_path / "README.md"
    mine.write_text("# mine\n")
    with pytest.raises(OutputError, match="not a report"):
        report_file.write_report(made, mine)
    assert mine.read_text() == "# mine\n"
    assert set(tmp_path.iterdir()) == before | {mine}


def test_paths_that_cannot_hold_a_report_are_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="HTML, Markdown or PNG"):
        report_file.check_path(tmp_path / "proof.pdf")
    with pytest.raises(OutputError, match="no such directory"):
        report_file.check_path(tmp_path / "none" / "proof.html")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(OutputError, match="not a report"):
        report_file.check_path(tmp_path / "folder.md")


def test_a_png_is_drawn_where_matplotlib_is_installed_and_refused_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorabridge.reports import png as report_png

    monkeypatch.setattr(report_png, "available", lambda: "matplotlib not installed")
    with pytest.raises(UsageError, match="needs matplotlib"):
        report_file.check_path(tmp_path / "proof.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    target = tmp_path / "proof.png"
    made = files(tmp_path)
    hostile = tuple(row(name) for name in HOSTILE)
    for one in (
        made,
        replace(made, depths=(DepthResult("tensors", "run", modules=hostile),)),
        replace(made, depths=()),
    ):
        report_file.write_report(one, target)
        assert target.read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_a_report_whatever_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lorabridge.commands._run import run

    example = Path(__file__).parents[2] / "examples" / "token-classifier"
    target, proof = tmp_path / "out.ckpt", tmp_path / "proof.html"
    assert run(["convert", str(example), str(target), "--family", "bert", "-q"]) == 0
    assert run(["verify", str(example), str(target), "--depth", "tensors", "--report", str(proof)]) == 0
    text = proof.read_text("utf-8")
    assert "✓ Equal" in text
    assert f"lorabridge verify {example} {target} --depth tensors</pre>" in text
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    assert run(["verify", str(example), str(target), "--depth", "tensors", "--report", str(proof)]) == 1
    assert "✗ Different" in proof.read_text("utf-8")
    capsys.readouterr()
    assert run(["verify", str(example), str(target), "--report", str(tmp_path / "proof.txt")]) == 2
    assert "let its name end in" in capsys.readouterr().err

"""What is refused, in which words, and that nothing is left behind; what a selection gives back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from dialects.peft_models import CASES, bert
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import LorabridgeError, OutputError, UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as Hugging Face saves it, and a peft adapter of it."""
    folder = tmp_path_factory.mktemp("made")
    CASES["bert"].adapted().save_pretrained(folder / "peft")
    bert().save_pretrained(folder / "hf")
    return folder


def alpha(value: float) -> Facts:
    return Facts((Fact("*", "alpha", value),))


REFUSED: dict[str, tuple[str, Callable[[], ConvertOptions], int, str]] = {
    "a model as an adapter": ("hf", lambda: ConvertOptions(target_dialect="mindpet", family="bert"), 4, "no LoRA"),
    "an adapter as a model": ("peft", lambda: ConvertOptions(target_dialect="ms"), 4, "carry LoRA factors"),
    "no such layers": ("peft", lambda: ConvertOptions(layers="7-9"), 4, "no module is in the layers"),
    "nothing selected": ("peft", lambda: ConvertOptions(exclude=("*",)), 4, "nothing"),
    "another family": ("peft", lambda: ConvertOptions(family="gpt2"), 4, "do not fit"),
    "an alpha that is hardly one": (
        "peft", lambda: ConvertOptions(target_dialect="mindpet", facts=alpha(1e-320)), 4, "cannot share",
    ),
    "no tables": ("peft", lambda: ConvertOptions(mappings=Path("nowhere"), family="bert"), 3, "not a directory"),
    "a layout without a table": ("peft", lambda: ConvertOptions(layout={"a": "b"}), 2, "no layouts"),
    "half of a model": ("hf", lambda: ConvertOptions(family="gpt2"), 4, "does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_in_three_parts_and_without_a_trace(name: str, made: Path, tmp_path: Path) -> None:
    source, options, code, words = REFUSED[name]
    with pytest.raises(LorabridgeError, match=words) as raised:
        convert(made / source, tmp_path / "out.ckpt", options())
    assert raised.value.exit_code == code
    assert raised.value.hint
    assert not list(tmp_path.iterdir())


def test_zero_bytes_in_paths(made: Path, tmp_path: Path) -> None:
    for source, target in ((made / "peft", f"{tmp_path}/a\0b.ckpt"), (f"{tmp_path}/a\0b", tmp_path / "out.ckpt")):
        with pytest.raises(LorabridgeError, match="zero byte"):
            convert(source, target)


@pytest.mark.parametrize(
    "options",
    [ConvertOptions(on_overflow="clip", dtype="fp16"), ConvertOptions(workers=-1), ConvertOptions(include="*.query")],
    ids=["overflow", "workers", "include"],
)
def test_options_that_only_python_can_give(options: ConvertOptions, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        convert(made / "peft", tmp_path / "out.ckpt", options)
    assert raised.value.hint
    assert not list(tmp_path.iterdir())


def test_the_output_is_named_where_it_exists(made: Path, tmp_path: Path) -> None:
    convert(made / "peft", tmp_path / "out.ckpt")
    with pytest.raises(OutputError) as raised:
        convert(made / "peft", tmp_path / "out.ckpt")
    assert raised.value.where == (str(tmp_path / "out.ckpt"),)
    (tmp_path / "out.ckpt").unlink()
    with pytest.raises(OutputError, match="manifest"):
        convert(made / "peft", tmp_path / "out.ckpt")


SELECTIONS = {
    "modules": ConvertOptions(include=("*.query",)),
    "without the head": ConvertOptions(exclude=("classifier*",)),
    "a layer": ConvertOptions(layers="1"),
}


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_peft_loads_what_comes_back_from_a_selection(name: str, made: Path, tmp_path: Path) -> None:
    """A config that names a head which the file lacks would not load."""
    from peft import PeftModel

    convert(made / "peft", tmp_path / "out.ckpt", SELECTIONS[name])
    back = convert(tmp_path / "out.ckpt", tmp_path / "back")
    assert "restored bit for bit" in back.notes[0]
    (warning,) = back.warnings
    assert "not restored" in warning
    assert len(warning) < 500
    model = PeftModel.from_pretrained(CASES["bert"].base(), tmp_path / "back")
    one, two = (load_file(d / "adapter_model.safetensors") for d in (made / "peft", tmp_path / "back"))
    assert set(two) < set(one)
    assert all(one[key].equal(two[key]) for key in two)
    factors = {key for key in model.state_dict() if "lora_A" in key}
    assert len(factors) == sum("lora_A" in key for key in two)


def test_padding_is_said(made: Path, tmp_path: Path) -> None:
    report = convert(made / "peft", tmp_path / "out.ckpt", ConvertOptions(facts=Facts((Fact("*", "rank", 6),))))
    assert {module.rank for module in report.modules} == {6}
    assert sum("rank 4 padded with zeros to 6" in note for note in report.notes) == 4


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    from lorabridge.errors import InputError, UsageError

    example = Path(__file__).parents[2] / "examples" / "token-classifier"
    with pytest.raises(UsageError, match="on-overflow"):
        convert(example, tmp_path / "out.ckpt", ConvertOptions(on_overflow="inf"))
    with pytest.raises(InputError, match="mappings"):
        convert(example, tmp_path / "out.ckpt", ConvertOptions(mappings=tmp_path / "nowhere"))

"""The laws of merging: the square with conversion, the same bits for any workers and blocks, and nothing in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorabridge import manifest
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.arithmetic import addition
from lorabridge.conversion import tasks
from lorabridge.errors import LorabridgeError, MappingError, UsageError
from lorabridge.formats import open_source

Tensors = dict[str, np.ndarray]
HIDDEN = 24


def gpt2(random: np.random.Generator, dtype: type = np.float32) -> tuple[Tensors, dict[str, object]]:
    shapes = {"wte.weight": (40, HIDDEN), "wpe.weight": (16, HIDDEN), "ln_f.weight": (HIDDEN,), "ln_f.bias": (HIDDEN,)}
    for i in range(2):
        shapes |= {f"h.{i}.{n}.{t}": (HIDDEN,) for n in ("ln_1", "ln_2") for t in ("weight", "bias")}
        for name, inner, out in (
            ("attn.c_attn", 1, 3),
            ("attn.c_proj", 1, 1),
            ("mlp.c_fc", 1, 4),
            ("mlp.c_proj", 4, 1),
        ):
            shapes[f"h.{i}.{name}.weight"] = (HIDDEN * inner, HIDDEN * out)
            shapes[f"h.{i}.{name}.bias"] = (HIDDEN * out,)
    config = {"model_type": "gpt2", "n_embd": HIDDEN, "n_layer": 2, "vocab_size": 40, "n_positions": 16}
    return {f"transformer.{n}": random.standard_normal(s).astype(dtype) for n, s in shapes.items()}, config


def bert(random: np.random.Generator, dtype: type = np.float32) -> tuple[Tensors, dict[str, object]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                        vocab_size=40, max_position_embeddings=16)  # fmt: skip
    state = BertModel(config).state_dict()
    tensors = {f"bert.{n}": random.standard_normal(v.shape).astype(dtype) for n, v in state.items()}
    return tensors, config.to_dict()


def lora(paths: dict[str, tuple[int, int]], random: np.random.Generator, **config: object) -> tuple[Tensors, object]:
    """Return a peft file's tensors and config for modules of (out, in) features."""
    tensors: Tensors = {}
    for path, (out, inner) in paths.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = random.standard_normal((4, inner)).astype(np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = random.standard_normal((out, 4)).astype(np.float32)
    targets = sorted({path.rpartition(".")[2] for path in paths})
    return tensors, {"peft_type": "LORA", "r": 4, "lora_alpha": 7, "target_modules": targets, **config}


def write(folder: Path, base: tuple[Tensors, object], adapter: tuple[Tensors, object]) -> tuple[Path, Path]:
    for name, (tensors, config), file, stem in (
        ("base", base, "config.json", "model"), ("adapter", adapter, "adapter_config.json", "adapter_model"),
    ):  # fmt: skip
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
        (folder / name / file).write_text(json.dumps(config))
    return folder / "base", folder / "adapter"


def gpt2_case(random: np.random.Generator, dtype: type = np.float32) -> tuple[tuple[Tensors, object], ...]:
    paths = {}
    for i in range(2):
        paths[f"transformer.h.{i}.attn.c_attn"] = (3 * HIDDEN, HIDDEN)
        paths[f"transformer.h.{i}.attn.c_proj"] = (HIDDEN, HIDDEN)
        paths[f"transformer.h.{i}.mlp.c_proj"] = (HIDDEN, 4 * HIDDEN)
    return gpt2(random, dtype), lora(paths, random, fan_in_fan_out=True)


def bert_case(random: np.random.Generator, dtype: type = np.float32) -> tuple[tuple[Tensors, object], ...]:
    stem = "bert.encoder.layer.{}.attention.self.{}"
    paths = {stem.format(i, name): (HIDDEN, HIDDEN) for i in range(2) for name in ("query", "key", "value")}
    return bert(random, dtype), lora(paths, random)


CASES = {"gpt2": gpt2_case, "bert": bert_case}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("family", CASES)
def test_converting_the_merged_model_equals_merging_the_converted_ones(
    tmp_path: Path, family: str, dtype: type
) -> None:
    random = np.random.default_rng(3)
    base, adapter = write(tmp_path, *CASES[family](random, dtype))
    there = ConvertOptions(family=family)
    config = base / "config.json"
    merge(base, [adapter], tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "way1.ckpt", there)
    convert(base, tmp_path / "base.ckpt", there)
    convert(adapter, tmp_path / "adapter.ckpt", ConvertOptions(family=family, config=config))
    merge(tmp_path / "base.ckpt", [tmp_path / "adapter.ckpt"], tmp_path / "way2.ckpt")
    options = MergeOptions(family=family)
    merge(base, [adapter], tmp_path / "way3.ckpt", options)
    merge(base, [tmp_path / "adapter.ckpt"], tmp_path / "way4.ckpt", options)
    ways = [tmp_path / f"way{i}.ckpt" for i in (1, 2, 3, 4)]
    assert all(tensors(path) == tensors(ways[0]) for path in ways)
    merge(tmp_path / "base.ckpt", [adapter], tmp_path / "back.safetensors", replace_config(options, config))
    assert same(load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "merged" / "model.safetensors"))


def tensors(path: Path) -> dict[str, tuple[object, bytes]]:
    """Return every tensor's description and bytes; the metadata says which way a file came."""
    source = open_source(path)
    found = {name: (spec, source.read(name).tobytes()) for name, spec in source.specs.items()}
    source.close()
    return found


def replace_config(options: MergeOptions, config: Path) -> MergeOptions:
    return MergeOptions(family=options.family, config=config, target_dialect="hf")


def same(left: Tensors, right: Tensors) -> bool:
    return set(left) == set(right) and all(left[name].tobytes() == right[name].tobytes() for name in left)


@pytest.mark.parametrize("family", CASES)
def test_the_bits_do_not_depend_on_workers_or_blocks(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = write(tmp_path, *CASES[family](np.random.default_rng(5), np.float16))
    found = set()
    for i, (workers, block, most) in enumerate(((1, 1 << 17, 4 << 20), (2, 7, 100), (5, 64, 4096), (5, 1, 1))):
        monkeypatch.setattr(addition, "BLOCK", block)
        monkeypatch.setattr(tasks, "MERGED", most)
        merge(base, [adapter], tmp_path / f"{i}.safetensors", MergeOptions(workers=workers))
        found.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(found) == 1


def small(tmp_path: Path, dtype: type = np.float32, **config: object) -> tuple[Path, Path]:
    random = np.random.default_rng(0)
    base = {"a.q.weight": random.standard_normal((8, 6)).astype(dtype), "a.bias": np.zeros(3, dtype)}
    return write(tmp_path, (base, {}), lora({"a.q": (8, 6)}, random, **config))


Damage = Callable[[Tensors, Tensors], None]


def renamed(base: Tensors, adapter: Tensors) -> None:
    base["b.q.weight"] = base.pop("a.q.weight")


def reshaped(base: Tensors, adapter: Tensors) -> None:
    base["a.q.weight"] = base["a.q.weight"][:5]


def broken(base: Tensors, adapter: Tensors) -> None:
    adapter["base_model.model.a.q.lora_A.weight"][0, 0] = np.inf


def overflowing(base: Tensors, adapter: Tensors) -> None:
    adapter["base_model.model.a.q.lora_A.weight"] *= np.float32(1e38)


def whole_numbers(base: Tensors, adapter: Tensors) -> None:
    base["a.q.weight"] = base["a.q.weight"].astype(np.int8)


def square(base: Tensors, adapter: Tensors) -> None:
    base["a.q.weight"] = np.zeros((6, 8), np.float32)  # [in, out], which the config denies


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (renamed, "no such module"), (reshaped, "the factors make"), (broken, "not finite"),
        (overflowing, "not finite"), (whole_numbers, "nothing can be added"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, damage: Damage, says: str) -> None:
    base, adapter = small(tmp_path)
    weights, factors = (load_file(p) for p in (base / "model.safetensors", adapter / "adapter_model.safetensors"))
    damage(weights, factors)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MappingError) as error:
        merge(base, [adapter], tmp_path / "merged")
    assert says in error.value.text()
    assert not (tmp_path / "merged").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_merged_model_is_not_merged_again(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    for target in ("merged", "merged.safetensors", "merged.bin"):
        merge(base, [adapter], tmp_path / target)
        with pytest.raises(MappingError, match="merged model already"):
            merge(tmp_path / target, [adapter], tmp_path / "twice")
    with pytest.raises(MappingError, match="holds this adapter already"):
        merge(tmp_path / "merged", [adapter], tmp_path / "twice", MergeOptions(onto_merged=True))
    _, other = small(tmp_path / "other", lora_alpha=3)
    merge(tmp_path / "merged", [other], tmp_path / "twice", MergeOptions(onto_merged=True))
    with pytest.raises(MappingError, match="merged model already") as error:
        merge(tmp_path / "twice", [other], tmp_path / "thrice")
    assert "holds adapter, adapter" in error.value.text()


@pytest.mark.parametrize("target", ["merged.safetensors", "merged.bin", "merged.ckpt"])
def test_a_merged_file_that_was_carried_away_alone_is_known(tmp_path: Path, target: str) -> None:
    base, adapter = small(tmp_path)
    merge(base, [adapter], tmp_path / target, MergeOptions(family="identity"))
    (tmp_path / "away").mkdir()
    alone = (tmp_path / target).rename(tmp_path / "away" / target)
    for suffix in (".safetensors", ".bin", ".ckpt"):
        other = tmp_path / "away" / f"converted{suffix}"
        convert(alone, other, ConvertOptions(family="identity"))
        manifest.sidecar(other).unlink(missing_ok=True)
        for file in (alone, other):
            with pytest.raises(MappingError, match="merged model already"):
                merge(file, [adapter], tmp_path / "twice.safetensors", MergeOptions(family="identity"))


def test_weights_that_are_not_finite_are_kept_and_told(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, np.float16)
    weights = load_file(base / "model.safetensors")
    bits = weights["a.q.weight"].view(np.uint16)
    bits[0, :3] = 0x7C00, 0xFC00, 0x7D01
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    report = merge(base, [adapter], tmp_path / "merged.safetensors")
    assert load_file(tmp_path / "merged.safetensors")["a.q.weight"].view(np.uint16)[0, :3].tolist() == [
        0x7C00,
        0xFC00,
        0x7D01,
    ]
    assert any("3 weights were not finite" in warning for warning in report.warnings)


def test_companions_are_carried_and_code_is_not(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    for name in ("tokenizer.json", "generation_config.json", "modeling_own.py", "notes.txt"):
        (base / name).write_text("{}")
    (adapter / "chat_template.jinja").write_text("x")
    report = merge(base, [adapter], tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not names & {"modeling_own.py", "notes.txt", "adapter_config.json"}
    assert set(report.not_carried) == {"modeling_own.py", "notes.txt"}


def test_the_report_counts_what_rounding_lost(tmp_path: Path) -> None:
    base, adapter = small(tmp_path, np.float16, lora_alpha=1e-3)
    report = merge(base, [adapter], tmp_path / "merged")
    old, new = (load_file(p / "model.safetensors")["a.q.weight"] for p in (base, tmp_path / "merged"))
    (row,) = report.rows
    assert row.changed == np.mean(old != new)
    assert row.vanished == np.mean(old == new) > 0.3
    assert 0 < row.error <= 2.0**-11 * np.abs(new).max()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0)])
def test_weights_must_be_one_per_adapter(tmp_path: Path, weights: tuple[float, ...]) -> None:
    base, adapter = small(tmp_path)
    with pytest.raises(UsageError, match=r"weights? for 2 adapters"):
        merge(base, [adapter, adapter], tmp_path / "merged", MergeOptions(weights=weights))


def test_base_and_adapter_in_the_wrong_order_are_told_apart(tmp_path: Path) -> None:
    base, adapter = small(tmp_path)
    with pytest.raises(LorabridgeError) as error:
        merge(adapter, [base], tmp_path / "merged")
    assert "the base holds an adapter" in error.value.text()

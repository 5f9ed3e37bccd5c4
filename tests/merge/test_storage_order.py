"""Square weights of a family that stores some [in, out] and some [out, in]: MindFormers' GPT-2."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.extract import ExtractOptions, extract
from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.actions.verify import verify
from lorabridge.actions.verify_inputs import VerifyOptions
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

H = 8
TURNED = {"attention.projection": (H, H), "output.mapping": (H, 4 * H), "output.projection": (4 * H, H)}
"""Stored [in, out] (MindFormers 1.3.2, transpose_b=False)."""
PLAIN = {f"attention.dense{n}": (H, H) for n in (1, 2, 3)}
"""Stored [out, in]."""
ALPHA = Facts((Fact("*", "alpha", 6),))


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def model(rng: np.random.Generator) -> dict[str, np.ndarray]:
    made = {"backbone.embedding.word_embedding.embedding_table": random(rng, 12, H),
            "backbone.embedding.position_embedding.embedding_table": random(rng, 6, H),
            "backbone.layernorm.gamma": random(rng, H), "backbone.layernorm.beta": random(rng, H)}  # fmt: skip
    block = "backbone.blocks.0"
    made |= {f"{block}.layernorm{n}.{p}": random(rng, H) for n in (1, 2) for p in ("gamma", "beta")}
    for name, shape in (TURNED | PLAIN).items():
        out = shape[1] if name in TURNED else shape[0]
        made |= {f"{block}.{name}.weight": random(rng, *shape), f"{block}.{name}.bias": random(rng, out)}
    return made


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A base, an adapter on every layer, and what merging must give."""
    rng = np.random.default_rng(3)
    base, factors = model(rng), {}
    wanted = dict(base)
    for name, shape in (TURNED | PLAIN).items():
        inner, out = shape if name in TURNED else shape[::-1]
        path = f"backbone.blocks.0.{name}"
        a, b = random(rng, 3, inner), random(rng, out, 3)
        factors |= {f"{path}.mindpet_delta_lora_a": a, f"{path}.mindpet_delta_lora_b": b}
        delta = 2.0 * b.astype(np.float64) @ a
        wanted[f"{path}.weight"] = base[f"{path}.weight"] + (delta.T if name in TURNED else delta)
    paths = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    for path, tensors in zip(paths, (base, factors), strict=True):
        save_file(tensors, path, metadata={"format": "ms"})
    return *paths, wanted


@pytest.mark.parametrize("family", [None, "gpt2"])
def test_each_square_weight_is_stored_as_its_table_says(
    files: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path, family: str | None
) -> None:
    base, adapter, wanted = files
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "gpt2"}')
    out = tmp_path / "merged.safetensors"
    merge(base, adapter, out, MergeOptions(family=family, facts=ALPHA, config=config))
    merged = load_file(out)
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-5, err_msg=name)
    report = verify(out, adapter, VerifyOptions(base=base, facts=ALPHA, depths=("tensors",)))
    assert report.ok


def test_a_transposed_merge_is_not_verified(files: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    base, adapter, wanted = files
    name = "backbone.blocks.0.attention.dense2.weight"
    before = load_file(base)[name]
    wrong = {key: value.astype(np.float32) for key, value in wanted.items()}
    wrong[name] = before + (wanted[name] - before).T.astype(np.float32)
    out = tmp_path / "wrong.safetensors"
    save_file(wrong, out, metadata={"format": "ms"})
    report = verify(out, adapter, VerifyOptions(base=base, family="gpt2", facts=ALPHA, depths=("tensors",)))
    assert not report.ok


def test_tables_that_disagree_are_asked_about(tmp_path: Path) -> None:
    """A name that two families have, with other storage: nothing is merged by majority."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "tables"
    folder.mkdir()
    for family, order in (("one", "in out"), ("two", "out in")):
        (folder / f"{family}.toml").write_text(
            f'schema = 1\nfamily = "{family}"\nmatch = {{ model_type = ["{family}"] }}\n[sizes]\nhidden = "h"\n'
            f'[[linear]]\nhf = "a"\nms = "zzz.layer"\nout = "hidden"\nin = "hidden"\nms_order = "{order}"\n'
            '[[linear]]\nhf = "b"\nms = "zzz.wide"\nout = "?"\nin = "hidden"\n'
        )
    save_file({"zzz.layer.weight": random(rng, 4, 4), "zzz.wide.weight": random(rng, 6, 4)},
              tmp_path / "base.safetensors", metadata={"format": "ms"})  # fmt: skip
    save_file({f"zzz.layer.mindpet_delta_lora_{x}": random(rng, *shape) for x, shape in (("a", (2, 4)), ("b", (4, 2)))}
              | {f"zzz.wide.mindpet_delta_lora_{x}": random(rng, *s) for x, s in (("a", (2, 4)), ("b", (6, 2)))},
              tmp_path / "adapter.safetensors", metadata={"format": "ms"})  # fmt: skip
    given = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "out.safetensors"
    with pytest.raises(MappingError, match=r"\(one, two\) store square weights differently"):
        merge(*given, MergeOptions(facts=ALPHA, mappings=folder))
    merge(*given, MergeOptions(facts=ALPHA, mappings=folder, family="one"))
    base, adapter, merged = (load_file(path) for path in given)
    a, b = (adapter[f"zzz.layer.mindpet_delta_lora_{x}"] for x in "ab")
    np.testing.assert_allclose(merged["zzz.layer.weight"], base["zzz.layer.weight"] + (3.0 * b @ a).T, atol=1e-5)


def test_extracting_knows_the_storage_where_several_tables_fit(
    files: tuple[Path, Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """GPT-2's names are WizardCoder's as well, and no config says which: both store the projection [in, out]."""
    base, _, wanted = files
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "found.ckpt"
    save_file({key: value.astype(np.float32) for key, value in wanted.items()}, tuned, metadata={"format": "ms"})
    extract(base, tuned, out, ExtractOptions(rank=3))
    back = tmp_path / "peft"
    convert(out, back, ConvertOptions(target_dialect="peft", family="gpt2"))
    factors = load_file(back / "adapter_model.safetensors")
    path = "backbone.blocks.0.attention.projection.weight"
    a, b = (factors[f"base_model.model.transformer.h.0.attn.c_proj.lora_{x}.weight"] for x in "AB")
    change = wanted[path] - load_file(base)[path]
    np.testing.assert_allclose((b @ a).T, change, atol=1e-4)

"""The law of the tool: there and back is the identity on bytes, for any bits, dialect and container."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.errors import MappingError

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
TARGETS = [
    ("loralib-ms", "out.ckpt"),
    ("loralib-ms", "out.safetensors"),
    ("mindpet", "out.ckpt"),
    ("loralib", "out.pt"),
]


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Return a peft adapter of linear modules: any bits (NaN payloads and -0.0 included), ranks and alphas."""
    count = draw(st.integers(1, 4))
    rank = draw(st.integers(1, 5))
    ranks = [draw(st.sampled_from([rank, rank, draw(st.integers(1, 6))])) for _ in range(count)]
    alphas = [draw(st.sampled_from([8, 8, 1, 3, 16, 7.5])) for _ in range(count)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    finite = draw(st.booleans())
    tensors = {}
    for i, r in enumerate(ranks):
        dtype = np.dtype(DTYPES[draw(st.sampled_from(list(DTYPES)))])
        for side, shape in (("A", (r, draw(st.integers(1, 5)))), ("B", (draw(st.integers(1, 5)), r))):
            if finite:
                value = rng.standard_normal(shape).astype(dtype)
            else:
                value = np.frombuffer(rng.bytes(shape[0] * shape[1] * dtype.itemsize), dtype).reshape(shape)
            tensors[f"base_model.model.h.{i}.q.lora_{side}.weight"] = value
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q"], "bias": "none",
        "use_rslora": draw(st.booleans()),
        "rank_pattern": {f"h.{i}.q": r for i, r in enumerate(ranks) if r != rank},
        "alpha_pattern": {f"h.{i}.q": a for i, a in enumerate(alphas) if a != 8},
    }  # fmt: skip
    return tensors, config


def bits(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(v.dtype), v.shape, v.tobytes()) for name, v in load_file(path).items()}


@settings(max_examples=120, deadline=None)
@given(adapters(), st.sampled_from(TARGETS), st.integers(1, 3))
def test_there_and_back(
    adapter: tuple[dict[str, np.ndarray], dict[str, object]], goal: tuple[str, str], workers: int
) -> None:
    tensors, config = adapter
    dialect, file = goal
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        save_file(tensors, folder / "in" / "adapter_model.safetensors", {"format": "pt"})
        (folder / "in" / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        try:
            convert(folder / "in", folder / file, ConvertOptions(target_dialect=dialect, workers=workers))
        except MappingError as refused:
            # a factor too large to be scaled, or no alpha that gives the scaling exactly
            if not re.search("not fit|exactly|no exact", str(refused)):
                raise
            assert [p.name for p in folder.iterdir()] == ["in"]
            return
        convert(folder / file, folder / "back", ConvertOptions(workers=workers))
        one, two = (folder / d / "adapter_model.safetensors" for d in ("in", "back"))
        assert bits(one) == bits(two)
        one, two = (folder / d / "adapter_config.json" for d in ("in", "back"))
        assert one.read_text() == two.read_text()

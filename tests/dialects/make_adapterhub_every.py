"""Write adapterhub_every.json: the names, shapes and configs that every named method of AdapterHub saves.

    python make_adapterhub_every.py        needs adapters 1.3.0 beside torch

For every key of ADAPTER_CONFIG_MAP, an adapter of that config is added to a BERT of one layer and saved.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import adapters
import torch
from adapters.configuration import ADAPTER_CONFIG_MAP
from transformers import BertConfig, BertModel

TINY = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def main() -> None:
    """Write the file."""
    out: dict[str, object] = {"adapters": adapters.__version__}
    for name in ADAPTER_CONFIG_MAP:
        model = BertModel(BertConfig(**TINY, max_position_embeddings=8))
        adapters.init(model)
        model.add_adapter("a", config=name)
        with tempfile.TemporaryDirectory() as folder:
            model.save_adapter(folder, "a")
            tensors = torch.load(Path(folder) / "pytorch_adapter.bin", weights_only=True)
            config = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
        out[name] = {"config": config, "tensors": {key: list(value.shape) for key, value in tensors.items()}}
    text = json.dumps(out, sort_keys=True, indent=0)
    (Path(__file__).parent / "adapterhub_every.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

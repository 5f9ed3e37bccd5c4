"""Run a model with a peft adapter through MindNLP; started by test_witness.py in an environment of its own.

There `torch` is MindNLP's mindtorch: transformers and peft are Hugging Face's own, the kernels MindSpore's.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import mindnlp  # noqa: F401  # puts mindtorch in torch's place, so it comes first
import mindspore
import numpy as np
import peft
import torch
import transformers


def main(folder: Path, architecture: str) -> None:
    adapter = folder / "back"
    path = adapter / "adapter_config.json"
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    config = {key: value for key, value in json.loads(path.read_text()).items() if key in known}
    path.write_text(json.dumps(config))  # peft 0.17 does not know every field of later ones
    given = np.load(folder / "tokens.npz")
    module = getattr(transformers, architecture).from_pretrained(str(folder / "base"), attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(module.eval(), str(adapter)).eval().get_base_model()
    with torch.no_grad():
        logits = adapted(torch.tensor(given["ids"]), attention_mask=torch.tensor(given["mask"])).logits.numpy()
    state = mindspore.load_checkpoint(str(folder / "out.ckpt"))
    np.savez(
        folder / "witness.npz", **{f"ckpt:{name}": value.asnumpy() for name, value in state.items()}, logits=logits
    )
    print(json.dumps({"torch": torch.__file__, "mindspore": mindspore.__version__, "peft": peft.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""Let msbnb write factors: its 8-bit layer with LoRA, of MindNLP's master at 7dd3e355d (2026-03), on MindSpore 2.10.0.

python make_msbnb.py FOLDER      FOLDER holds the package msbnb; writes msbnb_files/
"""

from __future__ import annotations

import sys
from pathlib import Path

import mindspore
import numpy as np

HERE = Path(__file__).parent / "msbnb_files"


def main() -> None:
    """Write a checkpoint of two adapted layers, an input of each and what its LoRA adds for it."""
    from msbnb.lora import Linear8bitWithLoRA

    class Layers(mindspore.nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = (Linear8bitWithLoRA(inner, 8, r=3, lora_alpha=5) for inner in (12, 8))

    rng = np.random.default_rng(6)
    cells = Layers()
    own = [parameter for parameter in cells.get_parameters() if ".lora." in parameter.name]
    for parameter in own:
        parameter.set_data(mindspore.Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    HERE.mkdir(exist_ok=True)
    mindspore.save_checkpoint(own, str(HERE / "lora.ckpt"))
    run = {}
    for name, cell in cells.name_cells().items():
        x = rng.standard_normal((4, cell.lora.in_features)).astype(np.float32)
        run |= {f"x.{name}": x, f"y.{name}": cell.lora(mindspore.Tensor(x)).asnumpy()}
    np.savez(HERE / "run.npz", **run)
    print([parameter.name for parameter in cells.get_parameters()])


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    main()

"""Write mindone_diffusers.json: digests of the names and shapes of the networks that mindone.diffusers builds.

``python make_mindone_diffusers.py``, with mindone 0.5.0, mindspore 2.10.0 and numpy 1.26.4 on the CPU, at their real
sizes and without values. The tests compare them with those of diffusers in diffusion_names.json.gz.
"""

from __future__ import annotations

import json
from pathlib import Path

from make_diffusion_names import CONFIGS, TRANSFORMERS, VAE
from make_mindone_lists import digest
from make_mindone_more_names import stand_in_more
from make_mindone_names import stand_in

NETWORKS = {
    **{family: ("UNet2DConditionModel", config) for family, config in CONFIGS.items()},
    **{family: case for family, case in TRANSFORMERS.items() if case[0].startswith(("Flux", "SD3"))},
    "sd_vae": ("AutoencoderKL", VAE),
}


def main() -> None:
    """Write the file; print how many parameters each network has."""
    import mindone.diffusers
    from mindspore.nn.utils import no_init_parameters

    out: dict[str, object] = {"mindone": "0.5.0", "mindspore": "2.10.0"}
    for family, (kind, config) in NETWORKS.items():
        with no_init_parameters():
            network = getattr(mindone.diffusers, kind)(**config)
        shapes = {name: parameter.shape for name, parameter in network.parameters_and_names()}
        print(f"{family}: {len(shapes)} parameters")
        out[family] = digest(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    (Path(__file__).parent / "mindone_diffusers.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    stand_in()
    stand_in_more()
    main()

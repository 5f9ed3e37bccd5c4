"""Write mindone_lists.json: digests of the lists of names with which MindOne converts Stable Diffusion.

    python make_mindone_lists.py FOLDER        FOLDER: mindone/tools/sd_torch_to_mindspore of mindone 0.2.0's wheel

The wheel has, for 1.x and 2.x, the names and shapes of PyTorch's single file and of MindOne's checkpoint in one order
(but for 1.x's text encoder, whose q, k and v are one parameter here). Kept of each component are how many names there
are, and the SHA-256 of the lines ``name shape`` of either and of the lines ``name name``, sorted.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

PARTS = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model."}


def digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def listed(path: Path, prefix: str) -> dict[str, str]:
    """Return names under a prefix with their shapes, as ``2x3``."""
    rows = (line.strip().split("#") for line in path.read_text().splitlines())
    return {row[0]: "x".join(re.findall(r"\d+", row[1])) for row in rows if row[0].startswith(prefix)}


def main() -> None:
    """Write the file."""
    folder = Path(sys.argv[1])
    out: dict[str, object] = {"release": "mindone 0.2.0"}
    for version in ("v1", "v2"):
        for part, prefix in PARTS.items():
            ours, theirs = (listed(folder / f"{kind}_{version}.txt", prefix) for kind in ("mindspore", "torch"))
            row = {
                "count": len(ours),
                "mindone": digest(f"{n} {s}" for n, s in ours.items()),
                "original": digest(f"{n} {s}" for n, s in theirs.items()),
            }
            if len(ours) == len(theirs):
                row["pairs"] = digest(f"{a} {b}" for a, b in zip(theirs, ours, strict=True))
            out[f"{part}_{version}"] = row
    (Path(__file__).parent / "mindone_lists.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()

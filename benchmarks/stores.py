"""Measure `lorabridge convert` from a store into a store against fetching, converting and sending by hand.

    python benchmarks/stores.py ENDPOINT KEY SECRET [--dir DIR] [--times 2] [--gb 1]

ENDPOINT: of a server that speaks S3 and serves ranges from disk (moto's copies the whole object for every range); on
loopback requests and copies are measured, not a network. It needs a bucket ``bench``. The copy fetches the object to
disk and sends it again, with s3fs; by hand is that with a conversion on disk in between. Every job is a whole process.
Needs 4 times --gb of disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import interleaved, table

BUCKET = "bench"
MAKE = """
import sys, numpy as np
from safetensors.numpy import save_file
import s3fs
path, gb = sys.argv[1], float(sys.argv[2])
noise = np.random.default_rng(0).integers(0, 2**16, 1 << 24, dtype=np.uint16).view(np.float16)
count = round(gb * 1e9 / noise.nbytes)
save_file({f"layers.{i}.weight": noise.reshape(4096, 4096) for i in range(count)}, path, metadata={"format": "pt"})
files = s3fs.S3FileSystem()
files.put_file(path, "bench/in.safetensors")
"""
COPY = """
import sys, s3fs
files = s3fs.S3FileSystem()
files.get_file("bench/in.safetensors", sys.argv[1])
files.put_file(sys.argv[1], "bench/copy.safetensors")
"""
FETCH = 'import sys, s3fs; s3fs.S3FileSystem().get_file("bench/in.safetensors", sys.argv[1])'
SEND = 'import sys, s3fs; s3fs.S3FileSystem().put_file(sys.argv[1], "bench/by_hand.ckpt")'
BY_HAND = (
    '"$0" -c "$1" "$4.in.safetensors" && "$0" -m lorabridge convert "$4.in.safetensors" "$4" $3 && "$0" -c "$2" "$4"'
)
OPTIONS = ["--family", "identity", "--to", "ms", "--quiet", "--overwrite"]


def main() -> None:
    """Start the server, make the data, run the jobs, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("endpoint", "key", "secret"):
        parser.add_argument(name)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--gb", type=float, default=1.0)
    args = parser.parse_args()
    os.environ |= {
        "FSSPEC_S3_ENDPOINT_URL": args.endpoint, "FSSPEC_S3_KEY": args.key, "FSSPEC_S3_SECRET": args.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        work, python = Path(name), sys.executable
        os.environ["TMPDIR"] = name
        model, out = work / "model.safetensors", work / "out.ckpt"
        subprocess.run([python, "-c", MAKE, str(model), str(args.gb)], check=True)
        nbytes = model.stat().st_size
        model.unlink()
        ours = ["convert", f"s3://{BUCKET}/in.safetensors", f"s3://{BUCKET}/out.ckpt", *OPTIONS]
        jobs = {
            "copy + fsync": lambda: [python, "-c", COPY, str(out)],
            "lorabridge": lambda: [python, "-m", "lorabridge", *ours],
            "fetch, convert, send": lambda: ["sh", "-c", BY_HAND, python, FETCH, SEND, " ".join(OPTIONS), str(out)],
        }
        runs = interleaved(jobs, out, args.times)
        print(table("From a store into a store; the copy fetches and sends", runs, nbytes), flush=True)


if __name__ == "__main__":
    main()

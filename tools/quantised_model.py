"""Makes a small quantised checkpoint, from a random model or from a checkpoint in bfloat16, and prints its directory.

The kinds are ModelSlim's (w8a8: activations quantised statically, and those of experts per token; w8a8-dynamic: per
token; w4a8: experts in 4 bits, the rest as w8a8-dynamic), and W8A8 in compressed-tensors' format.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from support.quantised.kinds import PLANS, make_quantised
from support.vllm import checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write it; what is there stays as it is")
    parser.add_argument("--kind", choices=PLANS, default="modelslim-w8a8-dynamic")
    parser.add_argument("--source", type=Path, help="the checkpoint to quantise; default: a small random model")
    parser.add_argument("--experts", action="store_true", help="the random model is one of experts")
    parser.add_argument("--older", action="store_true", help="ModelSlim's format before version 1.0.0")
    parser.add_argument("--float", action="append", default=[], metavar="PART", help="leave out layers named like this")
    options = parser.parse_args()
    if options.source is None:
        with tempfile.TemporaryDirectory() as scratch:
            make = checkpoints.mixture_of_experts if options.experts else checkpoints.dense_with_words
            _make(options, Path(make(Path(scratch))))
    elif (options.source / "config.json").is_file():
        _make(options, options.source)
    else:
        sys.exit(f"{options.source} holds no checkpoint: --source takes a directory with config.json and safetensors")


def _make(options: argparse.Namespace, source: Path) -> None:
    left_out = tuple(options.float)
    print(make_quantised(options.kind, source, options.directory, older=options.older, left_out=left_out))


if __name__ == "__main__":
    main()

"""The command line of the soak."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

import tools.soak
from support.child import ChildFailed
from tools.soak.conductor import Conductor
from tools.soak.servers import Setting
from tools.soak.watching import SoakFailed
from vllm_ascend.model_loader.netloader.errors import SourceError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak",
        description=tools.soak.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="default: 600")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="default: another one each time")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"{options.seconds:.0f} s, seed {options.seed}, {os.cpu_count()} CPUs", flush=True)

    failure = ""
    with tempfile.TemporaryDirectory(prefix="netloader-soak-") as scratch:
        conductor = Conductor(Setting.new(Path(scratch)), options.seed)
        try:
            conductor.run(options.seconds)
        except (SoakFailed, ChildFailed, SourceError) as error:
            failure = str(error)
        except KeyboardInterrupt:
            failure = "interrupted"

    if options.json:
        found = {"seed": options.seed, "failure": failure, **msgspec.to_builtins(conductor.counts)}
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    print(f"FAILED (seed {options.seed}): {failure}" if failure else "passed", flush=True)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())

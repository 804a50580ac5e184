"""The command line of the soak."""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import secrets
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

import tools.soak
from support.child import ChildFailed
from tools.soak.conductor import PATIENCE, Conductor, SoakFailed
from tools.soak.levels import Counts, say
from tools.soak.setting import Setting


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.soak",
        description=tools.soak.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="default: 600")
    parser.add_argument("--megabytes", type=int, default=64, help="of weights, in MiB (default: 64)")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--json", type=Path, help="also write the counts here")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    faulthandler.dump_traceback_later(2 * options.seconds + 5 * PATIENCE, exit=True)  # should this process itself hang
    say(f"{options.seconds:.0f} s, seed {seed}, {os.cpu_count()} CPUs")

    counts, failure = Counts(), ""
    with tempfile.TemporaryDirectory(prefix="netloader-soak-") as scratch:
        setting = Setting.new(options.megabytes << 20, Path(scratch))
        try:
            with Conductor(setting, random.Random(seed), counts) as conductor:
                conductor.run(options.seconds)
        except (SoakFailed, ChildFailed) as error:
            failure = str(error)
        except KeyboardInterrupt:
            failure = "interrupted"

    if options.json:
        found = {"seed": seed, "failure": failure, **msgspec.to_builtins(counts)}
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    say(f"FAILED (seed {seed}): {failure}" if failure else "passed")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())

"""How long it takes to recognise a checkpoint of 100 GB by its fingerprint.

    python -m benchmarks.fingerprint                 # a sparse checkpoint, made on the spot: 20 files of 5 GB
    python -m benchmarks.fingerprint --model DIR     # a checkpoint of yours

Two things are measured, `--rounds` times each:

    cold page cache    after the kernel was asked to drop the pages of the files; what then came from storage is
                       counted, and where that is nothing (a filesystem in memory), the cache cannot be dropped
    warm page cache    right after that

The reference, in the same run, is SHA-256 over 1 GB of memory, scaled to the size of the checkpoint: what hashing the
checkpoint would take if reading it took no time.

The sparse checkpoint has headers like those of real ones, and a page on the disk in the middle of each tensor, where
samples are taken, so that they are read and not made up by the filesystem. Everything else is holes, which take no
room. Inodes and the maps of the files stay cached: dropping them needs root. Absolute figures belong to the machine:
quote the ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.benchmark import Benchmark, progress
from benchmarks.harness.plot import REFERENCE, Bar, Panel
from benchmarks.harness.tables import GIGABYTE, print_table
from vllm_ascend.model_loader.netloader.checkpoint.fingerprint import checkpoint_fingerprint, files_in

FILES = 20
FILE_BYTES = 5 * 10**9
TENSORS_PER_FILE = 50
HASHED_BYTES = 10**9
HASHED_BLOCK = 10**7
"""SHA-256 is bound by the processor: the same block again and again costs what as much memory costs."""


@dataclass(frozen=True)
class Round:
    """One fingerprint. `read_bytes` were asked of the kernel, `storage_bytes` had to come from the disk."""

    seconds: float
    read_bytes: int
    storage_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class Figures:
    """Fingerprints of `files` with `bytes` of weights, and the time that SHA-256 takes for HASHED_BYTES."""

    bytes: int
    files: int
    seconds_to_hash_1_gb: float
    cold: list[Round]
    warm: list[Round]

    @property
    def seconds_to_hash(self) -> float:
        """What hashing all weights would take if reading them took no time."""
        return self.seconds_to_hash_1_gb * self.bytes / HASHED_BYTES


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a checkpoint directory; default: a sparse checkpoint of 100 GB")
    parser.add_argument("--directory", type=Path, help="where the sparse checkpoint is made; default: TMPDIR")


def measure(options: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory(prefix="fingerprint-", dir=options.directory) as scratch:
        model = options.model or make_sparse_checkpoint(Path(scratch))
        files = weight_files(model)
        if not files:
            sys.exit(f"there are no weights in {model}")
        cold, warm = take_fingerprints(model, files, options.rounds)
    return Figures(sum(files.values()), len(files), seconds_to_hash(), cold, warm)


def take_fingerprints(model: Path, files: dict[Path, int], rounds: int) -> tuple[list[Round], list[Round]]:
    """With a cold page cache and with a warm one."""
    cold, warm = [], []
    for number in range(rounds):
        drop_page_cache(files)
        cold.append(take_fingerprint(model))
        warm.append(take_fingerprint(model))
        progress(f"round {number + 1}: cold {cold[-1].seconds * 1e3:.1f} ms, warm {warm[-1].seconds * 1e3:.1f} ms")
    if len({each.fingerprint for each in (*cold, *warm)}) != 1:
        raise RuntimeError(f"the weights in {model} change while they are fingerprinted")
    return cold, warm


def take_fingerprint(model: Path) -> Round:
    before = _bytes_read()
    begun = time.perf_counter()
    fingerprint = checkpoint_fingerprint(files_in(model, weight_files(model)))
    seconds = time.perf_counter() - begun
    read, storage = (after - earlier for after, earlier in zip(_bytes_read(), before, strict=True))
    return Round(seconds, read, storage, fingerprint)


def make_sparse_checkpoint(directory: Path) -> Path:
    """Writes about a page for each tensor; returns `directory`."""
    generator = random.Random(0)
    for number in range(1, FILES + 1):
        file = directory / f"model-{number:05}-of-{FILES:05}.safetensors"
        with open(file, "wb") as stream:
            ranges = dict(_tensor_ranges(number))
            header = _header(ranges)
            stream.write(header)
            for begin, end in ranges.values():
                stream.seek(len(header) + (begin + end) // 2)
                stream.write(generator.randbytes(1024))
            stream.truncate(len(header) + FILE_BYTES)
    return directory


def _tensor_ranges(number: int) -> Iterator[tuple[str, tuple[int, int]]]:
    step = FILE_BYTES // TENSORS_PER_FILE
    for expert in range(TENSORS_PER_FILE):
        yield f"model.layers.{number}.mlp.experts.{expert}.down_proj.weight", (expert * step, (expert + 1) * step)


def _header(ranges: dict[str, tuple[int, int]]) -> bytes:
    """https://github.com/huggingface/safetensors#format"""
    entries = {
        name: {"dtype": "BF16", "shape": [(end - begin) // 2], "data_offsets": [begin, end]}
        for name, (begin, end) in ranges.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text


def weight_files(directory: Path) -> dict[Path, int]:
    """The files that are fingerprinted, and their sizes: all of the first format that there is."""
    found = next(filter(None, (sorted(directory.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt"))), [])
    return {file: file.stat().st_size for file in found}


def drop_page_cache(files: dict[Path, int]) -> None:
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())  # only clean pages can be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_hash() -> float:
    """SHA-256 over HASHED_BYTES of memory."""
    block, digest = random.Random(0).randbytes(HASHED_BLOCK), hashlib.sha256()
    begun = time.perf_counter()
    for _ in range(HASHED_BYTES // HASHED_BLOCK):
        digest.update(block)
    return time.perf_counter() - begun


def _bytes_read() -> tuple[int, int]:
    """By this process so far, all and from storage; proc(5), /proc/pid/io."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"]), int(counters["read_bytes"])


def show(figures: Figures) -> None:
    print(f"\nweights: {figures.bytes / GIGABYTE:.2f} GB in {figures.files} files, {len(figures.cold)} rounds\n")
    rows = []
    for page_cache, rounds in (("cold", figures.cold), ("warm", figures.warm)):
        median = statistics.median(each.seconds for each in rounds)
        rows.append(
            (
                page_cache,
                f"{median * 1e3:.1f}",
                f"{max(each.seconds for each in rounds) * 1e3:.1f}",
                f"{max(each.read_bytes for each in rounds) / 1e3:.0f}",
                f"{max(each.storage_bytes for each in rounds) / 1e3:.0f}",
                f"{figures.seconds_to_hash / median:.0f}",
            )
        )
    print_table(("page cache", "median ms", "worst ms", "kB read", "kB from storage", "x sha256"), rows)

    hashing, speed = figures.seconds_to_hash, 1 / figures.seconds_to_hash_1_gb
    print("\nx sha256: times faster than hashing the checkpoint, which would take ", end="")
    print(f"{hashing:.1f} s here, at {speed:.2f} GB/s from memory")
    if not any(each.storage_bytes for each in figures.cold):
        print("nothing came from storage: the page cache could not be dropped, so the cold figures are warm ones")


def panels(figures: Figures) -> list[Panel]:
    def bar(rounds: list[Round]) -> Bar:
        seconds = [each.seconds for each in rounds]
        median = statistics.median(seconds)
        return Bar(seconds, f"{median * 1e3:.0f} ms, {figures.seconds_to_hash / median:.0f}x faster", "fingerprint")

    hashing = figures.seconds_to_hash
    rows = {
        "SHA-256 of everything, from memory": [Bar([hashing], f"{hashing:.0f} s", REFERENCE)],
        "fingerprint, cold page cache": [bar(figures.cold)],
        "fingerprint, warm page cache": [bar(figures.warm)],
    }
    title = f"Recognising a checkpoint of {figures.bytes / GIGABYTE:.0f} GB"
    axis = f"seconds, logarithmic; median of {len(figures.cold)} rounds, each a small dot"
    return [Panel(title, axis, rows, logarithmic=True)]


if __name__ == "__main__":
    Benchmark(__doc__, Figures, 5, measure, show, panels, add_options).run()

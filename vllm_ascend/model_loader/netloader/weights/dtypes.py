"""The types of tensor elements by the names that torch gives them, for processes that have no torch."""

from __future__ import annotations

from typing import Final

ITEM_BYTES: Final[dict[str, int]] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("u", "") for bits in range(1, 8)), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    "float4_e2m1fn_x2": 1,
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Bytes of an element. torch's own quantized types are missing: no tensor of them can be made over given memory."""

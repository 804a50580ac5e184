"""A hash of bytes on a device that the device makes, so that they need not be read through host memory.

It tells whether post-processing has left the bytes of a tensor as they were. The key is drawn anew for each load, and
nothing that touches the tensors knows it. So a universal hash proves as much as a cryptographic digest (Carter and
Wegman, Universal Classes of Hash Functions, 1979): whatever two contents of equal length are, if they differ, they have
the same hash with a probability of at most 2^-63, counted over all keys.

The bytes are rows of 1,024 integers from -128 to 127, and the key is a matrix of 1,024 x 8 such integers, by which they
are multiplied. Two rows that differ agree in one product with a probability of at most 1/256, and in all 8 with at most
2^-64. The products, a 32nd of the bytes, are hashed once more, under a key of their own; what is left of that is
digested by the host.

A product is exact in fp32 on every device, whatever the order in which it adds: no partial sum is above 2^24, and the
factors fit into TF32, HF32 and bf16. A device that computes otherwise is noticed. Then the host digests all bytes.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from typing import Final

import torch

from vllm_ascend.model_loader.netloader.model.inverses import SCRATCH_BYTES, Contents
from vllm_ascend.model_loader.netloader.model.views import as_bytes
from vllm_ascend.model_loader.netloader.weights.manifest import chunks

logger = logging.getLogger(__name__)

_ROW_BYTES: Final = 1024
_PRODUCTS: Final = 8
_PRODUCT_BYTES: Final = 4
_SHARE: Final = _ROW_BYTES // (_PRODUCTS * _PRODUCT_BYTES)
"""The products of a row take one part in so many of its bytes."""
_TRIAL_ROWS: Final = 64


class UniversalHash:
    """A hash under a key of its own, which it draws. Hashes of one and the same object can be compared.

    It holds 16 KiB of the device.
    """

    def __init__(self, device: torch.device) -> None:
        """`device` is that of the bytes. What it computes is compared with the host's results once."""
        keys = [_random_bytes(_ROW_BYTES * _PRODUCTS).view(_ROW_BYTES, _PRODUCTS) for _ in range(2)]
        self._keys = [key.to(device) for key in keys]
        self._is_exact = all(_is_exact(key, there) for key, there in zip(keys, self._keys, strict=True))
        if not self._is_exact:
            logger.warning(
                "%s does not multiply small integers exactly in fp32, so the host reads all weights before and after "
                "post-processing, which takes longer",
                device,
            )

    def of(self, contents: Contents, nbytes: int) -> bytes:
        """The hash of `contents`, which has `nbytes` bytes: 32 bytes. It takes a few SCRATCH_BYTES of the device."""
        digest = hashlib.sha256()
        if not self._is_exact:
            for offset, length in chunks(nbytes, SCRATCH_BYTES):
                digest.update(contents.on_host(offset, offset + length))
            return digest.digest()

        products = [self._products_of_products(contents, *part) for part in chunks(nbytes, SCRATCH_BYTES * _SHARE)]
        if products:
            digest.update(as_bytes(torch.cat(products).cpu()))
        return digest.digest()

    def _products_of_products(self, contents: Contents, offset: int, length: int) -> torch.Tensor:
        first, second = (key.to(torch.float32) for key in self._keys)
        products = []
        for start, size in chunks(length, SCRATCH_BYTES):
            pieces = list(contents.pieces(offset + start, offset + start + size))
            products.append(_multiplied(_joined(pieces), first))
        return _multiplied(_joined(products), second)


def _is_exact(key: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether the device of `there`, which is the same key, multiplies random bytes by it as the host does."""
    trial = _random_bytes(_TRIAL_ROWS * _ROW_BYTES)
    expected = _as_bytes(trial.view(-1, _ROW_BYTES).long() @ key.long())
    return torch.equal(_multiplied(trial.to(there.device).view(torch.uint8), there.to(torch.float32)).cpu(), expected)


def _multiplied(data: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The products of the rows of `data`, filled up with zeros, and the columns of `key`, as bytes."""
    missing = -data.nbytes % _ROW_BYTES
    rows = _joined([data, data.new_zeros(missing)] if missing else [data]).view(torch.int8).view(-1, _ROW_BYTES)
    return _as_bytes(rows.to(torch.float32) @ key)


def _as_bytes(products: torch.Tensor) -> torch.Tensor:
    """Integers as bytes; as integers, because fp32 has two zeros."""
    return products.to(torch.int32).view(-1).view(torch.uint8)


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _random_bytes(count: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(secrets.token_bytes(count)), dtype=torch.int8)

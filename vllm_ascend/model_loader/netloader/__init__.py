"""Netloader: a vLLM instance takes its weights from one that already runs. Start reading at `loader`."""

from __future__ import annotations


def register_netloader() -> None:
    """Makes ``--load-format netloader`` known to vLLM and lets this package log like vLLM. Idempotent."""
    from vllm_ascend.model_loader.netloader.registration import register

    _log_like_vllm()
    register()


def _log_like_vllm() -> None:
    """Hangs our loggers below vLLM's, which alone get handlers, and get them anew whenever vLLM configures logging."""
    import logging

    logging.getLogger("vllm_ascend").parent = logging.getLogger("vllm")

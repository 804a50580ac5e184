"""Runs vllm-ascend's own end-to-end tests, from a checkout that the user has, on this package.

Each test runs as upstream wrote it, names of models aside: its hub is a cache made here, with small random models of
the same architectures, and nothing else can be reached. The tests are copied without upstream's package, so that they
import this one, and each file runs in a process of its own, on whatever devices the shell has: simulated ones after
`source tools/npu_sim.sh`.

A test passes, fails, or is not runnable. Why it is not runnable is as a rule what this platform, vLLM or Python says
itself: what is not supported, which package is missing. Only where a random model cannot meet an expectation about
text or accuracy, the reason is written down here, in `verdict`.

    python -m tools.upstream_e2e --checkout ../vllm-ascend --json found.json tests/e2e/pull_request/one_card

With the same file, --only-failed runs what has not passed yet, after an interruption too. Packages that upstream's
tests import and this one does not need (sentence-transformers, pytest-asyncio, diskcache) are to be installed first, or
their tests are not runnable for want of them.
"""

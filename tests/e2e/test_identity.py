"""Under which identity weights are served: files that change, appear or lie beside those that are read."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.ports import two_free_ports
from support.vllm.hub import Hub
from support.vllm.loaders import Load, Loader
from vllm_ascend.model_loader.netloader.client.inquiry import inquire
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.weights.identity import ModelIdentity

ONLY_FROM_A_SOURCE = {"FALLBACK": "error", "TRANSPORT": ["tcp"]}


@contextmanager
def useless_source(when_asked: Callable[[], object]) -> Iterator[str]:
    """The address of a source that lets `when_asked` happen when it is asked, and then hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with listener.accept()[0]:
                when_asked()

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def served(loader: Loader) -> ModelIdentity:
    (holding,) = inquire(Endpoint.parse(loader.address), 10).holdings
    return holding.identity


def test_weights_are_served_as_what_they_are_whenever_files_are_replaced(
    untied: str, fine_tune: str, load: Load, tmp_path: Path
) -> None:
    """One instance and its reloads, while `untied` and `fine_tune` take turns in its directory."""
    model = tmp_path / "model"
    shutil.copytree(untied, model)
    sources = tmp_path / "sources.json"

    def put(checkpoint: str) -> None:
        shutil.copy(Path(checkpoint) / "model.safetensors", model / "next")
        os.replace(model / "next", model / "model.safetensors")

    # Replaced between the question and the disk: served as the new contents.
    with useless_source(when_asked=lambda: put(fine_tune)) as source:
        sources.write_text(json.dumps({"SOURCE": [source]}))
        instance = load(str(model), {"CONFIG_FILE": str(sources)}).finish_loading()
    assert instance.report["outcome"] == "disk"
    shutil.copytree(fine_tune, tmp_path / "new")
    (tmp_path / "new" / "other.safetensors").write_bytes(b"which no index names")
    index = {"metadata": {}, "weight_map": {"w": "model.safetensors"}}
    (tmp_path / "new" / "model.safetensors.index.json").write_text(json.dumps(index))
    new = load(str(tmp_path / "new"), {"SOURCE": [instance.address], **ONLY_FROM_A_SOURCE})
    assert new.finish_loading().digests == instance.digests
    old = load(untied, {"SOURCE": [instance.address]}).finish_loading()
    assert old.report["outcome"] == "disk"
    assert "fingerprint" in old.report["attempts"][0]["reason"]
    assert old.digests != instance.digests
    of_the_old, of_the_new = served(old).fingerprint, served(instance).fingerprint
    assert served(new).fingerprint == of_the_new != of_the_old

    # The same in a reload.
    with useless_source(when_asked=lambda: put(untied)) as source:
        sources.write_text(json.dumps({"SOURCE": [source]}))
        instance.reload()
        instance.finish_loading()
    assert served(instance).fingerprint == of_the_old

    # Replaced in the middle of a reload: what was read may be neither, and is not taken over.
    sources.write_text("{}")
    shutil.copy(Path(fine_tune) / "model.safetensors", model / "next")
    in_the_middle = [str(model / "next"), str(model / "model.safetensors")]
    instance.reload(replace_while_reading=in_the_middle)
    reason = "the checkpoint changed while it was read: model.safetensors was replaced"
    assert (
        instance.fails_with() == f"ReloadRefused: {reason}: nothing was changed, reload again when nobody writes to it"
    )
    assert served(instance).fingerprint == of_the_old
    instance.reload()
    instance.finish_loading()
    assert served(instance).fingerprint == of_the_new

    # Replaced in the middle of a first load: computed with, as by vLLM's own loader, and not served.
    shutil.copy(Path(untied) / "model.safetensors", model / "next")
    port = two_free_ports()
    mixed = load(str(model), {"LISTEN_PORT": port}, replace_while_reading=in_the_middle).finish_loading()
    assert mixed.report["not_served"] == reason
    assert f"the target weights of rank 0 cannot be served: {reason}" in mixed.log_text()
    status = inquire(Endpoint("127.0.0.1", port), 10)
    assert (status.holdings, status.declined) == ((), {"target": reason})


def test_what_lies_beside_a_checkpoint_in_the_format_of_torch_does_not_count(
    untied: str, load: Load, tmp_path: Path
) -> None:
    plain, trained_here = tmp_path / "plain", tmp_path / "trained"
    shutil.copytree(untied, plain)
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    shutil.copytree(plain, trained_here)
    for name in ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt"):
        (trained_here / name).write_bytes(b"anything")
    server = load(str(plain)).finish_loading()
    client = load(str(trained_here), {"SOURCE": [server.address], **ONLY_FROM_A_SOURCE}).finish_loading()
    assert client.digests == server.digests
    fingerprint = served(server).fingerprint
    assert served(client).fingerprint == fingerprint != ""

    # As after an interrupted download, of which vLLM's loader does not know that it was one.
    index = {"metadata": {}, "weight_map": {"w": "pytorch_model.bin", "v": "missing.bin"}}
    (trained_here / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    partial = load(str(trained_here), {"SOURCE": [server.address]}).finish_loading()
    names = f"name (here {trained_here}, there {plain}); fingerprint (here none, there {fingerprint})"
    assert partial.report["attempts"][0]["reason"].endswith(names)
    warning = f"the checkpoint of {trained_here} cannot be fingerprinted, so names decide"
    assert warning in partial.log_text()
    assert "1 of its files are missing, among them: 'missing.bin'" in partial.log_text()


def test_a_model_that_its_load_downloads_is_served_by_its_fingerprint(untied: str, load: Load, hub: Hub) -> None:
    """And then asked for by it, now that it is in the cache."""
    hub.repositories["org/model"] = Path(untied)
    first = load("org/model").finish_loading()
    assert "model.safetensors" in hub.downloads
    identity = served(first)
    assert (identity.name, identity.revision) == ("org/model", hub.COMMIT)
    from_a_path = load(untied, {"SOURCE": [first.address], **ONLY_FROM_A_SOURCE}).finish_loading()
    assert from_a_path.digests == first.digests
    hub.downloads.clear()
    second = load("org/model", {"SOURCE": [from_a_path.address], **ONLY_FROM_A_SOURCE}).finish_loading()
    assert "model.safetensors" not in hub.downloads
    assert second.digests == first.digests
    assert served(second).fingerprint == identity.fingerprint != ""

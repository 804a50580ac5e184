"""Whose socket it is: nobody else can take the place of the cache, or ask it."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from support.caches import given, handed, held, running, socket_of
from vllm_ascend.model_loader.netloader.cache import asking, place
from vllm_ascend.model_loader.netloader.cache.line import connect
from vllm_ascend.model_loader.netloader.errors import ConfigError, PeerError

pytestmark = pytest.mark.timeout(60)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_socket_is_in_a_directory_for_its_user_alone(tmp_path: Path) -> None:
    with running(tmp_path):
        path = socket_of(tmp_path)
        assert (mode(path.parent), mode(path)) == (0o700, 0o600)
        assert path.is_socket()
    assert not path.exists()


def test_a_directory_that_is_new_and_empty_is_made_private(tmp_path: Path) -> None:
    directory = tmp_path / "of the kubelet"
    directory.mkdir(mode=0o755)
    assert place.prepare(f"{directory}/cache.sock").parent == directory
    assert mode(directory) == 0o700


def test_a_directory_in_which_others_may_have_put_something_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"mode 0777, so that others reach the cache: chmod 700 {tmp_path}"):
        place.prepare(f"{tmp_path}/cache.sock")


@pytest.mark.parametrize("kind", ["link", "file", "missing parent", "relative"])
def test_a_place_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    path = {"missing parent": f"{tmp_path}/a/b/cache.sock", "relative": "cache.sock"}.get(kind, f"{tmp_path}/{kind}/s")
    with pytest.raises(ConfigError):
        place.prepare(path)


@needs_root
def test_a_directory_of_somebody_else_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(tmp_path):
        os.chown(socket_of(tmp_path).parent, 65534, 65534)
        assert given(socket_of(tmp_path)) is None
        os.chown(socket_of(tmp_path).parent, 0, 0)
    assert "belongs to user id 65534: expected 0" in caplog.text
    os.chown(socket_of(tmp_path).parent, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to user id 65534"):
        place.prepare(str(socket_of(tmp_path)))


@needs_root
def test_a_process_of_somebody_else_gets_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even if it could reach the socket, as root's children can that were given the directory."""
    caplog.set_level(logging.INFO)
    program = f"""
import os, socket
directory = os.open({str(socket_of(tmp_path).parent)!r}, os.O_RDONLY)
sock = socket.socket(socket.AF_UNIX)
path = f"/proc/self/fd/{{directory}}/cache.sock"
os.chmod(path, 0o666)
os.chmod({str(socket_of(tmp_path).parent)!r}, 0o777)
os.setuid(65534)
sock.connect("cache.sock" if os.fchdir(directory) else "cache.sock")
sock.settimeout(20)
print(repr(sock.recv(1)))
"""
    with running(tmp_path) as cache:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
        assert done.stdout == "b''\n", done.stderr
        assert held(cache) == []
    assert "has user id 65534: expected 0" in caplog.text


@needs_root
def test_a_cache_of_somebody_else_is_not_believed(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    program = f"""
import os, socket, sys
os.chdir({str(directory)!r})
sock = socket.socket(socket.AF_UNIX)
sock.bind("cache.sock")
os.setuid(65534)
sock.listen()
print("ready", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as impostor:
        assert impostor.stdout is not None
        assert impostor.stdin is not None
        impostor.stdout.readline()
        with pytest.raises(PeerError, match="has user id 65534: expected 0"):
            connect(directory / "cache.sock", 5)
        assert not handed(directory / "cache.sock")
        impostor.stdin.close()
        assert impostor.wait(20) == 0


def test_a_path_of_any_length_works(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["directory" * 4] * 6)
    deep.mkdir(parents=True)
    with running(deep):
        assert handed(socket_of(deep))


def test_what_a_cache_that_was_killed_has_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(socket_of(tmp_path)))
    assert given(socket_of(tmp_path)) is None
    with running(tmp_path):
        assert handed(socket_of(tmp_path))


def test_engines_look_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = place.prepare(None)
    assert path == tmp_path / "netloader" / "cache.sock"
    assert place.candidates("auto")[0] == path
    assert place.candidates("off") == ()
    assert place.candidates("/somewhere/s") == (Path("/somewhere/s"),)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert place.candidates("auto")[0] == Path("/run/netloader/cache.sock")
    assert place.candidates("auto")[-1] == Path(f"/tmp/netloader-{os.geteuid()}/cache.sock")


def test_places_where_nobody_answers_are_passed_over(tmp_path: Path) -> None:
    """What was left by a cache that was killed, what is of somebody else, and what is no directory."""
    (tmp_path / "left").mkdir(mode=0o700)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "file").touch()
    for name in ("left", "open"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / name / "cache.sock"))
    dead = [tmp_path / name / "cache.sock" for name in ("left", "open", "file", "missing")]
    with running(tmp_path):
        assert asking.find([*dead, socket_of(tmp_path)], 5) == socket_of(tmp_path)
    reasons = asking.find(dead, 5)
    assert isinstance(reasons, str)
    assert reasons.count("; ") == 3
    assert "Connection refused" in reasons


def test_a_usual_place_that_cannot_be_had_is_left_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setattr(place, "usual_directories", lambda: (taken, tmp_path / "free"))
    assert place.prepare(None) == tmp_path / "free" / "cache.sock"
    monkeypatch.setattr(place, "usual_directories", lambda: (taken,))
    with pytest.raises(ConfigError, match=f"name one by --socket: {taken} is no directory that this user can open"):
        place.prepare(None)

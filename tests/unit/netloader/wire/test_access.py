from __future__ import annotations

import contextlib
import logging
import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from support.certificates import Authority, Identification
from support.sources import SMALL
from vllm_ascend.model_loader.netloader.client.options import FetchOptions
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig
from vllm_ascend.model_loader.netloader.errors import ConfigError, ProtocolError
from vllm_ascend.model_loader.netloader.server.requests import Settings
from vllm_ascend.model_loader.netloader.transport.base import Timeouts
from vllm_ascend.model_loader.netloader.wire.access import Access, Proofs, challenge, derive_key

TOKEN = b"correct horse battery staple"
CLIENT_CHALLENGE, SERVER_CHALLENGE = bytes(range(32)), bytes(range(32, 64))


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="session")
def identification(authority: Authority) -> Identification:
    return authority.identify("instance")


def token_file(directory: Path, content: bytes, mode: int = 0o600) -> str:
    path = directory / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_without_files_everybody_is_let_in() -> None:
    assert Access.load() == Access() == Access.configured(NetLoaderConfig())
    assert not Access().restricted


def test_a_token_keeps_strangers_out(tmp_path: Path) -> None:
    access = Access.load(token_file(tmp_path, TOKEN))
    assert access == Access(TOKEN)
    assert access.restricted


@pytest.mark.parametrize(
    "content",
    [TOKEN + b"\n", b" \t\r\n" + TOKEN + b"\r\n\n", b"\n" + TOKEN],
    ids=["a line", "much around it", "an empty line before it"],
)
def test_the_white_space_around_a_token_does_not_count(tmp_path: Path, content: bytes) -> None:
    assert Access.load(token_file(tmp_path, content)).token == TOKEN


def test_a_token_may_hold_any_bytes(tmp_path: Path) -> None:
    token = bytes(range(255, 128, -1)) + b" \x00 \n inside"
    assert Access.load(token_file(tmp_path, token)).token == token


@pytest.mark.parametrize("length", [16, 17, 4096])
def test_a_token_of_sixteen_bytes_is_long_enough(tmp_path: Path, length: int) -> None:
    assert Access.load(token_file(tmp_path, b"x" * length)).token == b"x" * length


@pytest.mark.parametrize(
    ("content", "counted"),
    [(b"", 0), (b" \n" * 100, 0), (b"x" * 15, 15), (b" " * 40 + b"hunter2" + b"\n" * 40, 7)],
    ids=["empty", "white space", "one less", "white space around"],
)
def test_a_token_that_is_too_short_is_refused_without_showing_it(tmp_path: Path, content: bytes, counted: int) -> None:
    path = token_file(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        Access.load(path)
    assert str(caught.value) == (
        f"TOKEN_FILE {path!r} holds {counted} bytes: expected at least 16, as of `openssl rand -hex 32`"
    )


def absent(directory: Path) -> Path:
    return directory / "absent"


def below_a_file(directory: Path) -> Path:
    (directory / "file").touch()
    return directory / "file" / "token"


def in_a_circle(directory: Path) -> Path:
    path = directory / "circle"
    path.symlink_to(path)
    return path


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent": (absent, "No such file or directory"),
    "a directory": (lambda directory: directory, "Is a directory"),
    "below a file": (below_a_file, "Not a directory"),
    "a link to itself": (in_a_circle, "Too many levels of symbolic links"),
    "no bytes to be had": (lambda _: Path("/proc/self/mem"), "Input/output error"),
}


@pytest.mark.parametrize(("place", "reason"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_a_token_that_cannot_be_read_is_refused(tmp_path: Path, place: Callable[[Path], Path], reason: str) -> None:
    path = str(place(tmp_path))
    with pytest.raises(ConfigError) as caught:
        Access.load(path)
    assert str(caught.value) == f"TOKEN_FILE {path!r} cannot be read: {reason}"


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Gives up what lets root read everything; everybody else has nothing to give up."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_token_that_this_user_may_not_read_is_refused(tmp_path: Path) -> None:
    path = token_file(tmp_path, TOKEN, mode=0)
    with as_nobody(), pytest.raises(ConfigError) as caught:
        Access.load(path)
    assert str(caught.value) == f"TOKEN_FILE {path!r} cannot be read: Permission denied"


EXPOSED = {
    0o604: "can be read by every user of this host: chmod o= it",
    0o644: "can be read by every user of this host: chmod o= it",
    0o601: "can be read by every user of this host: chmod o= it",
    0o602: "can be written by every user of this host, who can so let anybody in: chmod o= it, and make it anew",
    0o606: "can be written by every user of this host, who can so let anybody in: chmod o= it, and make it anew",
    0o660: "can be written by every user of its group: chmod g-w it",
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(("mode", "warning"), EXPOSED.items(), ids=map(oct, EXPOSED))
def test_a_token_that_others_can_get_at_is_warned_of_without_showing_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warning: str
) -> None:
    path = token_file(tmp_path, TOKEN, mode)
    with caplog.at_level(logging.DEBUG):
        assert Access.load(path).token == TOKEN
    assert warnings_of(caplog) == [f"TOKEN_FILE {path} {warning}"]


@pytest.mark.parametrize(("mode", "warning"), EXPOSED.items(), ids=map(oct, EXPOSED))
def test_a_key_that_others_can_get_at_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, identification: Identification, mode: int, warning: str
) -> None:
    key = tmp_path / "key"
    shutil.copy(identification.key, key)
    key.chmod(mode)
    Access.load(None, identification.cert, str(key), identification.ca)
    assert warnings_of(caplog) == [f"TLS_KEY {key} {warning}"]


@pytest.mark.parametrize("which", ["cert", "ca"])
def test_certificates_are_for_everybody_to_read_and_for_nobody_else_to_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, identification: Identification, which: str
) -> None:
    path = tmp_path / which
    shutil.copy(getattr(identification, which), path)
    files = {"cert": identification.cert, "ca": identification.ca, which: str(path)}
    for mode, expected in ((0o644, []), (0o646, [f"TLS_{which.upper()} {path} {EXPOSED[0o602]}"])):
        path.chmod(mode)
        Access.load(None, files["cert"], identification.key, files["ca"])
        assert warnings_of(caplog) == expected


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640], ids=oct)
def test_a_token_for_its_owner_and_group_is_not_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    with caplog.at_level(logging.DEBUG):
        Access.load(token_file(tmp_path, TOKEN, mode))
    assert caplog.records == []


def test_the_token_is_shown_by_nothing_that_holds_it() -> None:
    access = Access(TOKEN)
    holders = (
        access,
        Settings((), access=access),
        FetchOptions(SMALL.request(), Timeouts(), access),
        Proofs(TOKEN, bytes(32), bytes(32)),
    )
    for holder in holders:
        assert TOKEN.decode() not in f"{holder!r} {holder}"


def test_a_certificate_keeps_strangers_out(identification: Identification) -> None:
    access = identification.access()
    assert access.restricted
    assert access.token is None


@pytest.mark.parametrize("side", ["server_tls", "client_tls"])
def test_either_side_shows_its_certificate_and_wants_one_of_the_authority(
    authority: Authority, identification: Identification, side: str
) -> None:
    context: ssl.SSLContext = getattr(identification.access(), side)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert not context.check_hostname
    assert context.get_ca_certs(binary_form=True) == [ssl.PEM_cert_to_DER_cert(Path(authority.file).read_text())]


def test_a_token_and_certificates_go_together(tmp_path: Path, identification: Identification) -> None:
    access = identification.access(token_file(tmp_path, TOKEN))
    assert access.token == TOKEN
    assert access.server_tls is not None
    assert access.client_tls is not None


def test_the_configuration_names_the_files(tmp_path: Path, identification: Identification) -> None:
    config = NetLoaderConfig.parse(
        {
            "TOKEN_FILE": token_file(tmp_path, TOKEN),
            "TLS_CERT": identification.cert,
            "TLS_KEY": identification.key,
            "TLS_CA": identification.ca,
        }
    )
    access = Access.configured(config)
    assert access.token == TOKEN
    assert access.server_tls is not None
    assert access.client_tls is not None


@pytest.mark.parametrize("given", ["tls_cert", "tls_key", "tls_ca"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "missing"])
def test_a_part_of_tls_is_refused_and_not_taken_for_none(
    identification: Identification, given: str, alone: bool
) -> None:
    files = {"tls_cert": identification.cert, "tls_key": identification.key, "tls_ca": identification.ca}
    part = {key: file for key, file in files.items() if (key == given) == alone}
    with pytest.raises(ConfigError, match="a part of TLS is missing: it needs TLS_CERT, TLS_KEY and TLS_CA"):
        Access.load(**part)


@dataclass(frozen=True)
class Fault:
    """What is wrong with the files, and how the error begins, given their paths."""

    files: Callable[[Authority, Identification, Path], Identification]
    named: str
    because: str


PAIR = "TLS_CERT {0.cert!r} and TLS_KEY {0.key!r} are no readable PEM pair of certificate and key: "
CA = "TLS_CA {0.ca!r} is no readable PEM file of certificates: "


def nowhere(directory: Path) -> str:
    return str(directory / "nowhere.pem")


def garbage(directory: Path) -> str:
    path = directory / "garbage.pem"
    path.write_bytes(bytes(range(256)))
    return str(path)


def empty(directory: Path) -> str:
    path = directory / "empty.pem"
    path.touch()
    return str(path)


def cut_short(directory: Path, file: str) -> str:
    path = directory / "cut.pem"
    path.write_bytes(Path(file).read_bytes()[:-60])
    return str(path)


FAULTS: dict[str, Fault] = {
    "no certificate": Fault(lambda _, good, directory: replace(good, cert=nowhere(directory)), PAIR, "No such file"),
    "no key": Fault(lambda _, good, directory: replace(good, key=nowhere(directory)), PAIR, "No such file"),
    "no authority": Fault(lambda _, good, directory: replace(good, ca=nowhere(directory)), CA, "No such file"),
    "a certificate that is a directory": Fault(
        lambda _, good, directory: replace(good, cert=str(directory)), PAIR, r"Is a directory|PEM lib"
    ),
    "a key that is a directory": Fault(
        lambda _, good, directory: replace(good, key=str(directory)), PAIR, r"Is a directory|PEM lib"
    ),
    "an authority that is a directory": Fault(
        lambda _, good, directory: replace(good, ca=str(directory)),
        CA,
        r"Is a directory|\[X509\]|PEM lib|unknown error",
    ),
    "a certificate that is not PEM": Fault(
        lambda _, good, directory: replace(good, cert=garbage(directory)), PAIR, "PEM"
    ),
    "a key that is not PEM": Fault(lambda _, good, directory: replace(good, key=garbage(directory)), PAIR, "PEM"),
    "an authority that is not PEM": Fault(
        lambda _, good, directory: replace(good, ca=garbage(directory)), CA, "NO_CERTIFICATE_OR_CRL_FOUND"
    ),
    "an empty certificate": Fault(lambda _, good, directory: replace(good, cert=empty(directory)), PAIR, "PEM"),
    "an empty key": Fault(lambda _, good, directory: replace(good, key=empty(directory)), PAIR, "PEM"),
    "an empty authority": Fault(
        lambda _, good, directory: replace(good, ca=empty(directory)), CA, "NO_CERTIFICATE_OR_CRL_FOUND"
    ),
    "a certificate that is cut short": Fault(
        lambda _, good, directory: replace(good, cert=cut_short(directory, good.cert)), PAIR, "PEM"
    ),
    "an authority that is a key": Fault(
        lambda _, good, __: replace(good, ca=good.key), CA, "NO_CERTIFICATE_OR_CRL_FOUND"
    ),
    "certificate and key confused": Fault(lambda _, good, __: replace(good, cert=good.key, key=good.cert), PAIR, "PEM"),
    "the key of another certificate": Fault(
        lambda ours, good, _: replace(good, key=ours.identify("other").key), PAIR, "KEY_VALUES_MISMATCH"
    ),
    "an encrypted key": Fault(
        lambda ours, _, __: ours.identify("locked", password=b"hunter2"),
        PAIR,
        "the key is encrypted, and nobody is there to type its password",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_files_of_tls_that_are_no_use_are_refused_with_their_keys_and_paths(
    authority: Authority, identification: Identification, tmp_path: Path, fault: Fault
) -> None:
    files = fault.files(authority, identification, tmp_path)
    with pytest.raises(ConfigError, match=fault.because) as caught:
        files.access()
    assert str(caught.value).startswith(fault.named.format(files))


def test_files_that_were_read_may_go(tmp_path: Path, identification: Identification) -> None:
    copies = Identification(
        *(str(shutil.copy(file, tmp_path)) for file in (identification.cert, identification.key, identification.ca))
    )
    access = copies.access(token_file(tmp_path, TOKEN))
    shutil.rmtree(tmp_path)
    assert access.token == TOKEN


def values(proofs: Proofs) -> tuple[bytes, bytes, bytes]:
    return proofs.client, proofs.server, proofs.frame_key


PROOFS = Proofs(TOKEN, CLIENT_CHALLENGE, SERVER_CHALLENGE)


@pytest.mark.parametrize("challenges", [(b"", bytes(32)), (bytes(32), bytes(31)), (bytes(33), bytes(31))])
def test_a_challenge_of_another_length_proves_nothing(challenges: tuple[bytes, bytes]) -> None:
    with pytest.raises(ProtocolError, match="not 32 bytes long"):
        Proofs(TOKEN, *challenges)


def test_both_sides_derive_the_same_values() -> None:
    assert values(Proofs(TOKEN, CLIENT_CHALLENGE, SERVER_CHALLENGE)) == values(PROOFS)


def test_no_value_serves_for_another_purpose() -> None:
    assert len(set(values(PROOFS))) == 3
    assert {len(value) for value in values(PROOFS)} == {32}


OTHERS = {
    "another token": Proofs(TOKEN + b"!", CLIENT_CHALLENGE, SERVER_CHALLENGE),
    "a token cut short": Proofs(TOKEN[:-1], CLIENT_CHALLENGE, SERVER_CHALLENGE),
    "another challenge of the client": Proofs(TOKEN, bytes(32), SERVER_CHALLENGE),
    "another challenge of the server": Proofs(TOKEN, CLIENT_CHALLENGE, bytes(32)),
    "the sides exchanged": Proofs(TOKEN, SERVER_CHALLENGE, CLIENT_CHALLENGE),
    "one challenge for both": Proofs(TOKEN, CLIENT_CHALLENGE, CLIENT_CHALLENGE),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_another_token_or_challenge_gives_other_values(other: Proofs) -> None:
    assert not {*values(PROOFS)} & {*values(other)}


def test_the_values_stay_the_same_across_releases() -> None:
    assert [value.hex() for value in values(PROOFS)] == [
        "7fca42b5c106cc40d0435c546f9ac29be158b616afdddca9b95a9eabdbfc3dd1",
        "cd19a262cf01805108ce98b7132686e51da44cff26615abafed7b5d29d3a0538",
        "a8ef96937f70a018f8d50a856986532bc0492cc86776dd2f495bf1c74552a414",
    ]


def test_purpose_and_context_cannot_be_shifted_into_one_another() -> None:
    assert derive_key(TOKEN, b"data key", b"1") != derive_key(TOKEN, b"data key1", b"")
    assert derive_key(TOKEN, b"data", b" key1") != derive_key(TOKEN, b"data key", b"1")


def test_no_challenge_comes_twice() -> None:
    challenges = [challenge() for _ in range(1000)]
    assert len(set(challenges)) == 1000
    assert {len(each) for each in challenges} == {32}

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_ascend.model_loader.netloader import traits
from vllm_ascend.model_loader.netloader.config import NetLoaderConfig, Source
from vllm_ascend.model_loader.netloader.endpoint import Endpoint
from vllm_ascend.model_loader.netloader.errors import ConfigError, NetloaderError

VALID: dict[str, dict[str, tuple[Any, Any]]] = {
    "SOURCE": {
        "none": ([], ()),
        "one": (["10.0.0.1:19000"], (Source(Endpoint("10.0.0.1", 19000)),)),
        "name and IPv6": (
            ["node-3:1", "[fd00::1]:65535"],
            (Source(Endpoint("node-3", 1)), Source(Endpoint("fd00::1", 65535))),
        ),
        "for one rank": (
            [{"device_id": 3, "sources": ["a:1", "b:2"]}],
            (Source(Endpoint("a", 1), 3), Source(Endpoint("b", 2), 3)),
        ),
        "a rank without sources": ([{"device_id": 0, "sources": []}], ()),
        "a rank without the list": ([{"device_id": 0}, {"device_id": 1, "sources": None}], ()),
        "null": (None, ()),
        "both forms": (
            ["a:1", {"device_id": 0, "sources": ["b:2"]}],
            (Source(Endpoint("a", 1)), Source(Endpoint("b", 2), 0)),
        ),
    },
    "MODEL": {"name": ("org/model", "org/model"), "null": (None, None)},
    "LISTEN_HOST": {"IPv4": ("0.0.0.0", "0.0.0.0"), "IPv6": ("::1", "::1"), "name": ("node-3", "node-3")},
    "LISTEN_PORT": {"lowest": (1, 1), "highest": (65535, 65535), "text": ("19000", 19000), "null": (None, None)},
    "SERVE": {"true": (True, True), "false": (False, False)},
    "RELAY": {"true": (True, True), "false": (False, False)},
    "CACHE": {"any": ("auto", "auto"), "none": ("off", "off"), "path": ("/run/n/cache.sock", "/run/n/cache.sock")},
    "TRANSPORT": {
        "one": (["tcp"], ("tcp",)),
        "all in an order of one's own": (
            ["process_group", "tcp", "shared_memory"],
            ("process_group", "tcp", "shared_memory"),
        ),
    },
    "CONNECT_TIMEOUT": {"whole": (5, 5.0), "fraction": (0.25, 0.25), "a day": (86400, 86400.0)},
    "STALL_TIMEOUT": {"whole": (5, 5.0), "fraction": (1e-3, 1e-3), "a day": (86400.0, 86400.0)},
    "WAIT_TIMEOUT": {"whole": (600, 600.0), "fraction": (0.5, 0.5), "a day": (86400, 86400.0)},
    "VERIFY": {"on": ("on", True), "off": ("off", False)},
    "MAX_CLIENTS": {"lowest": (1, 1), "highest": (256, 256)},
    "MIN_BANDWIDTH": {"off": (0, 0), "some": (65536, 65536), "highest": (1 << 50, 1 << 50)},
    "MAX_BANDWIDTH": {"lowest": (1 << 20, 1 << 20), "highest": (1 << 50, 1 << 50)},
    "TOKEN_FILE": {"path": ("/run/secrets/netloader", "/run/secrets/netloader")},
    "TLS_CERT": {"path": ("own.pem", "own.pem")},
    "TLS_KEY": {"path": ("own.key", "own.key")},
    "TLS_CA": {"path": ("ca.pem", "ca.pem")},
    "FALLBACK": {"disk": ("disk", "disk"), "error": ("error", "error")},
    "INT8_CACHE": {
        "hbm": ("hbm", "hbm"),
        "dram": ("dram", "dram"),
        "no": ("no", "no"),
        "upper case": ("HBM", "hbm"),
        "mixed case": ("Dram", "dram"),
        "null": (None, "no"),
    },
    "INT8_CACHE_NAME": {"none": ([], ()), "names": (["a", "b"], ("a", "b")), "null": (None, None)},
    "OUTPUT_PREFIX": {"path": ("/run/netloader/rank", "/run/netloader/rank"), "null": (None, None)},
    "REPORT_PREFIX": {"path": ("reports/", "reports/")},
}

UPSTREAM = {"SOURCE", "MODEL", "LISTEN_PORT", "INT8_CACHE", "INT8_CACHE_NAME", "OUTPUT_PREFIX"}
"""The keys that upstream's Netloader has, which takes null for an absent one."""

TLS = {"TLS_CERT": "cert.pem", "TLS_KEY": "key.pem", "TLS_CA": "authority.pem"}


def required_beside(key: str) -> dict[str, Any]:
    """Keys without which `key` is refused."""
    return TLS if key in TLS else {}


PORTS = "port number from 1 to 65535"
SECONDS = "seconds above 0 and at most 86400"
TEXT = "non-empty string"
CLIENTS = "number of clients from 1 to 256"
BANDWIDTH = "number of bytes per second from 1048576 to 1125899906842624"
LEAST_BANDWIDTH = "a number of bytes per second from 0 to 1125899906842624"
TRANSPORT = "best first and each once, out of shared_memory, process_group, tcp"
INVALID: dict[str, dict[str, tuple[Any, str]]] = {
    "SOURCE": {
        "one string": ("a:1", 'list of "host:port"'),
        "no port": (["a"], "host:port"),
        "empty host": ([":1"], "host:port"),
        "empty label": (["a..b:1"], "cannot be a host name"),
        "port 0": (["a:0"], "from 1 to 65535"),
        "port too high": (["a:65536"], "from 1 to 65535"),
        "bare IPv6": (["fd00::1"], "[address]:port"),
        "number": ([19000], 'item 0 is 19000: expected "host:port"'),
        "null inside": (["a:1", None], "item 1 is None"),
        "list inside": ([["a:1"]], 'expected "host:port" or {"device_id"'),
        "object without device_id": ([{"sources": ["a:1"]}], '{"device_id": ..., "sources": [...]}'),
        "object with more": ([{"device_id": 0, "sources": [], "x": 1}], '{"device_id": ..., "sources": [...]}'),
        "negative rank": ([{"device_id": -1, "sources": []}], "device_id -1: expected a rank, 0 or more"),
        "boolean rank": ([{"device_id": True, "sources": []}], "device_id True: expected a rank"),
        "text rank": ([{"device_id": "0", "sources": []}], "device_id '0': expected a rank"),
        "sources a string": ([{"device_id": 0, "sources": "a:1"}], "sources 'a:1': expected a list"),
        "sources of numbers": ([{"device_id": 0, "sources": [1]}], "sources [1]: expected a list"),
        "no port for a rank": ([{"device_id": 0, "sources": ["a"]}], "host:port"),
    },
    "MODEL": {"empty": ("", TEXT), "number": (7, TEXT), "list": (["m"], TEXT)},
    "LISTEN_HOST": {
        "null": (None, TEXT),
        "empty": ("", TEXT),
        "number": (0, TEXT),
        "empty label": ("a..b", "cannot be a host name"),
        "a variable that is empty": (".svc.cluster.local", "cannot be a host name"),
        "long label": ("x" * 64, "cannot be a host name"),
        "long": (".".join(["x" * 60] * 5), "cannot be a host name"),
    },
    "LISTEN_PORT": {
        "zero": (0, PORTS),
        "negative": (-1, PORTS),
        "too high": (65536, PORTS),
        "text with a sign": ("+19000", PORTS),
        "other digits": ("١٩٠٠٠", PORTS),
        "zero as text": ("0", PORTS),
        "too high as text": ("65536", PORTS),
        "very many digits": ("9" * 5000, PORTS),
        "fraction": (19000.0, PORTS),
        "boolean": (True, PORTS),
    },
    "RELAY": {
        "null": (None, "true or false"),
        "text": ("false", "true or false"),
        "number": (0, "true or false"),
    },
    "CACHE": {
        "null": (None, "the absolute path"),
        "boolean": (False, "the absolute path"),
        "relative": ("cache.sock", "the absolute path"),
        "empty": ("", "the absolute path"),
        "other case": ("Auto", '"auto", "off"'),
    },
    "SERVE": {
        "null": (None, "true or false"),
        "text": ("true", "true or false"),
        "zero": (0, "true or false"),
        "one": (1, "true or false"),
    },
    "TRANSPORT": {
        "null": (None, TRANSPORT),
        "text": ("tcp", TRANSPORT),
        "empty": ([], TRANSPORT),
        "unknown": (["tcp", "rdma"], TRANSPORT),
        "twice": (["tcp", "tcp"], TRANSPORT),
        "number": ([1], TRANSPORT),
        "unhashable": ([["tcp"]], TRANSPORT),
    },
    "CONNECT_TIMEOUT": {
        "null": (None, SECONDS),
        "zero": (0, SECONDS),
        "negative": (-0.5, SECONDS),
        "more than a day": (86401, SECONDS),
        "infinite": (float("inf"), SECONDS),
        "not a number": (float("nan"), SECONDS),
        "huge integer": (10**400, SECONDS),
        "text": ("10", SECONDS),
        "boolean": (True, SECONDS),
    },
    "STALL_TIMEOUT": {"null": (None, SECONDS), "zero": (0.0, SECONDS), "text": ("1s", SECONDS)},
    "WAIT_TIMEOUT": {"null": (None, SECONDS), "zero": (0, SECONDS), "text": ("5m", SECONDS), "list": ([1], SECONDS)},
    "VERIFY": {
        "null": (None, '"on" or "off"'),
        "boolean": (True, '"on" or "off"'),
        "upper case": ("ON", '"on" or "off"'),
        "empty": ("", '"on" or "off"'),
        "unhashable": (["on"], '"on" or "off"'),
    },
    "MAX_CLIENTS": {
        "null": (None, CLIENTS),
        "none": (0, CLIENTS),
        "too many": (257, CLIENTS),
        "fraction": (8.0, CLIENTS),
        "text": ("8", CLIENTS),
        "boolean": (True, CLIENTS),
    },
    "MIN_BANDWIDTH": {
        "null": (None, LEAST_BANDWIDTH),
        "negative": (-1, LEAST_BANDWIDTH),
        "too high": ((1 << 50) + 1, LEAST_BANDWIDTH),
        "text": ("64k", LEAST_BANDWIDTH),
    },
    "MAX_BANDWIDTH": {
        "null": (None, BANDWIDTH),
        "zero": (0, BANDWIDTH),
        "too low": ((1 << 20) - 1, BANDWIDTH),
        "too high": ((1 << 50) + 1, BANDWIDTH),
        "fraction": (2.5e9, BANDWIDTH),
        "text": ("10G", BANDWIDTH),
        "boolean": (True, BANDWIDTH),
    },
    "TOKEN_FILE": {"null": (None, TEXT), "empty": ("", TEXT), "number": (0, TEXT)},
    "TLS_CERT": {"null": (None, TEXT), "empty": ("", TEXT), "boolean": (True, TEXT)},
    "TLS_KEY": {"null": (None, TEXT), "empty": ("", TEXT), "list": (["own.key"], TEXT)},
    "TLS_CA": {"null": (None, TEXT), "empty": ("", TEXT), "object": ({}, TEXT)},
    "FALLBACK": {
        "null": (None, '"disk", "error"'),
        "other": ("memory", '"disk", "error"'),
        "upper case": ("DISK", '"disk", "error"'),
        "boolean": (False, '"disk", "error"'),
        "unhashable": ([], '"disk", "error"'),
    },
    "INT8_CACHE": {"boolean": (False, '"hbm", "dram", "no"'), "other": ("yes", '"hbm", "dram", "no"')},
    "INT8_CACHE_NAME": {
        "text": ("w", "list of parameter names"),
        "number": ([1], "list of parameter names"),
        "empty name": (["w", ""], "list of parameter names"),
    },
    "OUTPUT_PREFIX": {"empty": ("", TEXT), "boolean": (True, TEXT)},
    "REPORT_PREFIX": {"null": (None, TEXT), "empty": ("", TEXT), "object": ({}, TEXT)},
}

KEYS = [*VALID, "CONFIG_FILE"]


def rows(table: dict[str, dict[str, tuple[Any, Any]]]) -> list[Any]:
    return [
        pytest.param(key, *row, id=f"{key} {case}".replace(" ", "-"))
        for key, cases in table.items()
        for case, row in cases.items()
    ]


def written(directory: Path, content: object) -> str:
    return written_text(directory, json.dumps(content))


def written_text(directory: Path, text: str) -> str:
    path = directory / "netloader.json"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_tables_of_this_module_cover_every_key() -> None:
    keys = {field.name.upper() for field in dataclasses.fields(NetLoaderConfig)}
    assert set(VALID) == keys
    assert set(INVALID) == keys


def test_without_keys_every_value_is_the_default() -> None:
    assert NetLoaderConfig.parse({}) == NetLoaderConfig(
        source=(),
        model=None,
        listen_host=None,
        listen_port=None,
        serve=True,
        transport=None,
        connect_timeout=10.0,
        stall_timeout=30.0,
        wait_timeout=300.0,
        verify=True,
        max_clients=8,
        max_bandwidth=None,
        token_file=None,
        tls_cert=None,
        tls_key=None,
        tls_ca=None,
        fallback="disk",
        int8_cache="no",
        int8_cache_name=None,
        output_prefix=None,
        report_prefix=None,
    )


@pytest.mark.parametrize(("key", "value", "expected"), rows(VALID))
def test_an_allowed_value_is_taken_and_leaves_the_others_at_their_defaults(key: str, value: Any, expected: Any) -> None:
    beside = required_beside(key)
    config = NetLoaderConfig.parse({**beside, key: value})
    assert config == dataclasses.replace(NetLoaderConfig.parse(beside), **{key.lower(): expected})
    assert type(getattr(config, key.lower())) is type(expected)


@pytest.mark.parametrize(("key", "value", "allowed"), rows(INVALID))
def test_a_wrong_value_is_refused_with_the_key_the_value_and_what_is_allowed(
    key: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({key: value})
    text = str(caught.value)
    assert text.startswith(f"Netloader key {key} has the value {value!r}: ")
    assert allowed in text
    assert ("upstream's Netloader" in text) == (key in UPSTREAM)


@pytest.mark.parametrize("value", ["", 7, [], {}], ids=repr)
def test_a_config_file_that_is_no_path_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"Netloader key CONFIG_FILE has the value .*: expected a non-empty string"):
        NetLoaderConfig.parse({"CONFIG_FILE": value})


def test_a_config_file_that_is_null_is_none(tmp_path: Path) -> None:
    assert NetLoaderConfig.parse({"CONFIG_FILE": None, "MODEL": "m"}) == NetLoaderConfig(model="m")


def test_a_key_that_is_null_in_the_config_file_is_absent_there(tmp_path: Path) -> None:
    path = written(tmp_path, {"MODEL": None, "LISTEN_PORT": 2})
    config = NetLoaderConfig.parse({"MODEL": "from-command-line", "CONFIG_FILE": path})
    assert (config.model, config.listen_port) == ("from-command-line", 2)


def test_a_config_error_is_a_value_error_of_netloader() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, NetloaderError)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    {
        "SORUCE": "SOURCE",
        "source": "SOURCE",
        "SOURCES": "SOURCE",
        "listen_port": "LISTEN_PORT",
        "LISTENPORT": "LISTEN_PORT",
        "LISTEN_HOSTS": "LISTEN_HOST",
        "STALL_TIME": "STALL_TIMEOUT",
        "connect-timeout": "CONNECT_TIMEOUT",
        "FALL_BACK": "FALLBACK",
        "INT8_CACHE_NAMES": "INT8_CACHE_NAME",
        "CONFIGFILE": "CONFIG_FILE",
        "Serve": "SERVE",
        "VERIFIED": "VERIFY",
        "MAX_CLIENT": "MAX_CLIENTS",
        "MAXBANDWIDTH": "MAX_BANDWIDTH",
        "WAIT_TIME": "WAIT_TIMEOUT",
        "TOKEN": "TOKEN_FILE",
        "TLS_CERTIFICATE": "TLS_CERT",
        "tls_key": "TLS_KEY",
    }.items(),
    ids=str,
)
def test_a_misspelt_key_names_the_nearest_one(misspelt: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({misspelt: "value"})
    assert str(caught.value) == (
        f"unknown Netloader key {misspelt!r} (value 'value'): did you mean {nearest}? (upstream's Netloader ignores it)"
    )


def test_a_key_like_no_other_gets_the_list_of_all_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({"zzz": None})
    assert f"unknown Netloader key 'zzz' (value None): known keys: {', '.join(sorted(KEYS))} " in str(caught.value)


@pytest.mark.parametrize("value", [None, "SERVE", ["SERVE"], 3, True], ids=repr)
def test_a_configuration_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"--model-loader-extra-config is .*: expected a JSON object"):
        NetLoaderConfig.parse(value)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetLoaderConfig().serve = False  # type: ignore[misc]


def test_parsing_leaves_the_given_mapping_alone(tmp_path: Path) -> None:
    extra_config = {"CONFIG_FILE": written(tmp_path, {"MODEL": "m"}), "SERVE": False}
    before = dict(extra_config)
    NetLoaderConfig.parse(extra_config)
    assert extra_config == before


def test_the_keys_of_the_config_file_win_and_the_others_stay(tmp_path: Path) -> None:
    path = written(tmp_path, {"MODEL": "from-file", "LISTEN_PORT": 2})
    config = NetLoaderConfig.parse({"MODEL": "from-command-line", "SERVE": False, "CONFIG_FILE": path})
    assert (config.model, config.listen_port, config.serve) == ("from-file", 2, False)


def test_a_config_file_may_be_empty_of_keys(tmp_path: Path) -> None:
    assert NetLoaderConfig.parse({"CONFIG_FILE": written(tmp_path, {})}) == NetLoaderConfig()


def test_a_config_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "missing.json")
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({"CONFIG_FILE": path})
    assert str(caught.value) == (
        f"CONFIG_FILE {path!r} cannot be read: No such file or directory "
        "(upstream's Netloader takes the keys beside it)"
    )
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_config_file_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        NetLoaderConfig.parse({"CONFIG_FILE": str(tmp_path)})


def test_a_config_file_below_a_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        NetLoaderConfig.parse({"CONFIG_FILE": f"{path}/netloader.json"})


@pytest.mark.parametrize(
    "content", ["", "SERVE = true", "{'SERVE': true}", '{"SERVE": true', "{} {}"], ids=lambda text: text or "empty"
)
def test_a_config_file_that_is_not_json_is_refused(tmp_path: Path, content: str) -> None:
    path = written_text(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({"CONFIG_FILE": path})
    assert str(caught.value).startswith(f"CONFIG_FILE {path!r} is not JSON: ")


def test_a_config_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "netloader.json"
    path.write_bytes(b'{"MODEL": "\xff"}')
    with pytest.raises(ConfigError, match="is not JSON: 'utf-8' codec can't decode"):
        NetLoaderConfig.parse({"CONFIG_FILE": str(path)})


def test_a_config_file_nested_beyond_measure_is_refused(tmp_path: Path) -> None:
    path = written_text(tmp_path, "[" * 100_000)
    with pytest.raises(ConfigError, match="CONFIG_FILE"):
        NetLoaderConfig.parse({"CONFIG_FILE": path})


@pytest.mark.parametrize("content", [[], None, "SERVE", 3], ids=repr)
def test_a_config_file_that_holds_no_object_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({"CONFIG_FILE": written(tmp_path, content)})
    assert f"holds {content!r}: expected a JSON object of Netloader keys" in str(caught.value)


def test_a_config_file_may_not_name_another(tmp_path: Path) -> None:
    path = written(tmp_path, {"CONFIG_FILE": "other.json"})
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({"CONFIG_FILE": path})
    assert str(caught.value) == f"CONFIG_FILE {path!r} names another CONFIG_FILE: only one level is allowed"


def test_keys_in_the_config_file_are_checked_like_all_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown Netloader key 'SERV' \(value True\): did you mean SERVE\?"):
        NetLoaderConfig.parse({"CONFIG_FILE": written(tmp_path, {"SERV": True})})
    with pytest.raises(ConfigError, match="Netloader key SERVE has the value 1: expected true or false"):
        NetLoaderConfig.parse({"CONFIG_FILE": written(tmp_path, {"SERVE": 1})})


def test_a_rank_may_ask_its_own_sources_and_those_for_all_in_configured_order() -> None:
    config = NetLoaderConfig.parse(
        {
            "SOURCE": [
                {"device_id": 1, "sources": ["one:1"]},
                "all:1",
                {"device_id": 0, "sources": ["zero:1", "zero:2"]},
                "all:2",
            ]
        }
    )
    assert config.sources_for(0) == (("all", 1), ("zero", 1), ("zero", 2), ("all", 2))
    assert config.sources_for(1) == (("one", 1), ("all", 1), ("all", 2))
    assert config.sources_for(2) == (("all", 1), ("all", 2))


def test_a_source_that_is_named_twice_is_asked_once() -> None:
    config = NetLoaderConfig.parse({"SOURCE": ["a:1", "b:1", "a:1", {"device_id": 0, "sources": ["b:1", "a:1"]}]})
    assert config.sources_for(0) == (("a", 1), ("b", 1))


def test_every_rank_listens_on_a_port_of_its_own_above_the_configured_one() -> None:
    config = NetLoaderConfig.parse({"LISTEN_PORT": 65528})
    assert [config.listen_port_for(rank) for rank in range(8)] == list(range(65528, 65536))


def test_without_a_listen_port_every_rank_takes_an_ephemeral_one() -> None:
    assert [NetLoaderConfig().listen_port_for(rank) for rank in (0, 7, 70_000)] == [0, 0, 0]


def test_a_listen_port_that_ends_above_the_last_port_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse({"LISTEN_PORT": 65528}).listen_port_for(8)
    assert str(caught.value) == "LISTEN_PORT 65528 + rank 8 = 65536 is above 65535: choose a lower LISTEN_PORT"


@pytest.mark.parametrize(
    "missing",
    ["TLS_CERT", "TLS_KEY", "TLS_CA", "TLS_CERT and TLS_KEY", "TLS_CERT and TLS_CA", "TLS_KEY and TLS_CA"],
)
def test_a_part_of_tls_is_refused_with_what_is_missing(missing: str) -> None:
    given = {key: value for key, value in TLS.items() if key not in missing.split(" and ")}
    with pytest.raises(ConfigError) as caught:
        NetLoaderConfig.parse(given)
    assert str(caught.value) == f"{missing} missing: TLS needs TLS_CERT, TLS_KEY, TLS_CA, all three on every instance"


def test_tls_may_be_divided_between_the_command_line_and_the_config_file(tmp_path: Path) -> None:
    path = written(tmp_path, {"TLS_KEY": "key.pem"})
    config = NetLoaderConfig.parse({"TLS_CERT": "cert.pem", "TLS_CA": "authority.pem", "CONFIG_FILE": path})
    assert (config.tls_cert, config.tls_key, config.tls_ca) == ("cert.pem", "key.pem", "authority.pem")
    assert config.transports_for("cpu") == ("shared_memory", "tcp")


def test_under_tls_no_transport_is_taken_by_default_whose_bytes_could_be_read_on_the_way() -> None:
    assert NetLoaderConfig.parse(TLS).transports_for("cpu") == ("shared_memory", "tcp")


def test_under_tls_the_transports_are_those_that_the_configuration_names() -> None:
    transport = ["process_group", "tcp"]
    assert NetLoaderConfig.parse({**TLS, "TRANSPORT": transport}).transports_for("cpu") == tuple(transport)


@pytest.mark.parametrize("access", [{}, {"TOKEN_FILE": "token"}, TLS], ids=["anybody", "token", "TLS"])
def test_between_cpus_no_ports_of_a_library_are_opened_by_default(access: dict[str, str]) -> None:
    assert NetLoaderConfig.parse(access).transports_for("cpu") == ("shared_memory", "tcp")
    asked_for = NetLoaderConfig.parse({**access, "TRANSPORT": ["process_group"]})
    assert asked_for.transports_for("cpu") == ("process_group",)


def test_weights_on_an_npu_go_by_process_groups_first_and_never_by_shared_memory() -> None:
    assert NetLoaderConfig().transports_for("npu") == ("process_group", "tcp")
    assert NetLoaderConfig.parse({"TOKEN_FILE": "token"}).transports_for("npu") == ("process_group", "tcp")
    assert NetLoaderConfig.parse(TLS).transports_for("npu") == ("tcp",)
    assert NetLoaderConfig.parse({"TRANSPORT": ["shared_memory", "tcp"]}).transports_for("npu") == ("tcp",)


def used_by(config: NetLoaderConfig, device: str) -> list[traits.Traits]:
    return [traits.traits_of(name, device) for name in config.transports_for(device)]


@pytest.mark.parametrize(
    ("device", "keys", "relays"),
    [
        ("cpu", {}, True),
        ("cpu", {"RELAY": False}, False),
        ("npu", {}, False),
        ("npu", {"RELAY": True}, True),
        ("npu", {"TRANSPORT": ["tcp"]}, True),
        ("npu", {"TRANSPORT": ["tcp"], "RELAY": False}, False),
        ("npu", TLS, True),
        ("cuda", {}, True),
    ],
)
def test_weights_are_relayed_by_default_unless_hccl_carries_them(
    device: str, keys: dict[str, Any], relays: bool
) -> None:
    config = NetLoaderConfig.parse(keys)
    assert config.relays_by(used_by(config, device)) is relays


SOURCES = {"SOURCE": ["a:1", "b:1", "c:1", "d:1", "e:1"]}


@pytest.mark.parametrize(
    ("keys", "ports", "most"),
    [
        ({}, None, 16),
        (SOURCES, None, 9),
        ({"SOURCE": ["a:1"]}, None, 12),
        (SOURCES, "60000-60031", 25),
        (SOURCES, "60000-60015, 61000", 10),
        (SOURCES, "60000", 0),
    ],
)
def test_no_more_clients_than_hccl_has_ports_for(keys: dict[str, Any], ports: str | None, most: int) -> None:
    environment = {} if ports is None else {"HCCL_HOST_SOCKET_PORT_RANGE": ports}
    enough = NetLoaderConfig.parse({**keys, "MAX_CLIENTS": max(most, 1)})
    if most:
        enough.require_ports(used_by(enough, "npu"), environment)
    more = NetLoaderConfig.parse({**keys, "MAX_CLIENTS": most + 1})
    with pytest.raises(ConfigError, match=rf"MAX_CLIENTS has the value {most + 1}: HCCL .* at most {most}, more ports"):
        more.require_ports(used_by(more, "npu"), environment)
    for device, other in (("cpu", {}), ("npu", {"TRANSPORT": ["tcp"]}), ("npu", {"SERVE": False})):
        config = NetLoaderConfig.parse({**keys, **other, "MAX_CLIENTS": 256})
        config.require_ports(used_by(config, device), environment)


@pytest.mark.parametrize("ports", ["auto", "60000-", "any, 1"])
def test_what_ports_hccl_has_is_not_guessed(ports: str) -> None:
    config = NetLoaderConfig.parse({"MAX_CLIENTS": 256})
    config.require_ports(used_by(config, "npu"), {"HCCL_HOST_SOCKET_PORT_RANGE": ports})


@pytest.mark.parametrize("device", ["cuda", "xpu", "another"])
def test_weights_on_any_other_device_go_by_way_of_host_memory(device: str) -> None:
    assert NetLoaderConfig().transports_for(device) == ("tcp",)
    assert NetLoaderConfig.parse({"TRANSPORT": ["shared_memory", "tcp"]}).transports_for(device) == ("tcp",)
    for transport in (["process_group"], ["process_group", "tcp"], ["shared_memory"]):
        with pytest.raises(ConfigError, match=rf"TRANSPORT has .*weights on {device} devices are carried by tcp$"):
            NetLoaderConfig.parse({"TRANSPORT": transport}).transports_for(device)


def test_a_transport_list_of_no_use_on_the_device_is_refused_with_what_would_be() -> None:
    config = NetLoaderConfig.parse({"TRANSPORT": ["shared_memory"]})
    with pytest.raises(ConfigError, match=r'TRANSPORT has the value \["shared_memory"\].*npu.*process_group, tcp'):
        config.transports_for("npu")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "a\0b"])
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
almost_sources = st.lists(
    st.sampled_from(["a:1", "[::1]:2", "x"])
    | st.text()
    | st.fixed_dictionaries({"device_id": scalars, "sources": json_values}),
    max_size=3,
)
almost_right = st.one_of(*[st.sampled_from([value for value, _ in cases.values()]) for cases in VALID.values()])
json_objects = st.one_of(
    st.dictionaries(st.sampled_from(KEYS) | st.text(), json_values | almost_right, max_size=5),
    st.fixed_dictionaries({"SOURCE": almost_sources}),
)


@given(extra_config=json_objects)
@example(extra_config={"CONFIG_FILE": "\ud800"})
@example(extra_config={"CONFIG_FILE": "a\0b"})
@example(extra_config={"": None})
def test_every_json_object_is_either_taken_or_refused_with_a_config_error(extra_config: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        config = NetLoaderConfig.parse(extra_config)
        config.sources_for(0)
        hash(config)


@given(content=st.binary(max_size=64) | json_objects.map(lambda value: json.dumps(value).encode()))
def test_every_config_file_is_either_taken_or_refused_with_a_config_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        NetLoaderConfig.parse({"CONFIG_FILE": str(path)})

"""The JSON of ``--model-loader-extra-config``, parsed once at the start into a frozen value.

Each key has one parser, which returns the value, or raises ValueError saying what is allowed. Only a key that is absent
takes its default. An unknown key or a wrong value stops the start with an error that names the key, the value, and what
is allowed; for a misspelt key it names the nearest one.

Upstream's Netloader has some of these keys. What its users write is understood, null for an absent key too. Where it
would go on without a word, the error says with what, so that its users can choose that.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from vllm_ascend.model_loader.netloader import traits
from vllm_ascend.model_loader.netloader.endpoint import Endpoint, require_host
from vllm_ascend.model_loader.netloader.errors import ConfigError

SOURCES_AT_ONCE: Final = 4
"""Sources that a client asks beside each other."""
LEAST_LIMIT: Final = 1 << 20
"""Bytes per second. A lower MAX_BANDWIDTH would serve nobody."""


@dataclass(frozen=True)
class Source:
    """Where weights may be fetched. Only the rank `device_id` may ask there, or every rank where it is None."""

    endpoint: Endpoint
    device_id: int | None = None


@dataclass(frozen=True)
class NetLoaderConfig:
    """All settings of Netloader. A field is named as the key of the configuration, in lower case.

    Times are in seconds, and bandwidths in bytes per second.
    """

    source: tuple[Source, ...] = ()
    model: str | None = None
    listen_host: str | None = None
    listen_port: int | None = None
    serve: bool = True
    relay: bool | None = None
    cache: str = "auto"
    transport: tuple[str, ...] | None = None
    connect_timeout: float = 10.0
    stall_timeout: float = 30.0
    wait_timeout: float = 300.0
    verify: bool = True
    min_bandwidth: int = 64 << 10
    max_clients: int = 8
    max_bandwidth: int | None = None
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    fallback: str = "disk"
    int8_cache: str = "no"
    int8_cache_name: tuple[str, ...] | None = None
    output_prefix: str | None = None
    report_prefix: str | None = None

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> NetLoaderConfig:
        """Reads `extra_config`, and the file that its CONFIG_FILE may name, whose keys win. Raises ConfigError."""
        if not isinstance(extra_config, Mapping):
            raise ConfigError(f"--model-loader-extra-config is {extra_config!r}: expected a JSON object")
        values = _present(extra_config)
        if "CONFIG_FILE" in values:
            values |= _present(_read_config_file(values.pop("CONFIG_FILE")))
        parsed = {key.lower(): _parse_value(key, value) for key, value in values.items()}
        _require_whole_tls(parsed)
        return cls(**parsed)

    def transports_for(self, device: str) -> tuple[str, ...]:
        """The names of the transports, best first, for weights on a device of that type, as torch names it.

        Raises ConfigError where TRANSPORT has none that can carry them.
        """
        rows = traits.rows_for(device)
        if self.transport is None:
            under_tls = self.tls_cert is not None
            return tuple(row.name for row in rows if (row.used_under_tls if under_tls else row.used_in_clear))

        possible = [row.name for row in rows]
        usable = tuple(name for name in self.transport if name in possible)
        # Shared memory may be named for a whole fleet, but whoever names a library's transport means that library.
        needs_library = any(row.library for row in traits.TABLE if row.name in {*self.transport} - {*possible})
        if not usable or needs_library:
            raise ConfigError(
                f"Netloader key TRANSPORT has the value {json.dumps(self.transport)}: weights on {device} devices are "
                f"carried by {', '.join(possible)}"
            )
        return usable

    def relays_by(self, rows: Iterable[traits.Traits]) -> bool:
        """Whether weights are passed on while they are loaded, by all of these transports."""
        return self.relay if self.relay is not None else all(row.relays for row in rows)

    def require_ports(self, rows: Iterable[traits.Traits], environment: Mapping[str, str]) -> None:
        """Raises ConfigError where MAX_CLIENTS clients would need more ports than a transport's library has."""
        for row in rows:
            ports = traits.ports_in(row, environment)
            taken = min(len(self.source), SOURCES_AT_ONCE) + (row.peers or 0) if self.source else 0
            if self.serve and ports is not None and self.max_clients + taken > ports:
                raise ConfigError(
                    f"Netloader key MAX_CLIENTS has the value {self.max_clients}: {row.library.upper()} has {ports} "
                    f"ports on this host ({traits.PORT_RANGE}), one for each session, and this instance may take from "
                    f"{taken} others at once: expected at most {max(ports - taken, 0)}, more ports, or {row.name} left "
                    f"out of TRANSPORT"
                )

    def sources_for(self, rank: int) -> tuple[Endpoint, ...]:
        """The endpoints that `rank` may ask, each once, in the order of the configuration."""
        allowed = (source.endpoint for source in self.source if source.device_id in (None, rank))
        return tuple(dict.fromkeys(allowed))

    def listen_port_for(self, rank: int) -> int:
        """The port on which `rank` listens, 0 for an ephemeral one. Raises ConfigError where it is beyond 65535."""
        if self.listen_port is None:
            return 0
        port = self.listen_port + rank
        if port > 65535:
            raise ConfigError(
                f"LISTEN_PORT {self.listen_port} + rank {rank} = {port} is above 65535: choose a lower LISTEN_PORT"
            )
        return port


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None or key not in _UPSTREAM}


def _require_whole_tls(parsed: Mapping[str, Any]) -> None:
    """Raises ConfigError where some of the keys of TLS are set and others are not."""
    keys = ("TLS_CERT", "TLS_KEY", "TLS_CA")
    absent = [key for key in keys if key.lower() not in parsed]
    if 0 < len(absent) < len(keys):
        raise ConfigError(f"{' and '.join(absent)} missing: TLS needs {', '.join(keys)}, all three on every instance")


def _read_config_file(path: object) -> dict[str, Any]:
    location = _parse_value("CONFIG_FILE", path)
    try:
        content = json.loads(Path(location).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"CONFIG_FILE {location!r} cannot be read: {error.strerror}{_upstream('CONFIG_FILE')}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"CONFIG_FILE {location!r} is not JSON: {error}{_upstream('CONFIG_FILE')}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"CONFIG_FILE {location!r} holds {content!r}: expected a JSON object of Netloader keys")
    if "CONFIG_FILE" in content:
        raise ConfigError(f"CONFIG_FILE {location!r} names another CONFIG_FILE: only one level is allowed")
    return content


def _parse_value(key: str, value: object) -> Any:
    parser = _PARSERS.get(key)
    if parser is None:
        nearest = difflib.get_close_matches(str(key).upper(), _PARSERS, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(sorted(_PARSERS))}"
        raise ConfigError(f"unknown Netloader key {key!r} (value {value!r}): {hint} (upstream's Netloader ignores it)")
    try:
        return parser(value)
    except ValueError as error:
        raise ConfigError(f"Netloader key {key} has the value {value!r}: {error}{_upstream(key)}") from error


def _upstream(key: str) -> str:
    """What upstream's Netloader does where the value of its `key` is an error here; nothing of other keys."""
    return f" (upstream's Netloader {_UPSTREAM[key]})" if key in _UPSTREAM else ""


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a non-empty string")
    return value


def _host(value: object) -> str:
    host = _text(value)
    require_host(host)
    return host


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _port(value: object) -> int:
    port = int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,5}", value) else value
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise ValueError("expected a port number from 1 to 65535, or no such key for an ephemeral port")
    return port


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 86400:
        raise ValueError("expected a number of seconds above 0 and at most 86400")
    return float(value)


def _on_or_off(value: object) -> bool:
    if value not in ("on", "off"):
        raise ValueError('expected "on" or "off"')
    return value == "on"


def _integer(lowest: int, highest: int, unit: str) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            raise ValueError(f"expected a number of {unit} from {lowest} to {highest}")
        return value

    return parse


def _one_of(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"expected one of {', '.join(json.dumps(choice) for choice in allowed)}")
        return value

    return parse


def _cache(value: object) -> str:
    if value not in ("auto", "off") and not (isinstance(value, str) and value.startswith("/")):
        raise ValueError('expected "auto", "off", or the absolute path of the socket of a cache')
    return str(value)


def _cache_place(value: object) -> str:
    return _one_of("hbm", "dram", "no")(value.lower() if isinstance(value, str) else value)


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("expected a list of parameter names")
    return tuple(value)


def _transports(value: object) -> tuple[str, ...]:
    allowed = f"expected a non-empty list, best first and each once, out of {', '.join(traits.NAMES)}"
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(allowed)
    if not set(value) <= set(traits.NAMES) or len(set(value)) != len(value):
        raise ValueError(allowed)
    return tuple(value)


def _sources(value: object) -> tuple[Source, ...]:
    if not isinstance(value, list):
        raise ValueError('expected a list of "host:port", or of {"device_id": rank, "sources": ["host:port", ...]}')
    return tuple(source for position, item in enumerate(value) for source in _source_item(position, item))


def _source_item(position: int, item: object) -> list[Source]:
    if isinstance(item, str):
        return [Source(Endpoint.parse(item))]
    if not isinstance(item, dict) or set(item) | {"sources"} != {"device_id", "sources"}:
        raise ValueError(f'item {position} is {item!r}: expected "host:port" or {{"device_id": ..., "sources": [...]}}')
    device_id, endpoints = item["device_id"], item.get("sources")
    if not isinstance(device_id, int) or isinstance(device_id, bool) or device_id < 0:
        raise ValueError(f"item {position} has device_id {device_id!r}: expected a rank, 0 or more")
    if endpoints is None:
        return []
    if not isinstance(endpoints, list) or not all(isinstance(endpoint, str) for endpoint in endpoints):
        raise ValueError(f'item {position} has sources {endpoints!r}: expected a list of "host:port"')
    return [Source(Endpoint.parse(endpoint), device_id) for endpoint in endpoints]


_PARSERS: Final[dict[str, Callable[[object], Any]]] = {
    "SOURCE": _sources,
    "MODEL": _text,
    "LISTEN_HOST": _host,
    "LISTEN_PORT": _port,
    "SERVE": _boolean,
    "RELAY": _boolean,
    "CACHE": _cache,
    "TRANSPORT": _transports,
    "CONNECT_TIMEOUT": _seconds,
    "STALL_TIMEOUT": _seconds,
    "WAIT_TIMEOUT": _seconds,
    "VERIFY": _on_or_off,
    "MIN_BANDWIDTH": _integer(0, 1 << 50, "bytes per second"),
    "MAX_CLIENTS": _integer(1, 256, "clients"),
    "MAX_BANDWIDTH": _integer(LEAST_LIMIT, 1 << 50, "bytes per second"),
    "TOKEN_FILE": _text,
    "TLS_CERT": _text,
    "TLS_KEY": _text,
    "TLS_CA": _text,
    "FALLBACK": _one_of("disk", "error"),
    "INT8_CACHE": _cache_place,
    "INT8_CACHE_NAME": _names,
    "OUTPUT_PREFIX": _text,
    "REPORT_PREFIX": _text,
    "CONFIG_FILE": _text,
}

_UPSTREAM: Final = {
    "SOURCE": "skips what it does not understand",
    "MODEL": "takes the model's path",
    "LISTEN_PORT": "takes a free port for what is no number, and serves nothing where a number is too low or too high",
    "INT8_CACHE": 'takes "no"',
    "INT8_CACHE_NAME": "takes all int8 parameters for what is no list",
    "OUTPUT_PREFIX": "writes no file",
    "CONFIG_FILE": "takes the keys beside it",
}
"""The keys of upstream's Netloader, and what it does with a value that is an error here."""

assert {key.lower() for key in _PARSERS} - {"config_file"} == {field.name for field in fields(NetLoaderConfig)}

"""The configuration file: TOML in, checked `Settings` out, or one clear line for each thing wrong.

The models below are the reference of what the file may say; pydantic does the checking.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import ssl
import stat
import tomllib
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .core.limits import Bounds
from .core.policy import Action, Policy, Prefix, Rule, Zones
from .core.session import Application
from .core.settings import DEFAULT_TIMEOUTS, PassThrough, Settings, TransitPorts, UnknownSpi

DEFAULT_PATH = Path("/etc/fwd/fwd.toml")

_ANY = "any"
_Item = TypeVar("_Item")


def _socket_path(path: str) -> str:
    if not path.startswith("/") or path.endswith("/") or "\0" in path or len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise ValueError(f"found {_shown(path)}; want a path from / on, with {_SUN_PATH_BYTES} bytes at most")
    return path


def _state_path(path: str) -> str:
    if path and (not path.startswith("/") or path.endswith("/") or "\0" in path):
        raise ValueError(f"found {_shown(path)}; want a file's path from / on, or nothing")
    return path


def _listen_address(text: str) -> str:
    if text.startswith("/"):
        return _socket_path(text)
    if text:
        try:
            _, address, _ = _endpoint(f"tcp:{text}", ("tcp",))
        except ValueError:
            raise ValueError(
                f"found {_shown(text)}; want 127.0.0.1:9469, [::1]:9469, or a unix socket's path from / on; or nothing"
            ) from None
        if not ip_address(address).is_loopback:
            raise ValueError(
                f"found {_shown(text)}, which others could reach, and there is no password; want a loopback address"
                " such as 127.0.0.1:9469, and in front of it a reverse proxy that asks for one, or an ssh tunnel"
                " (ssh -L 9469:127.0.0.1:9469 this-host)"
            )
    return text


def _file_path(path: str) -> str:
    if path and (not path.startswith("/") or "\0" in path):
        raise ValueError(f"found {_shown(path)}; want a file's path from / on, or nothing")
    return path


def _syslog_server(text: str) -> str:
    if text:
        _endpoint(text, ("udp", "tcp", "tls"))
    return text


def _endpoint(text: str, transports: Sequence[str]) -> tuple[str, str, int]:
    """Transport, address and port, as in udp:192.0.2.9:4739 and tcp:[2001:db8::9]:4739. Raises ValueError."""
    parts = re.fullmatch(r"([a-z]+):(?:\[([0-9A-Fa-f:.]+)\]|([0-9.]+)):([0-9]{1,5})", text)
    if parts is not None:
        transport, v6, v4, port = parts.groups()
        with contextlib.suppress(ValueError):
            address = str(IPv6Address(v6) if v6 else IPv4Address(v4))
            if transport in transports and 0 < int(port) < 65536:
                return transport, address, int(port)
    forms = " or ".join(f"{transport}:ADDRESS:PORT" for transport in transports)
    raise ValueError(
        f"found {_shown(text)}; want {forms}, with an address and no name, such as"
        f" {transports[0]}:192.0.2.9:4739 or {transports[-1]}:[2001:db8::9]:4739"
    )


def _prefix(text: str) -> str:
    if text != _ANY:
        try:
            _network(text)
        except ValueError as error:
            raise ValueError(
                f"found {_shown(text)}; want an address or a prefix such as 192.0.2.0/24 ({error})"
            ) from None
    return text


def _network(text: str) -> IPv4Network | IPv6Network:
    return (IPv6Network if ":" in text else IPv4Network)(text)


def _not_empty(items: list[_Item]) -> list[_Item]:
    if not items:
        raise ValueError("found []; want one entry at least: to match everything, leave the key out or write 'any'")
    return items


Name = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Interface = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s/]+$")]
Seconds = Annotated[int, Field(ge=1, le=604800)]
SocketPath = Annotated[str, AfterValidator(_socket_path)]
#: What a rule matches by: at least one.
Matches = Annotated[list[_Item], AfterValidator(_not_empty)]
Prefixes = Matches[Annotated[str, AfterValidator(_prefix)]]

#: What sun_path holds beside the zero at its end (unix(7)).
_SUN_PATH_BYTES = 107


class ConfigError(Exception):
    """The configuration will not do; each line of the message names file, key, what was found and is wanted."""


class Section(BaseModel):
    """A table of the file: keys are written with dashes, and unknown ones are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=lambda name: name.rstrip("_").replace("_", "-"),
    )


class Dataplane(Section):
    """How packets come to fwd, and how many sessions it holds."""

    queue: int = Field(default=20, ge=0, le=65535)
    queue_length: int = Field(default=4096, ge=16, le=65536)
    fail: Literal["open", "closed"] = "open"
    fast_path: Literal["auto", "off"] = "auto"
    backend: Literal["auto", "nft", "nft-xt", "iptables-mark", "iptables"] = "auto"
    max_sessions: int = Field(default=65536, ge=16, le=1_000_000)
    keep_ended: int = Field(default=4096, ge=0, le=1_000_000)
    keep_ended_time: Seconds = 300
    unknown_spi: Literal["generic", "discard"] = "generic"
    unknown_spi_grace: Seconds = 5
    transit_ports: Literal["generic", "spi"] = "generic"
    ipsec_pass_through: Literal["always", "ike-gated"] = "always"
    ike_gate_time: Seconds = 14400
    tunnel_silent_after: Seconds = 60


class Timeouts(Section):
    """Seconds without a packet after which a session of an application ends."""

    ipsec_esp: Seconds = DEFAULT_TIMEOUTS[Application.IPSEC_ESP]
    ipsec_udp: Seconds = DEFAULT_TIMEOUTS[Application.IPSEC_UDP]
    ipsec_esp_udp: Seconds = DEFAULT_TIMEOUTS[Application.IPSEC_ESP_UDP]
    ike: Seconds = DEFAULT_TIMEOUTS[Application.IKE]
    discard: Seconds = 60


class Ageing(Section):
    """From which table use on (percent) sessions age how many times as fast."""

    threshold: int = Field(default=80, ge=1, le=100)
    factor: int = Field(default=2, ge=1, le=16)


class Limits(Section):
    """How many sessions a packet from outside may open; announced tunnels are under no limit. 0: no limit."""

    source: int = Field(default=8192, ge=0, le=1_000_000)
    peers: int = Field(default=4096, ge=0, le=1_000_000)
    half_open: int = Field(default=50, ge=0, le=100)


class RuleSection(Section):
    """One rule; a field left out, or `any` in it, matches everything."""

    name: Name
    from_: Matches[Name] = [_ANY]
    to: Matches[Name] = [_ANY]
    source: Prefixes = [_ANY]
    destination: Prefixes = [_ANY]
    application: Matches[Literal["ipsec-esp", "ipsec-udp", "ipsec-esp-udp", "ike", "any"]] = ["any"]
    action: Literal["allow", "deny"]
    log_at_end: bool = True
    log_at_start: bool = False
    inspect: Literal["first-packet", "every-packet"] = "first-packet"

    def build(self) -> Rule:
        """The rule as the core wants it."""
        return Rule(
            self.name,
            Action(self.action),
            self.log_at_end,
            self.log_at_start,
            _unless_any(self.from_),
            _unless_any(self.to),
            _prefixes(self.source),
            _prefixes(self.destination),
            _unless_any(self.application),
            self.inspect == "every-packet",
        )


class DefaultRule(Section):
    """What happens to a session that no rule matches."""

    name: Name = "interzone-default"
    action: Literal["allow", "deny"] = "deny"
    log_at_end: bool = False
    log_at_start: bool = False


class Vici(Section):
    """Where strongSwan listens."""

    socket: SocketPath = "/run/charon.vici"


class Control(Section):
    """Where fwctl asks, and who may. root and the user that fwd runs as may do everything."""

    socket: SocketPath = "/run/fwd/control.sock"
    read_groups: list[Name] = ["fwd"]
    change_groups: list[Name] = []


class Metrics(Section):
    """Metrics for Prometheus, over HTTP: where, if anywhere, and for how many tunnels one by one."""

    listen: Annotated[str, AfterValidator(_listen_address)] = Field(
        default="",
        description="a loopback address and port (127.0.0.1:9469, [::1]:9469), which every user of this host can ask;"
        ' or the path of a unix socket, which [control] read-groups may; "": nowhere',
    )
    tunnels: int = Field(
        default=256,
        ge=0,
        le=4096,
        description='tunnels with series of their own; all others together are tunnel="other"',
    )

    @property
    def address(self) -> Path | tuple[str, int] | None:
        """Where to listen: a unix socket's path, an address and port, or nowhere."""
        if not self.listen:
            return None
        return Path(self.listen) if self.listen.startswith("/") else _endpoint(f"tcp:{self.listen}", ("tcp",))[1:]


class State(Section):
    """Where fwd keeps what a successor goes on with, however it ends; an empty `file` keeps nothing."""

    file: Annotated[str, AfterValidator(_state_path)] = "/run/fwd/state"


class TrafficLog(Section):
    """Where each session that ended leaves a record, if its rule says `log-at-end`, and how many are kept."""

    file: Annotated[str, AfterValidator(_state_path)] = Field(
        default="/var/log/fwd/traffic", description='an SQLite file; "" keeps no log, and nothing is sent to syslog'
    )
    max_size: int = Field(default=1024, ge=1, le=1_000_000, description="MiB; the oldest records make room")
    max_age: int = Field(default=90, ge=1, le=36500, description="days; older records go")
    journal: bool = Field(default=False, description="also send each record to the journal, with fields")


class Syslog(Section):
    """To which server the records of the traffic log go, in the order of PAN-OS's traffic log."""

    server: Annotated[str, AfterValidator(_syslog_server)] = Field(
        default="", description='"udp:192.0.2.9:514", "tcp:...", "tls:[2001:db8::9]:6514"; "": none'
    )
    format: Literal["bsd", "ietf"] = Field(default="bsd", description="RFC 3164 or RFC 5424")
    facility: Literal["user", "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7"] = "user"
    tls_ca: Annotated[str, AfterValidator(_file_path)] = Field(
        default="", description="who signed the server's certificate (PEM); \"\": the system's authorities"
    )
    tls_name: str = Field(default="", description='the name in the certificate; "": the address')
    tls_certificate: Annotated[str, AfterValidator(_file_path)] = Field(
        default="", description="fwd's own certificate, for a server that wants one (PEM)"
    )
    tls_key: Annotated[str, AfterValidator(_file_path)] = Field(default="", description="its key (PEM)")

    @property
    def endpoint(self) -> tuple[str, str, int] | None:
        """Transport, address and port of the server; None: there is none."""
        return _endpoint(self.server, ("udp", "tcp", "tls")) if self.server else None

    def tls_context(self) -> ssl.SSLContext:
        """What a TLS connection to the server is made with. Raises OSError if a file will not do."""
        context = ssl.create_default_context(cafile=self.tls_ca or None)
        if self.tls_certificate:
            context.load_cert_chain(self.tls_certificate, self.tls_key or None)
        return context


class Log(Section):
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section):
    """The whole file."""

    dataplane: Dataplane = Dataplane()
    zones: dict[Name, list[Interface]] = {}
    default_zone: Name = _ANY
    rules: list[RuleSection] = Field(default_factory=lambda: [RuleSection(name="any-any", action="allow")])
    default_rule: DefaultRule = DefaultRule()
    timeouts: Timeouts = Timeouts()
    ageing: Ageing = Ageing()
    limits: Limits = Limits()
    vici: Vici = Vici()
    control: Control = Control()
    metrics: Metrics = Metrics()
    state: State = State()
    traffic_log: TrafficLog = TrafficLog()
    syslog: Syslog = Syslog()
    log: Log = Log()

    @model_validator(mode="after")
    def _zones_agree(self) -> Config:
        if _ANY in self.zones:
            raise ValueError("zones.any: found a zone 'any', which means every zone; want another name")
        zone_of: dict[str, str] = {}
        for zone, patterns in self.zones.items():
            for pattern in patterns:
                if zone_of.setdefault(pattern, zone) != zone:
                    raise ValueError(
                        f"zones.{zone}: found '{pattern}', which zone '{zone_of[pattern]}' has; want it in one zone"
                    )
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        known = {*self.zones, self.default_zone, _ANY}
        seen = {self.default_rule.name}
        for index, rule in enumerate(self.rules):
            if rule.name in seen:
                raise ValueError(f"rules.{index}.name: found '{rule.name}' twice; want a name of its own")
            seen.add(rule.name)
            for key, zones in (("from", rule.from_), ("to", rule.to)):
                for zone in zones:
                    if zone not in known:
                        wanted = ", ".join(sorted(known))
                        raise ValueError(f"rules.{index}.{key}: found zone '{zone}'; want one of {wanted}")
        return self

    def settings(self) -> Settings:
        """What of it concerns the core."""
        plane = self.dataplane
        default = self.default_rule
        return Settings(
            policy=Policy(
                tuple(rule.build() for rule in self.rules),
                Rule(default.name, Action(default.action), default.log_at_end, default.log_at_start),
            ),
            zones=Zones(
                [(pattern, zone) for zone, patterns in self.zones.items() for pattern in patterns],
                self.default_zone,
            ),
            timeouts_s={app: getattr(self.timeouts, app.name.lower()) for app in Application},
            discard_timeout_s=self.timeouts.discard,
            max_sessions=plane.max_sessions,
            ageing_threshold=self.ageing.threshold / 100,
            ageing_factor=self.ageing.factor,
            keep_ended=plane.keep_ended,
            keep_ended_s=plane.keep_ended_time,
            unknown_spi=UnknownSpi(plane.unknown_spi),
            unknown_spi_grace_s=plane.unknown_spi_grace,
            transit_ports=TransitPorts(plane.transit_ports),
            pass_through=PassThrough(plane.ipsec_pass_through),
            ike_gate_s=plane.ike_gate_time,
            tunnel_silent_s=plane.tunnel_silent_after,
            tunnel_totals=self.metrics.tunnels,
            limits=Bounds(
                source=self.limits.source,
                peers=self.limits.peers,
                half_open=-(-plane.max_sessions * self.limits.half_open // 100),
            ),
        )

    def restart_keys(self) -> dict[str, object]:
        """The keys that only a start reads, with their values."""
        return {
            "dataplane.queue": self.dataplane.queue,
            "dataplane.queue-length": self.dataplane.queue_length,
            "dataplane.backend": self.dataplane.backend,
            "vici.socket": self.vici.socket,
            "control.socket": self.control.socket,
            "state.file": self.state.file,
            "traffic-log": self.traffic_log,
            "syslog": self.syslog,
        }


def load(path: Path | None) -> Config:
    """Read and check a file; None means DEFAULT_PATH, which need not exist. Raises ConfigError."""
    source = path or DEFAULT_PATH
    try:
        return Config.model_validate(tomllib.loads(_text(source)))
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            return Config()
        raise ConfigError(f"{source}: {error.strerror}: give --config a file that can be read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: byte {error.start} is not UTF-8, which TOML wants") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not TOML: {error}") from None
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {line}" for line in explain(error, Config))) from None
    except RecursionError:
        raise ConfigError(f"{source}: arrays or tables are nested too deeply") from None
    except ValueError:  # of all that TOML can say, Python's int() only takes offence at this
        raise ConfigError(f"{source}: a number has too many digits") from None


def _text(path: Path) -> str:
    """What is in a file, and in nothing that one may have to wait for. Raises OSError or UnicodeDecodeError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file")
        return file.read()


def explain(error: ValidationError, model: type[BaseModel]) -> Iterable[str]:
    """What pydantic found wrong in a model, a line each: the key, what was found, what is wanted."""
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "value_error":  # raised by a validator here; one of the whole file names the key itself
            message = str(problem["ctx"]["error"])
            yield f"{key}: {message}" if key else message
        elif problem["type"] == "extra_forbidden":
            *section, name = problem["loc"]
            yield f"{key}: no such key here; {_instead(str(name), _keys(model, section))}"
        elif problem["type"] == "missing":
            yield f"{key}: missing; it has no default"
        else:
            wanted = (
                problem["msg"].replace("Input should be", "want").replace("String should", "want a string that can")
            )
            yield f"{key}: found {_shown(problem['input'])}; {wanted}"


def _keys(model: type[BaseModel], path: Iterable[int | str]) -> Sequence[str]:
    """The keys that there are at this place of a model."""
    for part in path:
        if isinstance(part, str):  # else it is one of a list
            annotation = next(f.annotation for name, f in model.model_fields.items() if part in (f.alias, name))
            kinds = (annotation, *get_args(annotation))
            model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [field.alias or name for name, field in model.model_fields.items()]


def _instead(name: str, keys: Sequence[str]) -> str:
    there = f"there are: {', '.join(keys)}" if keys else "there are none"
    near = difflib.get_close_matches(name, keys, 1)
    return f"did you mean '{near[0]}'? {there}" if near else there


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return "too much to show"
    return text if len(text) <= 80 else text[:77] + "..."


def _unless_any(names: Iterable[str]) -> frozenset[str]:
    chosen = frozenset(names)
    return frozenset() if _ANY in chosen else chosen


def _prefixes(texts: list[str]) -> tuple[Prefix, ...]:
    """The prefixes named; none at all if one of them is `any`."""
    networks = [] if _ANY in texts else map(_network, texts)
    return tuple(Prefix(network.network_address.packed, network.prefixlen) for network in networks)

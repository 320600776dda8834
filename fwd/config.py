"""The configuration file: TOML in, checked `Settings` out, or one clear line for each thing wrong.

The models below are the reference of what the file may say: pydantic checks a file against them, and
`fwd --print-default-config` (reference.py) prints them with their docstrings and descriptions as comments.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import stat
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from . import toml_lines
from .core.limits import Bounds
from .core.policy import Action, Policy, Prefix, Rule, Zones
from .core.session import Application
from .core.settings import DEFAULT_TIMEOUTS, PassThrough, Settings, TransitPorts, UnknownSpi
from .schema import AtStart, Disagreement, Place, Section, in_words, keys, nearest, problems, shown

DEFAULT_PATH = Path("/etc/fwd/fwd.toml")

_ANY = "any"
_Item = TypeVar("_Item")


def _socket_path(path: str) -> str:
    if not path.startswith("/") or path.endswith("/") or "\0" in path or len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise ValueError(f"found {shown(path)}; want a path from / on, with {_SUN_PATH_BYTES} bytes at most")
    return path


def _state_path(path: str) -> str:
    if path and (not path.startswith("/") or path.endswith("/") or "\0" in path):
        raise ValueError(f"found {shown(path)}; want a file's path from / on, or nothing")
    return path


def _listen_address(text: str) -> str:
    if text.startswith("/"):
        return _socket_path(text)
    if text:
        try:
            _, address, _ = _endpoint(f"tcp:{text}", ("tcp",))
        except ValueError:
            raise ValueError(
                f"found {shown(text)}; want 127.0.0.1:9469, [::1]:9469, or a unix socket's path from / on; or nothing"
            ) from None
        if not ip_address(address).is_loopback:
            raise ValueError(
                f"found {shown(text)}, which others could reach, and there is no password; want a loopback address"
                " such as 127.0.0.1:9469, and in front of it a reverse proxy that asks for one, or an ssh tunnel"
                " (ssh -L 9469:127.0.0.1:9469 this-host)"
            )
    return text


def _file_path(path: str) -> str:
    if path and (not path.startswith("/") or "\0" in path):
        raise ValueError(f"found {shown(path)}; want a file's path from / on, or nothing")
    return path


def _syslog_server(text: str) -> str:
    if text:
        _endpoint(text, ("udp", "tcp", "tls"))
    return text


def _collector(text: str) -> str:
    if text:
        _endpoint(text, ("udp", "tcp"))
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
        f"found {shown(text)}; want {forms}, with an address and no name, such as"
        f" {transports[0]}:192.0.2.9:4739 or {transports[-1]}:[2001:db8::9]:4739"
    )


def _prefix(text: str) -> str:
    if text != _ANY:
        try:
            _network(text)
        except ValueError as error:
            raise ValueError(
                f"found {shown(text)}; want an address or a prefix such as 192.0.2.0/24 ({error})"
            ) from None
    return text


def _network(text: str) -> IPv4Network | IPv6Network:
    return (IPv6Network if ":" in text else IPv4Network)(text)


def _name(text: str) -> str:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise ValueError(
            f"found {shown(text)}; want a name: 63 letters, digits, dots, dashes and underscores at most, first"
            " a letter or a digit"
        )
    return text


def _interface(text: str) -> str:
    if not re.fullmatch(r"[^\s/]{1,64}", text):
        raise ValueError(f"found {shown(text)}; want an interface's name, or a pattern such as veth*")
    return text


def _not_empty(items: list[_Item]) -> list[_Item]:
    if not items:
        raise ValueError("found []; want one entry at least: to match everything, leave the key out or write 'any'")
    return items


Name = Annotated[str, AfterValidator(_name)]
Interface = Annotated[str, AfterValidator(_interface)]
Seconds = Annotated[int, Field(ge=1, le=604800)]
SocketPath = Annotated[str, AfterValidator(_socket_path)]
#: What a rule matches by: at least one.
Matches = Annotated[list[_Item], AfterValidator(_not_empty)]
Prefixes = Matches[Annotated[str, AfterValidator(_prefix)]]

#: What sun_path holds beside the zero at its end (unix(7)).
_SUN_PATH_BYTES = 107


class ConfigError(Exception):
    """The configuration will not do; each line of the message names file, key, what was found and is wanted."""


class Dataplane(Section):
    """How packets come to fwd, and how many sessions it holds."""

    queue: AtStart[int] = Field(default=20, ge=0, le=65535, description="NFQUEUE number")
    queue_length: AtStart[int] = Field(default=4096, ge=16, le=65536, description="packets that may wait in it")
    fail: Literal["open", "closed"] = Field(
        default="open", description='while no fwd runs: "open" lets packets pass, "closed" drops them'
    )
    fast_path: Literal["auto", "off"] = Field(
        default="auto",
        description='"auto": the kernel repeats what was decided, and counts; "off": every packet passes through fwd',
    )
    backend: AtStart[Literal["auto", "nft", "nft-xt", "iptables-mark", "iptables"]] = Field(
        default="auto", description="how packets get to the queue; all but auto leave no choice"
    )
    max_sessions: int = Field(
        default=65536,
        ge=16,
        le=1_000_000,
        description="the table is never larger; the fast path has room for twice as many SPIs (that: as of the start)",
    )
    keep_ended: int = Field(default=4096, ge=0, le=1_000_000, description="ended sessions that stay readable, at most")
    keep_ended_time: Seconds = Field(default=300, description="seconds that each of them stays readable")
    unknown_spi: Literal["generic", "discard"] = Field(
        default="generic",
        description='ESP to or from this host whose SPI strongSwan does not own: a "generic" session, or "discard"',
    )
    unknown_spi_grace: Seconds = Field(
        default=5, description="seconds in which strongSwan may still tell that the SPI is its own"
    )
    transit_ports: Literal["generic", "spi"] = Field(
        default="generic",
        description='ESP in transit: "generic" is one session that shows 20033; "spi" is one for each SPI seen, until a'
        " pair is proven",
    )
    ipsec_pass_through: Literal["always", "ike-gated"] = Field(
        default="always",
        description='ESP in transit passes "always" if a rule allows it; "ike-gated": only behind an IKE exchange seen'
        " between its two peers",
    )
    ike_gate_time: Seconds = Field(
        default=14400, description="seconds that such an exchange is good for; longer than the peers take to rekey"
    )
    tunnel_silent_after: Seconds = Field(
        default=60, description="a tunnel that ends here is found silent after so many seconds without a packet"
    )


class Timeouts(Section):
    """Seconds without a packet after which a session of an application ends."""

    ipsec_esp: Seconds = Field(default=DEFAULT_TIMEOUTS[Application.IPSEC_ESP], description="ESP in transit")
    ipsec_udp: Seconds = Field(default=DEFAULT_TIMEOUTS[Application.IPSEC_UDP], description="tunnels that end here")
    ipsec_esp_udp: Seconds = Field(
        default=DEFAULT_TIMEOUTS[Application.IPSEC_ESP_UDP], description="ESP in UDP in transit"
    )
    ike: Seconds = DEFAULT_TIMEOUTS[Application.IKE]
    discard: Seconds = Field(default=60, description="counted from the denial: packets do not prolong it")


class Ageing(Section):
    """Accelerated ageing: when the table fills up, sessions without packets end sooner."""

    threshold: int = Field(default=80, ge=1, le=100, description="percent of max-sessions from which on it does")
    factor: int = Field(default=2, ge=1, le=16, description="so many times as fast")


class Limits(Section):
    """Sessions that packets from outside may open, 0: no limit. Tunnels that strongSwan announces are under none."""

    source: int = Field(default=8192, ge=0, le=1_000_000, description="of one source address (of one /64 with IPv6)")
    peers: int = Field(default=4096, ge=0, le=1_000_000, description="between the same two addresses")
    half_open: int = Field(
        default=50,
        ge=0,
        le=100,
        description="of strangers that nobody answered, in percent of max-sessions (IKE: half as many more); where"
        ' packets are seen one way only, or with transit-ports = "spi", all are: raise it',
    )


class RuleSection(Section):
    """Rules are tried in order; the first that matches decides. A key left out, or "any" in it, matches everything; an
    empty list is refused. Without a rule in the file there is this one, and with one of yours it is gone.
    """

    name: Name = Field(description="what sessions and the log say of it; no two have the same")
    from_: Matches[Name] = Field(default=[_ANY], description="zones of the client")
    to: Matches[Name] = Field(default=[_ANY], description="zones of the server")
    source: Prefixes = Field(default=[_ANY], description="addresses or prefixes of the client, IPv4 or IPv6")
    destination: Prefixes = Field(default=[_ANY], description="addresses or prefixes of the server")
    application: Matches[Literal["ipsec-udp", "ipsec-esp", "ipsec-esp-udp", "ike", "any"]] = Field(
        default=["any"],
        description='"ipsec-udp" (the tunnel ends here), "ipsec-esp", "ipsec-esp-udp" (in transit), "ike", "any"',
    )
    action: Literal["allow", "deny"] = Field(description='"allow" or "deny"')
    log_at_end: bool = Field(default=True, description="the traffic log gets a record when the session ends")
    log_at_start: bool = Field(default=False, description="the traffic log gets one when it was let in or denied")
    inspect: Literal["first-packet", "every-packet"] = Field(
        default="first-packet",
        description='"first-packet"; or "every-packet": its sessions are kept off the kernel\'s fast path',
    )

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

    name: Name = Field(default="interzone-default", description="what sessions and the log say of it")
    action: Literal["allow", "deny"] = Field(default="deny", description='"allow" or "deny"')
    log_at_end: bool = False
    log_at_start: bool = False


class Vici(Section):
    """Where strongSwan listens. fwd's user has to be in the socket's group: README, Rights, and strongSwan."""

    socket: AtStart[SocketPath] = "/run/charon.vici"


class Control(Section):
    """Where fwctl asks, and who may. root and the user that fwd runs as may do everything."""

    socket: AtStart[SocketPath] = "/run/fwd/control.sock"
    read_groups: list[Name] = Field(default=["fwd"], description="groups whose members may ask")
    change_groups: list[Name] = Field(default=[], description="groups whose members may also clear sessions and reload")


class Metrics(Section):
    """Metrics for Prometheus, at http://.../metrics."""

    listen: Annotated[str, AfterValidator(_listen_address)] = Field(
        default="",
        description='"127.0.0.1:9469" or "[::1]:9469": every user of this host can ask; "/run/fwd/metrics.sock":'
        ' [control] read-groups may; "": nobody',
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
    """What the next fwd goes on with, however this one ends."""

    file: AtStart[Annotated[str, AfterValidator(_state_path)]] = Field(
        default="/run/fwd/state", description='"" keeps nothing'
    )


class TrafficLog(Section):
    """Where each session that ended leaves a record, if its rule says `log-at-end`, and how many are kept."""

    file: AtStart[Annotated[str, AfterValidator(_state_path)]] = Field(
        default="/var/log/fwd/traffic", description='an SQLite file; "" keeps no log, and nothing is sent to syslog'
    )
    max_size: AtStart[int] = Field(default=1024, ge=1, le=1_000_000, description="MiB; the oldest records make room")
    max_age: AtStart[int] = Field(default=90, ge=1, le=36500, description="days; older records go")
    journal: AtStart[bool] = Field(default=False, description="also send each record to the journal, with fields")


class Syslog(Section):
    """To which server the records of the traffic log go, in the order of PAN-OS's traffic log."""

    server: AtStart[Annotated[str, AfterValidator(_syslog_server)]] = Field(
        default="", description='"udp:192.0.2.9:514", "tcp:...", "tls:[2001:db8::9]:6514"; "": none'
    )
    format: AtStart[Literal["bsd", "ietf"]] = Field(default="bsd", description='"bsd": RFC 3164, "ietf": RFC 5424')
    facility: AtStart[
        Literal["user", "local0", "local1", "local2", "local3", "local4", "local5", "local6", "local7"]
    ] = "user"
    tls_ca: AtStart[Annotated[str, AfterValidator(_file_path)]] = Field(
        default="", description="who signed the server's certificate (PEM); \"\": the system's authorities"
    )
    tls_name: AtStart[str] = Field(default="", description='the name in the certificate; "": the address')
    tls_certificate: AtStart[Annotated[str, AfterValidator(_file_path)]] = Field(
        default="", description="fwd's own certificate, for a server that wants one (PEM)"
    )
    tls_key: AtStart[Annotated[str, AfterValidator(_file_path)]] = Field(default="", description="its key (PEM)")

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


class Ipfix(Section):
    """To which collector flow records of sessions go (IPFIX, RFC 7011), and how often."""

    collector: Annotated[str, AfterValidator(_collector)] = Field(
        default="", description='"udp:192.0.2.9:4739", "tcp:[2001:db8::9]:4739"; "": none'
    )
    active_timeout: Seconds = Field(
        default=60, description="seconds after which a session that goes on is told of again"
    )
    template_refresh: Seconds = Field(default=300, description="seconds after which templates are sent again, over UDP")
    observation_domain: int = Field(
        default=1, ge=1, le=0xFFFFFFFF, description="what tells several fwds of one address apart"
    )

    @property
    def endpoint(self) -> tuple[str, str, int] | None:
        """Transport, address and port of the collector; None: there is none."""
        return _endpoint(self.collector, ("udp", "tcp")) if self.collector else None


class Log(Section):
    """What is logged."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description='"debug" tells of every session, "info" of tunnels, "warning" of troubles, "error" of defects',
    )


class Config(Section):
    """The whole file."""

    dataplane: Dataplane = Dataplane()
    zones: dict[Name, list[Interface]] = Field(
        default={},
        description='zone = interfaces, by name or shell pattern; the first that matches wins; no zone is named "any".',
        examples=[{"trust": ["eth1", "veth*"], "untrust": ["eth0"]}],
    )
    default_zone: Name = Field(default=_ANY, description="the zone of an interface that no zone names")
    rules: list[RuleSection] = Field(
        default_factory=lambda: [RuleSection(name="any-any", action="allow")],
        examples=[
            {
                "name": "branch-through",
                "from": ["trust"],
                "to": ["untrust"],
                "source": ["198.51.100.0/24"],
                "application": ["ipsec-esp", "ike"],
                "action": "allow",
            }
        ],
    )
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
    ipfix: Ipfix = Ipfix()
    log: Log = Log()

    @model_validator(mode="after")
    def _agrees(self) -> Config:
        if wrong := [*self._wrong_zones(), *self._wrong_names()]:
            raise Disagreement(wrong)
        return self

    def _wrong_zones(self) -> Iterator[tuple[Place, str]]:
        if _ANY in self.zones:
            yield ("zones", _ANY), "found a zone 'any', which means every zone; want another name"
        zone_of: dict[str, str] = {}
        for zone, patterns in self.zones.items():
            for pattern in patterns:
                if (owner := zone_of.setdefault(pattern, zone)) != zone:
                    yield ("zones", zone), f"found '{pattern}', which zone '{owner}' has; want it in one zone"

    def _wrong_names(self) -> Iterator[tuple[Place, str]]:
        known = sorted({*self.zones, self.default_zone, _ANY})
        seen: dict[str, str] = {}
        for index, rule in enumerate(self.rules):
            if rule.name in seen:
                yield ("rules", index, "name"), f"found '{rule.name}', as {seen[rule.name]} is named; want another name"
            seen.setdefault(rule.name, f"rules #{index + 1}")
            for key, zones in (("from", rule.from_), ("to", rule.to)):
                for zone in zones:
                    if zone not in known:
                        wanted = f"{nearest(zone, known)}want one of {', '.join(known)}, or name it in [zones]"
                        yield ("rules", index, key), f"found zone '{zone}', which has no interface; {wanted}"
        name = self.default_rule.name
        if name in seen:
            yield ("default-rule", "name"), f"found '{name}', as {seen[name]} is named; want another name"

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
            flow_active_timeout_s=self.ipfix.active_timeout if self.ipfix.collector else None,
            limits=Bounds(
                source=self.limits.source,
                peers=self.limits.peers,
                half_open=-(-plane.max_sessions * self.limits.half_open // 100),
            ),
        )

    def restart_keys(self) -> dict[str, object]:
        """The keys that only a start reads, with their values."""
        values = self.model_dump(by_alias=True)
        return {
            f"{table.name}.{key.name}": values[table.name][key.name]
            for table in keys(Config)
            if table.section is not None and not table.is_list
            for key in keys(table.section)
            if key.is_only_at_start
        }


def load(path: Path | None) -> Config:
    """Read and check a file; None means DEFAULT_PATH, which need not exist. Raises ConfigError."""
    source = path or DEFAULT_PATH
    try:
        text = _text(source)
    except OSError as error:
        if path is None and isinstance(error, FileNotFoundError):
            return Config()
        raise ConfigError(f"{source}: {error.strerror}: give --config a file that can be read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: byte {error.start} is not UTF-8, which TOML wants") from None
    try:
        content = tomllib.loads(text)
        return Config.model_validate(content)
    except tomllib.TOMLDecodeError as error:
        line, words = toml_lines.explain(error, text)
        raise ConfigError(f"{source}:{line}: {words}") from None
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, source, text, content))) from None
    except RecursionError:
        raise ConfigError(f"{source}: arrays or tables are nested too deeply") from None
    except ValueError:  # of all that TOML can say, Python's int() only takes offence at this
        raise ConfigError(f"{source}: a number has too many digits") from None


def _problems(error: ValidationError, source: Path, text: str, content: object) -> Iterator[str]:
    """A line for each thing wrong: file and line, the key, what was found, what is wanted."""
    lines = toml_lines.Lines(text)
    found = [(lines.find(place), place, words) for place, words in problems(error, Config)]
    for line, place, words in sorted(found, key=lambda problem: problem[0] or 0):
        yield f"{source}:{f'{line}:' if line else ''} {in_words(place, content)}: {words}"


def _text(path: Path) -> str:
    """What is in a file, and in nothing that one may have to wait for. Raises OSError or UnicodeDecodeError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, encoding="utf-8-sig") as file:  # editors of other systems put a mark in front
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a regular file")
        return file.read()


def _unless_any(names: Iterable[str]) -> frozenset[str]:
    chosen = frozenset(names)
    return frozenset() if _ANY in chosen else chosen


def _prefixes(texts: list[str]) -> tuple[Prefix, ...]:
    """The prefixes named; none at all if one of them is `any`."""
    networks = [] if _ANY in texts else map(_network, texts)
    return tuple(Prefix(network.network_address.packed, network.prefixlen) for network in networks)

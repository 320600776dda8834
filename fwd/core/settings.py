"""What the configuration decides, as the core wants it: checked, complete, without its file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .limits import Bounds
from .policy import Policy, Zones
from .session import Application


class UnknownSpi(StrEnum):
    """What becomes of a session whose SPI no IKE daemon claimed within the grace time."""

    GENERIC = "generic"
    DISCARD = "discard"


class TransitPorts(StrEnum):
    """What ESP in transit shows as ports: one generic session, or a session for each SPI and direction."""

    GENERIC = "generic"
    SPI = "spi"


class PassThrough(StrEnum):
    """When ESP in transit may pass: whenever a rule allows it, or only after IKE between the same peers, too."""

    ALWAYS = "always"
    IKE_GATED = "ike-gated"


#: PAN-OS's defaults, in seconds (SPEC section 3).
DEFAULT_TIMEOUTS: Mapping[Application, int] = {
    Application.IPSEC_ESP: 3600,
    Application.IPSEC_UDP: 3600,
    Application.IPSEC_ESP_UDP: 3600,
    Application.IKE: 30,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the core can be told. Times in seconds, `ageing_threshold` a share from 0 to 1.

    `flow_active_timeout_s`: how often flow records tell of a session that goes on; None: no flow is exported.
    """

    policy: Policy
    zones: Zones
    timeouts_s: Mapping[Application, int] = field(default_factory=lambda: DEFAULT_TIMEOUTS)
    discard_timeout_s: int = 60
    max_sessions: int = 65536
    ageing_threshold: float = 0.8
    ageing_factor: int = 2
    keep_ended: int = 4096
    keep_ended_s: int = 300
    unknown_spi: UnknownSpi = UnknownSpi.GENERIC
    unknown_spi_grace_s: int = 5
    transit_ports: TransitPorts = TransitPorts.GENERIC
    pass_through: PassThrough = PassThrough.ALWAYS
    ike_gate_s: int = 14400
    tunnel_silent_s: int = 60
    tunnel_totals: int = 256
    flow_active_timeout_s: int | None = None
    limits: Bounds = field(default_factory=Bounds)

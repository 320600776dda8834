"""Numbers that the specifications fix, and below them those that we chose."""

from __future__ import annotations

from typing import Final

# --- fixed by a specification ------------------------------------------------------------------------

PROTO_UDP: Final = 17  # IANA protocol numbers
PROTO_ESP: Final = 50  # RFC 4303 section 2
PROTO_AH: Final = 51  # RFC 4302 section 2

IKE_PORT: Final = 500  # RFC 7296 section 2
NAT_T_PORT: Final = 4500  # RFC 3948 section 2
NON_ESP_MARKER: Final = b"\x00\x00\x00\x00"  # RFC 3948 section 2.2: IKE on the NAT-T port
NAT_KEEPALIVE: Final = b"\xff"  # RFC 3948 section 2.3

GENERIC_ESP_PORT: Final = 20033  # what PAN-OS shows for ESP in transit (kA10g000000ClXiCAK)

# --- chosen by us ------------------------------------------------------------------------------------

#: IPv6 extension headers walked before a packet counts as absurd. RFC 8200 section 4.1 orders six kinds,
#: one of which may come twice; Linux itself stops nowhere near as soon.
MAX_IPV6_EXTENSIONS: Final = 8

#: Sessions looked at in one turn of the ager, so that a turn never takes longer than about a millisecond.
AGER_WORK_PER_TURN: Final = 512

#: The SPIs of a deleted SA stay attached to their session for so long: packets that were sent before the
#: delete may still be under way or in the queue, and are not to be taken for an unknown tunnel's.
SA_LINGER_S: Final = 5.0

#: SPIs remembered for each direction of a session (shown as "seen on the wire").
SPIS_SEEN: Final = 16

#: Keys of SPIs that nobody knows which may lead to one generic session; the oldest gives way.
UNKNOWN_SPI_KEYS: Final = 32

#: How often the counters are sampled for their rates.
SAMPLE_INTERVAL_S: Final = 1.0

#: SPIs of one session that are repeated without a look at the rules, all interfaces and addresses taken together.
ELEMENTS_PER_SESSION: Final = 1024

#: An element that saw no packet for so long is given up: SPIs change, and the next packet brings it back.
ELEMENT_IDLE_S: Final = 300.0

#: The kernel's counts are looked at so often, in seconds; this many in one go, which takes some 2 ms, and then the
#: packets in the queue have their turn for at least so long.
SWEEP_INTERVAL_S: Final = 1.0
SWEEP_SLICE: Final = 256
SWEEP_PAUSE_S: Final = 0.02

#: Counts that the kernel is asked for while somebody waits for an answer; any others are up to a sweep old.
READS_PER_REQUEST: Final = 1024

#: Sessions that an operator's `clear` ends in one go, so that packets do not wait for all of them.
CLEAR_SLICE: Final = 256

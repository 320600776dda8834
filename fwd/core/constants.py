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

REPLAY_WINDOW: Final = 64  # RFC 4303 section 3.4.3: the window that a receiver should have

GENERIC_ESP_PORT: Final = 20033  # what PAN-OS shows for ESP in transit (kA10g000000ClXiCAK)

# --- chosen by us ------------------------------------------------------------------------------------

#: IPv6 extension headers walked before a packet counts as absurd. RFC 8200 section 4.1 orders six kinds,
#: one of which may come twice; Linux itself stops nowhere near as soon.
MAX_IPV6_EXTENSIONS: Final = 8

#: Sessions looked at in one turn of the ager, so that a turn never takes longer than about a millisecond.
AGER_WORK_PER_TURN: Final = 512

#: Sessions whose time is up that end in one go: very many tunnels may have gone at once.
EXPIRE_SLICE: Final = 128

#: The SPIs of a deleted SA stay attached to their session for so long: packets that were sent before the
#: delete may still be under way or in the queue, and are not to be taken for an unknown tunnel's.
SA_LINGER_S: Final = 5.0

#: SPIs remembered for each direction of a session, with what each carried.
SPIS_SEEN: Final = 32

#: Peers whose IKE is remembered, and how many IKE_SAs of each two.
PEERS_KEPT: Final = 4096
IKE_SAS_PER_PEERS: Final = 8

#: Exchanges of one IKE_SA that may wait for their answer. Most peers have one at a time (RFC 7296 section 2.3).
OPEN_EXCHANGES_KEPT: Final = 8

#: An SPI that is silent so soon after another one began has given way to it; strongSwan deletes the old SA at once,
#: others take some seconds. Two SPIs that were alone for so long are a pair, whatever comes later.
TAKE_OVER_S: Final = 10.0
PAIR_PROOF_S: Final = 10.0

#: A tunnel is one-way when only one side has sent for so long; a pause of that length begins anew.
ONE_WAY_S: Final = 30.0

#: A trouble that comes by packets, such as loss, is over when there was none for so long.
RECENT_S: Final = 300.0

#: After a new SPI came up, the counts of its session are read so often, and for so long: to tell when the old one fell
#: silent. Of very many such sessions at once, the first so many; not those with more SPIs than tunnels have.
CLOSE_WATCH_INTERVAL_S: Final = 0.1
CLOSE_WATCH_S: Final = 10.0
CLOSE_WATCH_SESSIONS: Final = 64
CLOSE_WATCH_SPIS: Final = 16

#: fwd's count of an SA and the IKE daemon's are read some milliseconds apart: a difference of so many packets, and of
#: this share of all, means nothing.
MISCOUNT_SLACK: Final = 16
MISCOUNT_SHARE: Final = 0.01

#: How often tunnels are looked at for trouble, in seconds, and how many in one go.
WATCH_INTERVAL_S: Final = 1.0
WATCH_SLICE: Final = 256

#: Peers whose sessions of one SPI each are looked at in one go, to see whether they are one tunnel, and how often.
PAIRINGS_PER_TURN: Final = 16
PAIR_INTERVAL_S: Final = 0.25
#: SPIs side by side in one direction among which a pair is looked for; among more all are ambiguous.
PAIR_LINES: Final = 8

#: SAs of one tunnel that came up within so long of each other come from both sides rekeying at once.
COLLISION_S: Final = 1.0

#: SPIs that are remembered after their SA is gone, to tell packets that still use them from those of strangers.
FORMER_SPIS_KEPT: Final = 4096

#: CHILD_SAs of a tunnel that its session remembers, those that are gone included.
GENERATIONS_KEPT: Final = 32

#: Sessions of the same peers that have ended which a session is shown with.
LINKED_ENDED: Final = 8

#: That many of all that have ended are looked at for them, the last ones: some 2 ms.
LINKED_ENDED_LOOKS: Final = 4096

#: Keys of SPIs that nobody knows which may lead to one generic session; the oldest gives way.
UNKNOWN_SPI_KEYS: Final = 32

#: How often the counters are sampled for their rates.
SAMPLE_INTERVAL_S: Final = 1.0

#: SPIs of one session that are repeated without a look at the rules, all interfaces and addresses taken together.
ELEMENTS_PER_SESSION: Final = 1024

#: Sequence numbers are in packets, which the kernel's fast path does not show: so often the daemon has a look at one
#: of each SPI, at most so many in one go. Not at an SPI that carried fewer packets since: it would be out of the kernel
#: for long. Nor at one that carried more since its counts were read last: later packets could overtake that one.
LOOK_INTERVAL_S: Final = 10.0
LOOKS_PER_TURN: Final = 16
LOOK_MIN_PACKETS: Final = 10
LOOK_MAX_PACKETS: Final = 10_000

#: A new element waits until no packet is in the queue, for what is there would be overtaken. It waits so long at most,
#: in seconds, or until so many wait: where packets come faster than the daemon handles them, there will only be more.
INSTALL_WAIT_S: Final = 0.03
INSTALLS_WAITING: Final = 512

#: An element that saw no packet for so long is given up: SPIs change, and the next packet brings it back.
ELEMENT_IDLE_S: Final = 300.0

#: The kernel's counts are looked at so often, in seconds; this many in one go, which takes some 2 ms, and then the
#: packets in the queue have their turn for at least so long.
SWEEP_INTERVAL_S: Final = 1.0
SWEEP_SLICE: Final = 256

#: Elements that are withdrawn in one go where very many are, some 13 ms' worth: after a change of zones, say.
RETIRE_SLICE: Final = 1024

#: How often the kernel is asked to remove an element, if it does not answer, before its last counts are given up.
REMOVAL_TRIES: Final = 50

SWEEP_PAUSE_S: Final = 0.02

#: Counts that the kernel is asked for while somebody waits for an answer; any others are up to a sweep old.
READS_PER_REQUEST: Final = 512

#: What changed is written to the state file so often; of so many sessions in one go, which takes some 2 ms, after which
#: packets have their turn for at least so long if there are more.
SAVE_INTERVAL_S: Final = 0.2
SAVE_SLICE: Final = 128
SAVE_PAUSE_S: Final = 0.005

#: Records of the traffic log that are saved or handed out in one go (some 5 us each), that may be handed out and not
#: written yet, and that may wait in all (some 500 bytes each): a disk that is full for long costs records, not memory.
LOG_SLICE: Final = 256
LOG_HANDED_OUT: Final = 4096
LOG_WAITING: Final = 65536

#: Sessions that an operator's `clear` ends in one go, and elements of them, so that packets do not wait for all.
CLEAR_SLICE: Final = 256
CLEAR_ELEMENTS: Final = 1024

#: A session that nobody answered gives way to a new one when there is no place, after so long without a packet; so many
#: are looked at for it, for some of the oldest may still be speaking.
HALF_OPEN_IDLE_S: Final = 30.0
HALF_OPEN_LOOKS: Final = 4

#: A flood of ESP leaves room for IKE: of that there may be so many times the limit of half-open sessions.
IKE_ROOM: Final = 1.5

#: Gates that close in one go, and sessions that follow their gate, which takes some 4 ms.
GATE_SLICE: Final = 256

#: SAs that are learned in one go, some 3 ms' worth if each is a new tunnel's, and SAs that are gone whose SPIs cease to
#: linger in one go.
SA_SLICE: Final = 64
LINGER_SLICE: Final = 128

#: A tunnel that is gone keeps its place among the totals for so long at least; whether one has been gone for longer is
#: looked at so often while others want a place.
TOTALS_KEPT_S: Final = 3600.0
TOTALS_LOOK_S: Final = 1.0

#: Flow records that are made and sent in one go, which takes some 3 ms, and live sessions looked at for it. Within one
#: active timeout all sessions are looked at so many times: so much later than that, at most, a flow is told of.
EXPORT_SLICE: Final = 96
EXPORT_LOOKS: Final = 1024
EXPORT_ROUNDS: Final = 12

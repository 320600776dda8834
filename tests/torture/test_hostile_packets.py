"""Bytes of any kind: nothing leaves the decoder but its declared error, and the books of the whole core balance."""

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwd.api import Api
from fwd.cli import render
from tests.builders import HERE, HERE6, LEFT, PEER, PEER6, RIGHT, esp, ipv4, udp
from tests.torture import hostile
from tests.torture.conftest import IS_FULL, in_full
from tests.torture.fuzz import TARGETS, fuzz
from tests.torture.seeds import PACKETS, chain, fragment6, read_corpus

#: Inputs to the decoder, and programs for the core, that the fuzzer tries.
RUNS = {"decoder": in_full(10_000_000, 100_000), "firewall": in_full(30_000, 500)}

EXAMPLES = settings(max_examples=in_full(3_000, 300), deadline=None)

# --- packets as they could be, header by header ------------------------------------------------------------

ADDRESSES = st.sampled_from([HERE, PEER, LEFT, RIGHT, "224.0.0.1", "255.255.255.255", "0.0.0.0", "127.0.0.1"])
PORTS = st.sampled_from([500, 4500, 53, 0, 65535])
FRAGMENTS = st.sampled_from([0, 0, 0, 0x2000, 0x2001, 1, 0x1FFF, 0x4000, 0x8000])
PROTOCOLS = st.sampled_from([50, 50, 17, 17, 51, 4, 41, 47])
PAYLOADS = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda spi, seq, rest: spi.to_bytes(4) + seq.to_bytes(4) + rest, st.integers(0, 9), st.integers(0, 99),
              st.binary(max_size=20)),
    st.sampled_from(PACKETS),
)  # fmt: skip
IPV4 = st.builds(
    lambda src, dst, protocol, payload, fragment, words: ipv4(
        src, dst, protocol, payload, fragment=fragment, options=bytes(4 * words)
    ),
    ADDRESSES,
    ADDRESSES,
    PROTOCOLS,
    PAYLOADS,
    FRAGMENTS,
    st.integers(0, 10),
)
UDP = st.builds(udp, ADDRESSES, ADDRESSES, PORTS, PORTS, PAYLOADS)
OPTIONS = st.tuples(st.sampled_from([0, 43, 60, 135, 139, 140]), st.just(bytes(7)))
HEADERS = st.one_of(
    OPTIONS,
    st.tuples(st.just(51), st.just(b"\x04" + bytes(22))),
    st.tuples(st.sampled_from([0, 60, 51]), st.binary(min_size=7, max_size=7)),
    st.builds(lambda offset, more: fragment6(offset, more=more), st.sampled_from([0, 0, 1, 2, 8191]), st.booleans()),
)
IPV6 = st.builds(
    lambda headers, last, payload: chain(*headers, last=last, payload=payload),
    st.lists(HEADERS, max_size=10),
    PROTOCOLS,
    PAYLOADS,
)
WHOLE = st.one_of(IPV4, UDP, IPV6, st.sampled_from(PACKETS))
#: Whole ones, and what is left of them after damage: cut short, drawn out, a byte changed.
HOSTILE = st.one_of(
    WHOLE,
    st.builds(lambda octets, size: octets[:size], WHOLE, st.integers(0, 80)),
    st.builds(lambda octets, more: octets + more, WHOLE, st.binary(max_size=9)),
    st.builds(
        lambda octets, place, value: octets[: place % len(octets)] + bytes([value]) + octets[place % len(octets) + 1 :],
        WHOLE,
        st.integers(0, 99),
        st.integers(0, 255),
    ),
)
STEPS = st.lists(
    st.one_of(st.tuples(st.sampled_from(hostile.PACKETS), HOSTILE), st.sampled_from(hostile.EVENTS), st.just("again")),
    max_size=20,
)


@pytest.mark.timeout(600)
@EXAMPLES
@given(HOSTILE)
def test_any_packet_is_decoded_or_refused_and_both_decoders_agree(octets):
    hostile.decoder(octets)


@pytest.mark.timeout(600)
@EXAMPLES
@given(st.binary(max_size=64), st.integers(0, 64))
def test_an_ike_header_is_read_as_it_stands_there_or_not_at_all(octets, offset):
    hostile.ike_header(octets, offset)


@pytest.mark.timeout(1200)
@settings(EXAMPLES, max_examples=in_full(1_000, 60))
@given(st.integers(0, 31), STEPS)
def test_whatever_comes_each_packet_has_one_verdict_and_is_counted_once(options, steps):
    hostile.firewall(hostile.program(options, *steps))


# --- what was found, and what a fuzzer finds next ----------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_keeps_its_promises(target):
    inputs = [*TARGETS[target][1], *read_corpus(target)]
    assert len(inputs) > 100
    for octets in inputs:
        getattr(hostile, target)(octets)


@pytest.mark.timeout(600)
def test_what_came_of_hostile_packets_can_be_shown():
    """Sessions, events, tunnels and explanations, as JSON and as text for a terminal."""
    programs = [*TARGETS["firewall"][1], *read_corpus("firewall")]
    for octets in programs[:: in_full(1, 8)]:
        bench, events = hostile.run(octets)
        nothing = (dict, lambda: None, lambda _: None, dict)
        api = Api(bench.firewall, lambda now=bench.now: now, "/run/charon.vici", *nothing)
        for event in events:
            api.note_event(event)
        answers = [api.dispatch(name, {}) for name in ("session.list", "session.info", "counter.list", "tunnel.list")]
        sessions, facts, counters, tunnels = answers
        details = api.dispatch("tunnel.detail", {})
        told = api.dispatch("event.list", {})["events"]
        texts = ["\n".join(render.session_rows(sessions["sessions"])), render.session_info(facts)]
        texts += [render.counters(counters), render.tunnels(tunnels, 80), render.tunnel_detail(details)]
        texts += [render.event(event) for event in told]
        for session in sorted({s.id for s in (*bench.firewall.table, *bench.firewall.table.ended)}):
            shown = api.dispatch("session.get", {"id": session})
            explained = api.dispatch("explain.session", {"id": session})
            texts += [render.session_detail(shown), render.explanation(explained, 80)]
            answers += [shown, explained]
        json.dumps([*answers, details, told])
        assert all(isinstance(text, str) for text in texts)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_a_fuzzer_that_sees_what_it_covers_breaks_no_promise(target, tmp_path):
    """Another way each time in `make torture`, the same in `make test`; the seed is printed."""
    if not IS_FULL:
        pytest.importorskip("atheris", reason="the fuzzer comes with `make torture`; mutations are tried without it")
    seed = in_full(int(time.time()), 1)
    outcome = fuzz(target, RUNS[target], seed, tmp_path, in_full(3500, 55))
    print(f"seed {seed}: {outcome.runs} inputs in {outcome.seconds} s, {outcome.covered} places reached")
    assert outcome.failing is None, f"seed {seed}: {outcome.failing.hex()}\n{outcome.words}"
    assert outcome.runs >= RUNS[target], outcome.words


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_the_corpus_break_no_promise(target):
    """The small cousin of the fuzzer, which needs nothing: the same mutations in each run."""
    chance = random.Random(1)
    inputs = [*TARGETS[target][1], *read_corpus(target)]
    for _ in range({"decoder": 20_000, "firewall": 300}[target]):
        octets = bytearray(chance.choice(inputs))
        for _ in range(chance.randrange(1, 4)):
            place = chance.randrange(len(octets) + 1)
            match chance.randrange(4):
                case 0:
                    octets[place : place + 1] = chance.randbytes(1)
                case 1:
                    del octets[place : place + chance.randrange(9)]
                case 2:
                    octets[place:place] = chance.randbytes(chance.randrange(9))
                case _:
                    other = chance.choice(inputs)
                    octets[place:] = other[chance.randrange(len(other) + 1) :]
        getattr(hostile, target)(bytes(octets))


def test_a_program_comes_back_from_its_bytes():
    first, second = esp(PEER, HERE, 7), esp(PEER6, HERE6, 7)
    octets = hostile.program(3, ("receive", first), "wait 1", ("send", second), "again", "clear")
    assert list(hostile.steps_of(octets)) == [
        ("receive", first), ("wait 1", b""), ("send", second), ("send", second), ("clear", b""),
    ]  # fmt: skip

"""IPFIX messages, as a decoder reads them that is not ours: python-ipfix, with IANA's names of the elements."""

import io
import struct
from datetime import UTC, datetime
from ipaddress import ip_address

import ipfix.ie
import ipfix.reader
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwd.core.records import FlowDelta
from fwd.ipfix import Encoder, Statistics
from tests.builders import HERE, HERE6, PEER, PEER6, packed

ipfix.ie.use_iana_default()

EPOCH = 1.7e9


def delta(source=HERE, destination=PEER, *, ports=None, spi=None, **changes):
    fields = {
        "session_id": 791,
        "source": packed(source),
        "destination": packed(destination),
        "protocol": 50 if ports is None else 17,
        "ports": ports,
        "spi": spi,
        "packets": 3,
        "octets": 468,
        "started_at": 1000.25,
        "ended_at": 1060.5,
        "end_reason": 2,
        "application": "ipsec-esp",
        "ingress": 2,
        "egress": 3,
        "is_outbound": False,
        "is_dropped": False,
    }
    return FlowDelta(**fields | changes)


def decoded(*messages):
    """All data records of some messages, as dicts by the elements' names."""
    stream = io.BytesIO(b"".join(message.octets for message in messages))
    return list(ipfix.reader.from_stream(stream).namedict_iterator())


@pytest.mark.parametrize("ends", [(HERE, PEER), (HERE6, PEER6)])
@pytest.mark.parametrize("ports", [None, (4500, 1025)])
@pytest.mark.parametrize("spi", [None, 0xB0975BC3])
def test_each_kind_of_flow_record(ends, ports, spi):
    encoder = Encoder(9, 1400)
    flow = delta(*ends, ports=ports, spi=spi, is_outbound=True, is_dropped=True)
    (record,) = decoded(encoder.templates(0, 2.0), *encoder.messages([flow], 0, 2.0, EPOCH))
    version = "IPv6" if ":" in ends[0] else "IPv4"
    wanted = {
        "octetDeltaCount": 468,
        "packetDeltaCount": 3,
        "flowStartMilliseconds": datetime.fromtimestamp(EPOCH + 1000.25, UTC).replace(tzinfo=None),
        "flowEndMilliseconds": datetime.fromtimestamp(EPOCH + 1060.5, UTC).replace(tzinfo=None),
        "flowId": 791,
        "ingressInterface": 2,
        "egressInterface": 3,
        "protocolIdentifier": flow.protocol,
        "flowDirection": 1,
        "forwardingStatus": 129,
        "flowEndReason": 2,
        f"source{version}Address": ip_address(ends[0]),
        f"destination{version}Address": ip_address(ends[1]),
        "applicationName": "ipsec-esp",
    }
    if ports:
        wanted |= {"sourceTransportPort": 4500, "destinationTransportPort": 1025}
    if spi:
        wanted["IPSecSPI"] = spi  # as it was called before ipSecSPI
    assert record == wanted


def test_options_name_the_interfaces_and_what_was_not_sent():
    message = Encoder(9, 1400).options(Statistics(7, (1, 2, 3)), {2: "wan", 3: "to-left"}, 0, 2.0)
    assert message.count == 3
    assert decoded(message) == [
        {
            "observationDomainId": 9,
            "exportedFlowRecordTotalCount": 7,
            "notSentFlowTotalCount": 1,
            "notSentPacketTotalCount": 2,
            "notSentOctetTotalCount": 3,
        },
        {"ingressInterface": 2, "interfaceName": "wan"},
        {"ingressInterface": 3, "interfaceName": "to-left"},
    ]


@pytest.mark.parametrize("room", [900, 1400])
def test_of_very_many_interfaces_those_are_named_that_fit(room):
    names = {index: f"interface-{index}" for index in range(5000)}
    message = Encoder(1, room).options(Statistics(0, (0, 0, 0)), names, 0, 2.0)
    assert room - 40 < len(message.octets) <= room
    assert len(decoded(message)) == message.count > 20


def test_templates_are_of_a_domain_and_options_of_none():
    encoder = Encoder(9, 900)
    templates, options = encoder.templates(5, 2.0), encoder.options(Statistics(0, (0, 0, 0)), {}, 3, 2.0)
    assert (templates.count, options.count, len(templates.octets) <= 900) == (0, 1, True)
    heads = [struct.unpack_from("!2x2xIII", message.octets) for message in (templates, options)]
    assert heads == [(2, 5, 9), (2, 3, 0)]


FLOWS = st.builds(
    delta,
    *[st.just(HERE)] * 2,
    ports=st.none() | st.just((1, 2)),
    spi=st.none() | st.integers(1, 2**32 - 1),
    packets=st.integers(0, 2**63),
    application=st.text(max_size=300),
) | st.builds(delta, *[st.just(HERE6)] * 2, spi=st.none() | st.integers(1, 2**32 - 1))


@given(st.lists(FLOWS, max_size=60), st.integers(0, 2**33), st.integers(900, 1400))
def test_messages_keep_to_their_room_and_number_their_records(flows, sequence, room):
    encoder = Encoder(1, room)
    messages = list(encoder.messages(flows, sequence, 2.0, EPOCH))
    assert all(len(message.octets) <= room for message in messages)
    for message in messages:
        assert int.from_bytes(message.octets[8:12]) == sequence % 2**32
        sequence += message.count
    told = [flow for message in messages for flow in message.deltas]
    assert sorted(map(id, told)) == sorted(map(id, flows))
    records = decoded(encoder.templates(0, 2.0), *messages)
    assert [record["packetDeltaCount"] for record in records] == [flow.packets for flow in told]
    assert [record.get("IPSecSPI") for record in records] == [flow.spi for flow in told]

"""The way to a collector: real sockets, collectors that come, go and do not read; python-ipfix reads what arrives."""

import asyncio
import contextlib
import io
import socket
import struct
import time
from collections import Counter

import ipfix.ie
import ipfix.reader
import pytest

from fwd.edge import ipfix as edge
from fwd.edge.endpoint import Endpoint
from fwd.edge.ipfix import Exporter, Options
from tests.builders import LEFT, RIGHT, Bench, esp
from tests.ports import free_port

ipfix.ie.use_iana_default()

LOOPBACK = ["127.0.0.1", "::1"]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(edge, "_RETRY_S", 0.05)
    monkeypatch.setattr(edge, "_IDLE_S", 0.02)
    monkeypatch.setattr(edge, "_REFUSAL_S", 0.1)


class Seat:
    """A bench whose sessions go to a collector."""

    def __init__(self, transport, address="127.0.0.1"):
        self.bench = Bench(flow_active_timeout_s=3600)
        self.exporter = Exporter(self.bench.firewall, lambda _: self.bench.save())
        kind = socket.SOCK_DGRAM if transport == "udp" else socket.SOCK_STREAM
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        port = free_port(kind, address)
        self.options = Options(Endpoint(transport, address, port), 300, 1)
        self.octets = b""
        self.spi = 0

    def start(self):
        self.exporter.start(self.options)

    def listen(self):
        there = (self.options.collector.address, self.options.collector.port)
        if self.options.collector.transport == "udp":
            listener = socket.socket(self.family, socket.SOCK_DGRAM)
            listener.bind(there)
        else:
            listener = socket.create_server(there, family=self.family, reuse_port=True)
        listener.setblocking(False)
        return listener

    def end_sessions(self, count):
        """Let so many sessions end, of one packet each."""
        for _ in range(count):
            self.spi += 1
            self.bench.forward(esp(f"198.51.{self.spi >> 8}.{self.spi & 255}", RIGHT, self.spi))
        self.bench.clear(*self.bench.sessions)

    def records(self):
        """Of each SPI that arrived, how often."""
        stream = ipfix.reader.from_stream(io.BytesIO(self.octets))
        flows = [record for record in stream.namedict_iterator() if "packetDeltaCount" in record]
        assert all(record["packetDeltaCount"] == 1 for record in flows)
        return Counter(record["IPSecSPI"] for record in flows)

    async def read(self, connection, until):
        """Take in what arrives until a condition holds, and what has arrived by then."""
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + 30
        while not until():
            assert time.monotonic() < deadline, (self.exporter.describe(), self.records())
            try:
                self.octets += await asyncio.wait_for(loop.sock_recv(connection, 65536), 0.02)
            except TimeoutError:
                pass
        with contextlib.suppress(BlockingIOError):
            while octets := connection.recv(65536):
                self.octets += octets

    def has_all(self):
        return self.bench.count("ipfix_records_sent") == self.spi

    async def until(self, condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, self.exporter.describe()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("address", LOOPBACK)
def test_over_udp_what_is_refused_comes_again(address):
    async def scenario():
        seat = Seat("udp", address)
        seat.end_sessions(200)
        seat.start()
        await seat.until(lambda: "away: Connection refused" in seat.exporter.describe())
        assert "200 ended sessions wait" in seat.exporter.describe()
        with seat.listen() as listener:
            await seat.read(listener, seat.has_all)
        assert seat.records() == Counter(range(1, 201))
        seat.end_sessions(100)  # the collector is away again
        await seat.until(lambda: "away" in seat.exporter.describe())
        seat.end_sessions(50)
        with seat.listen() as listener:
            await seat.read(listener, seat.has_all)
        assert seat.records() == Counter(range(1, 351))
        assert "sending; 350 records sent" in seat.exporter.describe()
        assert seat.bench.count("ipfix_collector_lost") == 2
        seat.exporter.stop()

    asyncio.run(scenario())


def test_numbers_over_udp_go_on_in_a_successor_and_have_no_gap():
    async def scenario():
        seat = Seat("udp")
        numbers = []
        with seat.listen() as listener:
            for _ in range(2):
                seat.start()
                seat.end_sessions(60)
                await seat.read(listener, seat.has_all)
                seat.exporter.stop()
                seat.bench.restart(flow_active_timeout_s=3600, fast_path=False)
                seat.exporter = Exporter(seat.bench.firewall, lambda _: seat.bench.save())
        assert seat.records() == Counter(range(1, 121))
        everything, end = seat.octets, 0
        while end < len(everything):
            length, number, domain = struct.unpack_from("!2xH4xII", everything, end)
            seat.octets = everything[:end]
            if domain:
                assert number == sum(seat.records().values())
                numbers.append(number)
            end += length
        assert numbers[0] == 0 and numbers[-1] > 60 and len(set(numbers)) > 4

    asyncio.run(scenario())


@pytest.mark.parametrize("address", LOOPBACK)
def test_over_tcp_nothing_is_lost_when_the_collector_goes(address):
    async def scenario():
        seat = Seat("tcp", address)
        loop = asyncio.get_running_loop()
        seat.end_sessions(200)
        seat.start()
        await seat.until(lambda: "away: Connection refused" in seat.exporter.describe())
        with seat.listen() as listener:
            connection, _ = await loop.sock_accept(listener)
            await seat.read(connection, seat.has_all)
            connection.close()
        await seat.until(lambda: "away" in seat.exporter.describe())
        seat.end_sessions(50)
        assert "50 ended sessions wait" in seat.exporter.describe()
        with seat.listen() as listener:
            connection, _ = await loop.sock_accept(listener)
            await seat.read(connection, seat.has_all)
            connection.close()
        assert seat.records() == Counter(range(1, 251))
        seat.exporter.stop()

    asyncio.run(scenario())


def test_over_tcp_what_was_not_acknowledged_comes_again(monkeypatch):
    """A collector that reads nothing, until its buffer is full, and then breaks the connection."""
    monkeypatch.setattr(edge, "_ON_THE_WAY_BYTES", 16384)

    async def scenario():
        seat = Seat("tcp")
        loop = asyncio.get_running_loop()
        with seat.listen() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            seat.start()
            connection, _ = await loop.sock_accept(listener)
            seat.end_sessions(600)
            await seat.until(lambda: seat.exporter._way is not None and seat.exporter._way.is_full)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            await seat.until(lambda: seat.bench.count("ipfix_collector_lost"))
            acknowledged = seat.bench.count("ipfix_records_sent")
            assert acknowledged < 300
            connection, _ = await loop.sock_accept(listener)
            await seat.read(connection, seat.has_all)
            connection.close()
        assert seat.records() == Counter(range(acknowledged + 1, 601))
        seat.exporter.stop()

    asyncio.run(scenario())


def test_another_collector_goes_on_where_the_first_one_was_left():
    async def scenario():
        seat = Seat("udp")
        with seat.listen() as listener:
            seat.start()
            seat.end_sessions(30)
            await seat.read(listener, seat.has_all)
        other = Seat("udp")
        seat.options = other.options
        with seat.listen() as listener:
            seat.start()
            seat.end_sessions(30)
            await seat.read(listener, seat.has_all)
        assert seat.records() == Counter(range(1, 61))
        seat.exporter.start(None)
        assert seat.exporter.describe() == "none by configuration"

    asyncio.run(scenario())


def test_at_a_stop_all_is_told_that_there_is():
    async def scenario():
        seat = Seat("udp")
        seat.bench.forward(esp(LEFT, RIGHT, 1))
        seat.spi = 1
        with seat.listen() as listener:
            seat.start()
            await seat.read(listener, lambda: "sending" in seat.exporter.describe())
            await asyncio.sleep(0.15)  # nothing more is under way
            seat.bench.read_all()
            seat.bench.firewall.flow_export.finish()
            seat.exporter.finish(time.monotonic() + 30)
            await seat.read(listener, lambda: seat.records())
        assert seat.records() == Counter([1]) and seat.has_all()

    asyncio.run(scenario())

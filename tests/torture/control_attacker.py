"""Clients of the control socket that mean no good: `control_attacker.py PATH ATTACK SECONDS`.

It prints how often what became of them.

To be run as some user inside a lab. It needs nothing but Python, for other users may not read the project's folder.
"""

import json
import os
import socket
import sys
import threading
import time
from collections import Counter

PATH, ATTACK, SECONDS = sys.argv[1], sys.argv[2], float(sys.argv[3])
END = time.monotonic() + SECONDS
COUNTS: Counter = Counter()


def request(method, **params):
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode() + b"\n"


COSTLY = (
    request("session.count", filter={"source": "10.0.0.0/8", "min-kb": "9"}),
    request("session.list", limit=1000),
    request("session.list", limit=1000, filter={"min-kb": "9999999"}),
    request("session.info"),
    request("tunnel.detail"),
    request("tunnel.list"),
    request("counter.list"),
    request("event.list", after=0, limit=1000, filter={"min-kb": "9999999"}),
    request("explain.packet", src="198.51.100.2", dst="203.0.113.2", spi=5000),
)


def connect():
    """Stand in line until there is a place; nobody is kept busy by that."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(PATH)
    connection.settimeout(max(0.1, END - time.monotonic()))
    COUNTS["connected"] += 1
    return connection


def note(line):
    answer = json.loads(line) if line else {}
    COUNTS["answered" if "result" in answer else f"error {answer.get('error', {}).get('code')}"] += 1


def crowd():
    """Connect, ask once, hang up, and again."""
    with connect() as connection:
        connection.sendall(request("system.info"))
        note(connection.makefile("rb").readline())


def knock():
    """Connect and hang up."""
    connect().close()


def read_all(connection):
    try:
        for line in connection.makefile("rb"):
            note(line)
    except OSError:
        pass  # it is over


def pipeline():
    """Ask for all that takes time, very much at once, and read what comes."""
    with connect() as connection:
        threading.Thread(target=read_all, args=(connection,), daemon=True).start()
        while time.monotonic() < END:
            connection.sendall(b"".join(COSTLY) * 8)


def unread():
    """Ask for much and never read it."""
    with connect() as connection:
        connection.sendall(request("session.list", limit=1000) * 20)
        connection.makefile("rb").read(1)
        time.sleep(max(0, END - time.monotonic()))


def slow():
    """A byte now and then."""
    with connect() as connection:
        while time.monotonic() < END:
            connection.sendall(b" ")
            time.sleep(0.05)


def half():
    """Close one half, and wait for the answer in the other."""
    with connect() as connection:
        connection.sendall(request("system.info"))
        connection.shutdown(socket.SHUT_WR)
        lines = connection.makefile("rb").readlines()
        note(lines[0] if lines else b"")


def garbage():
    """Bytes that are nothing, with and without an end."""
    with connect() as connection:
        try:
            for octets in (os.urandom(3000) + b"\n", b"[" * 60000 + b"\n", b"\0" * 200_000):
                connection.sendall(octets)
        except OSError:
            COUNTS["hung up on"] += 1
        for line in connection.makefile("rb").readlines():
            note(line)


def again_and_again(attack):
    while time.monotonic() < END:
        try:
            attack()
        except OSError as error:
            COUNTS[type(error).__name__] += 1


#: How many of each at a time.
AT_A_TIME = {crowd: 1000, knock: 8, pipeline: 8, unread: 8, slow: 8, half: 8, garbage: 8}

if __name__ == "__main__":
    threading.stack_size(128 * 1024)
    chosen = {attack.__name__: attack for attack in AT_A_TIME}[ATTACK]
    threads = [threading.Thread(target=again_and_again, args=(chosen,), daemon=True) for _ in range(AT_A_TIME[chosen])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, END + 1 - time.monotonic()))
    print(json.dumps(COUNTS), flush=True)
    os._exit(0)

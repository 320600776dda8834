"""fwctl as a program, against a real control socket in front of a real core."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from ipaddress import ip_address
from pathlib import Path

import pytest

from fwd import api
from fwd.cli import client
from fwd.rpc import RpcError
from tests.builders import LEFT

FWCTL = Path(sys.executable).parent / "fwctl"


def fwctl(*words, path="/nonexistent"):
    environment = {**os.environ, "FWD_SOCKET": str(path)}
    return subprocess.run([FWCTL, *words], capture_output=True, text=True, timeout=30, env=environment, check=False)


def test_pages_are_put_together(daemon):
    done = fwctl("show", "session", "all", path=daemon)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4 + 2 * 1100
    assert len(json.loads(fwctl("show", "session", "all", "--json", path=daemon).stdout)["sessions"]) == 1100


def test_an_order_over_many_pages(daemon):
    asked = client.Client(str(daemon))
    by_source = [(view["c2s"]["source"], view["id"]) for view in asked.sessions({})]
    by_source.sort(key=lambda pair: (ip_address(pair[0]), pair[1]))
    assert [(view["c2s"]["source"], view["id"]) for view in asked.sessions({}, "source")] == by_source
    last = [view["id"] for view in asked.sessions({}, "id", descending=True, limit=250)]
    assert last == list(range(1100, 850, -1))
    assert [view["id"] for view in asked.sessions({"source": "10.1.0.0/16"}, limit=3)] == [251, 252, 253]
    asked.close()


def test_the_top_of_all_sessions(daemon, monkeypatch):
    monkeypatch.setattr(api, "RANKED_AT_ONCE", 100)
    asked = client.Client(str(daemon))
    ranking = asked.rank({"source": "10.0.0.0/8"}, "source", descending=True, limit=120)
    sessions = asked.live(ranking.ids)
    assert ranking.matched == 1099 and [session["id"] for session in sessions] == ranking.ids
    assert len(sessions) == 120 and sessions[0]["c2s"]["source"] == "10.4.0.99"
    assert sessions[0]["findings"] == [] and "rates" in sessions[0]
    asked.close()


def test_json_stands_before_or_after_the_words(daemon):
    before = fwctl("--json", "show", "session", "id", "1", path=daemon).stdout
    after = fwctl("show", "session", "id", "1", "--json", path=daemon).stdout
    assert json.loads(before)["id"] == json.loads(after)["id"] == 1


@pytest.mark.parametrize(
    "words",
    [
        "show session all",
        "show session id 1",
        "show session info",
        "show counter global",
        "show tunnel",
        "show tunnel detail",
        "explain session 1",
        "explain packet --src 192.0.2.2 --dst 192.0.2.1 --spi 9",
        "show system info",
    ],
)
def test_every_command_prints_text_and_json(daemon, words):
    text = fwctl(*words.split(), path=daemon)
    assert text.returncode == 0 and text.stdout and not text.stderr
    assert isinstance(json.loads(fwctl(*words.split(), "--json", path=daemon).stdout), dict)


def test_filters(daemon):
    words = ("show", "session", "all", "filter", "source", LEFT)
    assert len(fwctl(*words, path=daemon).stdout.splitlines()) == 6
    count = fwctl("show", "session", "all", "filter", "count", "yes", path=daemon)
    assert count.stdout == "Number of sessions that match filter: 1100\n"
    assert fwctl(*words, "state", "discard", path=daemon).stdout == "No Active Sessions\n"


def listed(daemon, words):
    return json.loads(fwctl(*f"show session all {words} --json".split(), path=daemon).stdout)["sessions"]


def test_sessions_in_order_and_so_many(daemon):
    by_address = listed(daemon, "sort source descending limit 450")
    found = [ip_address(session["c2s"]["source"]) for session in by_address]
    assert found[0] == ip_address(LEFT) and found == sorted(found, reverse=True) and len(set(found)) == 450
    assert [session["id"] for session in listed(daemon, "descending limit 3")] == [1100, 1099, 1098]
    assert [session["id"] for session in listed(daemon, "limit 3 filter source 10.0.0.0/8")] == [2, 3, 4]
    assert len(listed(daemon, "")) == 1100 and listed(daemon, "filter state discard sort id") == []


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ("show session id 424242", 1, "fwctl: no session 424242: 'show session all' lists those there are"),
        ("clear session id 424242", 1, "fwctl: no session 424242"),
        ("show session all filter sauce x", 2, "did you mean 'source'?"),
        ("show session all filter", 2, "filter wants KEY VALUE"),
        ("show session all filter source", 2, "'source' wants a value after it"),
        ("show session all filter state x state y", 2, "'state' stands there twice"),
        ("show session all where state x", 2, "found 'where', want 'filter KEY VALUE ...'"),
        ("show session all filter count maybe", 2, "want yes or no"),
        ("show session all filter source 1.2.3", 2, "filter source: '1.2.3' will not do"),
        ("clear session all filter count yes", 2, "no filter key 'count'"),
        ("show session all filter count yes limit 5", 2, "sort and limit make no sense with it"),
        ("show session all sort colour", 2, "found 'colour', want id or age"),
        ("show session id zero", 2, "found 'zero', want a number from 1 to 2147483647"),
        ("show session id -1", 2, "found '-1', want a number from 1 to 2147483647"),
        ("show session id 1_0", 2, "found '1_0', want a number"),
        ("show session all filter min-age -1", 2, "filter min-age: '-1' will not do: want a number such as 60"),
        ("show session all filter min-kb nan", 2, "filter min-kb: 'nan' will not do: want a number such as 60"),
        ("show session all filter source-port abc", 2, "'abc' will not do: want a number from 0 to 4294967295"),
        ("explain packet --src 1.1.1.1 --dst 1.1.1.2 --spi -1", 2, "found '-1', want a number from 1 to 4294967295"),
        ("explain packet --src 1.1.1.1 --dst 1.1.1.2 --spi 0", 2, "found '0', want a number from 1 to 4294967295"),
        ("explain packet --src 1.1.1.1 --dst 1.1.1.2 --spi 0x1_0", 2, "found '0x1_0', want a number from 1"),
        ("explain packet --src 1.1.1.1 --dst 1.1.1.2 --spi 1 --ports 1 70000", 2, "found '70000', want"),
        ("monitor filter count yes", 2, "no filter key 'count'"),
        ("--sokcet /x show tunnel", 2, "No such option"),
        ("show sesion all", 2, "No such command 'sesion'"),
    ],
)
def test_exit_status_and_reason(daemon, words, status, reason):
    done = fwctl(*words.split(), path=daemon)
    assert (done.returncode, done.stdout) == (status, "")
    assert reason in done.stderr and "Traceback" not in done.stderr
    told = done.stderr.splitlines()
    assert told[0].startswith("fwctl: ") and len(told) <= 2
    done = fwctl("--json", *words.split(), path=daemon)
    assert (done.returncode, done.stdout) == (status, "")
    error = json.loads(done.stderr)["error"]
    assert reason.removeprefix("fwctl: ") in error["message"] and error["exit_status"] == status


def test_the_doctor_needs_no_daemon():
    done = fwctl("doctor")
    assert done.returncode == 1 and done.stderr == ""
    assert "problem  no fwd on /nonexistent\n" in done.stdout
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) < 200
    answer = json.loads(fwctl("doctor", "--json").stdout)
    assert {"daemon", "kernel", "rules"} <= {finding["area"] for finding in answer["findings"]}
    assert all(finding["text"] for finding in answer["findings"])


@pytest.mark.parametrize("words", ["show", "clear session"])
def test_half_a_command_shows_the_words_that_follow(words):
    done = fwctl(*words.split())
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("Usage: fwctl")


def test_an_answer_that_cannot_be_written_is_told(daemon):
    environment = {**os.environ, "FWD_SOCKET": str(daemon)}
    for words in ("show session all", "show session info"):
        done = subprocess.run(
            f"{FWCTL} {words} > /dev/full", shell=True, capture_output=True, text=True, env=environment, check=False
        )
        assert (done.returncode, done.stderr) == (1, "fwctl: cannot write the answer: No space left on device\n")


def test_without_a_daemon_it_says_what_to_do(tmp_path):
    done = fwctl("show", "tunnel")
    assert done.returncode == 3 and "no fwd on /nonexistent: start it" in done.stderr
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(left))
    assert fwctl("show", "tunnel", path=left).returncode == 3
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path):
        done = fwctl("show", "tunnel", path=path)
        assert (done.returncode, done.stderr) == (3, f"fwctl: {path} is no socket: name fwd's --socket\n")
    done = fwctl("--socket", "", "show", "tunnel")
    assert done.returncode == 2 and done.stderr.startswith("fwctl: --socket is empty: name fwd's control socket\n")


def test_another_programs_socket_is_no_daemon(tmp_path):
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail.example.org\n")

        thread = threading.Thread(target=answer)
        thread.start()
        done = fwctl("show", "tunnel", path=path)
        thread.join(5)
    assert done.returncode == 3 and "Traceback" not in done.stderr


def test_what_fwd_says_before_it_hangs_up_is_heard(tmp_path, monkeypatch):
    path, has_hung_up = tmp_path / "busy.sock", threading.Event()
    encode = json.dumps
    monkeypatch.setattr(client.json, "dumps", lambda request: has_hung_up.wait(5) and encode(request))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def refuse():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b'{"jsonrpc":"2.0","id":null,"error":{"code":-32002,"message":"try again later"}}\n')
            has_hung_up.set()

        thread = threading.Thread(target=refuse)
        thread.start()
        asking = client.Client(str(path))
        with contextlib.closing(asking), pytest.raises(RpcError, match="try again later"):
            asking.call("session.info")
        thread.join(5)


def test_a_reader_that_has_enough_is_no_error(daemon):
    environment = {**os.environ, "FWD_SOCKET": str(daemon)}
    done = subprocess.run(
        f"{FWCTL} show session all | head -1", shell=True, capture_output=True, text=True, env=environment, check=False
    )
    assert (done.stdout, done.stderr) == ("-" * 80 + "\n", "")


def test_help_teaches_without_a_daemon():
    for words in ("", "show", "show session all", "clear session all"):
        done = fwctl(*words.split(), "--help")
        assert done.returncode == 0 and done.stdout.startswith("Usage: fwctl")
    assert "ingress-interface" in fwctl("show", "session", "all", "--help").stdout
    assert "Exit status" in fwctl("--help").stdout


def test_clearing_everything(daemon):
    done = fwctl("clear", "session", "id", "2", path=daemon)
    assert (done.returncode, done.stdout) == (0, "session 2 cleared\n")
    assert fwctl("clear", "session", "all", path=daemon).stdout == "1099 sessions cleared\n"

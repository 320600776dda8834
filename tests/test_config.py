import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwd.config import Config, ConfigError, load
from fwd.core.limits import Bounds
from fwd.core.policy import Action
from fwd.core.settings import UnknownSpi
from tests.builders import packed


def loaded(tmp_path, text):
    path = tmp_path / "fwd.toml"
    path.write_text(text)
    return load(path)


def refusal(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    return str(caught.value).replace(str(tmp_path), "")


def test_without_a_file_everything_is_in_zone_any_and_allowed():
    settings = Config().settings()
    rule = settings.policy.lookup("any", "any", packed("192.0.2.1"), packed("192.0.2.2"), "ipsec-esp")
    assert (rule.name, rule.action, rule.log_at_end) == ("any-any", Action.ALLOW, True)
    assert settings.zones.zone_of("eth0") == "any"


def test_a_whole_file(tmp_path):
    config = loaded(
        tmp_path,
        """
        default-zone = "none"
        [dataplane]
        fail = "closed"
        unknown-spi = "discard"
        max-sessions = 100
        [zones]
        trust = ["eth1", "veth*"]
        untrust = ["eth0"]
        [default-rule]
        name = "the-end"
        action = "allow"
        [timeouts]
        ike = 31
        ipsec-esp-udp = 32
        discard = 33
        [[rules]]
        name = "one"
        from = ["trust", "any"]
        to = ["untrust"]
        source = ["10.0.0.0/8", "2001:db8::1"]
        application = ["ike"]
        action = "deny"
        log-at-end = false
        """,
    )
    settings = config.settings()
    (rule,) = settings.policy.rules
    assert (rule.name, rule.action, rule.log_at_end) == ("one", Action.DENY, False)
    assert rule.matches("x", "untrust", packed("10.1.2.3"), packed("1.2.3.4"), "ike")
    assert rule.matches("x", "untrust", packed("2001:db8::1"), packed("2001:db8::2"), "ike")
    assert not rule.matches("x", "untrust", packed("11.1.2.3"), packed("1.2.3.4"), "ike")
    assert not rule.matches("x", "untrust", packed("10.1.2.3"), packed("1.2.3.4"), "ipsec-esp")
    assert settings.policy.default.name == "the-end"
    assert [settings.zones.zone_of(name) for name in ("veth7", "eth0", "lo")] == ["trust", "untrust", "none"]
    assert settings.timeouts_s == {"ike": 31, "ipsec-esp": 3600, "ipsec-udp": 3600, "ipsec-esp-udp": 32}
    assert (settings.discard_timeout_s, settings.unknown_spi) == (33, UnknownSpi.DISCARD)


RULE = '[[rules]]\nname = "r"\naction = "allow"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "/fwd.toml:1: not TOML: Invalid value: 'x ='; a text wants quotes"),
        ("[dataplan]", "/fwd.toml:1: dataplan: no such key here; did you mean 'dataplane'?"),
        (
            "[dataplane]\nqueue = 70000",
            ":2: dataplane.queue: found 70000; want a whole number from 0 to 65535",
        ),
        ("[dataplane]\nqueue = '7'", "dataplane.queue: found '7'; want a whole number from 0 to 65535, without quotes"),
        ("[dataplane]\nfail = 'ajar'", "dataplane.fail: found 'ajar'; want 'open' or 'closed'"),
        ("[[rules]]\naction = 'allow'", "/fwd.toml:1: rules #1, name: missing"),
        (
            RULE + "from = ['trsut']",
            "4: rules #1 'r', from: found zone 'trsut', which has no interface; want one of any",
        ),
        (RULE + "source = ['10.0.0.1/8']", "rules #1 'r', source #1: found '10.0.0.1/8'; want an address or a prefix"),
        (RULE + "application = ['ssh']", "rules #1 'r', application #1: found 'ssh'; want 'ipsec-udp', "),
        (RULE + RULE, "/fwd.toml:5: rules #2 'r', name: found 'r', as rules #1 is named"),
        (RULE + "source = []", "rules #1 'r', source: found []; want one entry at least"),
        (RULE + "from = []", "rules #1 'r', from: found []; want one entry at least"),
        (RULE + "to = []", "rules #1 'r', to: found []; want one entry at least"),
        (RULE + "application = []", "rules #1 'r', application: found []; want one entry at least"),
        (RULE + "destination = ['any', 'nonsense']", "rules #1 'r', destination #2: found 'nonsense'; want an address"),
        ("[zones]\nany = ['eth0']", "zones.any: found a zone 'any', which means every zone"),
        ("[zones]\na = ['e0']\nb = ['e1', 'e0']", "zones.b: found 'e0', which zone 'a' has; want it in one zone"),
        ("[control]\nsocket = 'here'", "control.socket: found 'here'; want a path from / on"),
        ("[control]\nsocket = '/'", "control.socket: found '/'; want a path"),
        ('[control]\nsocket = "/a\\u0000b"', "control.socket: found '/a\\x00b'; want a path"),
        ("[vici]\nsocket = '/" + "ä" * 60 + "'", "vici.socket: found '/ää"),
        ("[metrics]\nlisten = '0.0.0.0:9469'", "metrics.listen: found '0.0.0.0:9469', which others could reach"),
        ("[metrics]\nlisten = '[::]:9469'", "a reverse proxy that asks for one, or an ssh tunnel"),
        ("[metrics]\nlisten = '192.0.2.1:9469'", "want a loopback address such as 127.0.0.1:9469"),
        ("[metrics]\nlisten = 'localhost:9469'", "metrics.listen: found 'localhost:9469'; want 127.0.0.1:9469"),
        ("[metrics]\nlisten = ':9469'", "metrics.listen: found ':9469'; want 127.0.0.1:9469, [::1]:9469"),
        ("[metrics]\nlisten = '127.0.0.1:0'", "metrics.listen: found '127.0.0.1:0'; want"),
        ("[metrics]\nlisten = '::1:9469'", "metrics.listen: found '::1:9469'; want"),
        ("[metrics]\nlisten = '/run/'", "metrics.listen: found '/run/'; want a path from / on"),
        ("[metrics]\ntunnels = 5000", "metrics.tunnels: found 5000; want a whole number from 0 to 4096"),
        ("[dataplane]\nqeue = 1", "dataplane.qeue: no such key here; did you mean 'queue'? there are: queue, queue-l"),
        (RULE + "log_at_end = true", "rules #1 'r', log_at_end: no such key here; did you mean 'log-at-end'?"),
        ("colour = 1", "/fwd.toml:1: colour: no such key here; there are: dataplane, zones, default-zone"),
        ("queue = 20", "/fwd.toml:1: queue: no such key here; it belongs below [dataplane]"),
        ("[vici]\ndefault-zone = 'x'", "/fwd.toml:2: vici.default-zone: no such key here; it belongs above the first"),
        (
            "[zones]\ndefault-zone = 'x'",
            "zones.default-zone: found 'x'; want a list: [\"x\"], or to have default-zone",
        ),
        ("[zones]\ntrust = 'eth0'", "/fwd.toml:2: zones.trust: found 'eth0'; want a list: [\"eth0\"]"),
        ("[zones]\ntrust = [1]", "/fwd.toml:2: zones.trust #1: found 1; want text in quotes"),
        ("[rules]\nname = 'x'", "/fwd.toml:1: rules: found {'name': 'x'}; want [[rules]], a table with two brackets"),
        ("[[vici]]\nsocket = 'x'", "/fwd.toml:1: vici: found [{'socket': 'x'}]; want [vici], a table"),
        (RULE + "log-at-end = 'true'", "log-at-end: found 'true'; want true or false, without quotes"),
        (RULE + "source = '::1'", "/fwd.toml:4: rules #1 'r', source: found '::1'; want a list: [\"::1\"]"),
        (
            RULE + "# here\n\nsource = [ # there\n'::1',\n\n'1.2'\n]\n\n",
            "/fwd.toml:6: rules #1 'r', source #2: found '1.2'",
        ),
        (
            RULE + "[zones]\ntrsut = []\n" + RULE.replace('"r"', '"s"') + "from = ['trust']",
            "did you mean 'trsut'? want one of",
        ),
        ("[default-rule]\nname = 'any-any'", "/fwd.toml:2: default-rule.name: found 'any-any', as rules #1 is named"),
        ("[[rules]]\nname = 'a b'\naction = 'deny'", "/fwd.toml:2: rules #1 'a b', name: found 'a b'; want a name"),
        (
            "[dataplane]\nqueue = 1\nqueue = 2",
            "/fwd.toml:3: not TOML: Cannot overwrite a value: 'queue = 2'; the key is there twice",
        ),
        (
            "[log]\n[zones]\n[log]",
            "/fwd.toml:3: not TOML: Cannot declare ('log',) twice: '[log]'; the table is there twice",
        ),
        (
            "[ipfix]\ncollector = 'udp:collector.example:4739'",
            "ipfix.collector: found 'udp:collector.example:4739'; want",
        ),
        (
            "[ipfix]\ncollector = '192.0.2.9:4739'",
            "want udp:ADDRESS:PORT or tcp:ADDRESS:PORT, with an address and no name",
        ),
        ("[ipfix]\ncollector = 'udp:192.0.2.9:0'", "such as udp:192.0.2.9:4739 or tcp:[2001:db8::9]:4739"),
        ("[ipfix]\ncollector = 'tcp:[192.0.2.9]:4739'", "ipfix.collector: found 'tcp:[192.0.2.9]:4739'; want udp:ADD"),
        ("[ipfix]\ncollector = 'tcp:2001:db8::9:4739'", "ipfix.collector: found 'tcp:2001:db8::9:4739'; want udp:ADDR"),
        ("[ipfix]\ncollector = 'sctp:192.0.2.9:4739'", "ipfix.collector: found 'sctp:192.0.2.9:4739'; want udp:ADDRES"),
        ("x = " + "[" * 10_000, "/fwd.toml: arrays or tables are nested too deeply"),
        ("x = " + "9" * 5000, "/fwd.toml: a number has too many digits"),
        ("default-zone = 0x" + "f" * 5000, "default-zone: found too much to show; want"),
        ("[zones]\n" + "a." * 3000 + "a = 1", "zones.a: found"),
    ],
)
def test_errors_name_file_key_what_was_found_and_what_is_wanted(tmp_path, text, message):
    assert message in refusal(tmp_path, text)


def test_every_error_is_told_at_once(tmp_path):
    lines = refusal(tmp_path, "[dataplane]\nqueue = -1\nfail = 1\n").splitlines()
    assert len(lines) == 2 and all(re.match(r"/fwd.toml:[23]: dataplane\.", line) for line in lines)


def test_a_file_that_cannot_be_read_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary.toml")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(ConfigError, match=r"not a regular file|Is a directory"):
            load(path)


def test_only_a_default_file_that_is_not_there_means_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr("fwd.config.DEFAULT_PATH", tmp_path / "none.toml")
    assert load(None) == Config()

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fwd.config._text", forbidden)
    with pytest.raises(ConfigError, match=r"none.toml: Permission denied: give --config a file"):
        load(None)


@given(st.text(max_size=200))
def test_arbitrary_text_is_a_configuration_or_the_declared_error(tmp_path_factory, text):
    path = Path(tmp_path_factory.getbasetemp()) / "any.toml"
    path.write_text(text, "utf-8", errors="replace")
    try:
        load(path)
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(("percent", "sessions"), [(0, 0), (1, 1), (50, 10), (100, 20)])
def test_half_open_sessions_are_a_share_of_the_table_and_none_is_no_limit(tmp_path, percent, sessions):
    path = tmp_path / "fwd.toml"
    path.write_text(f"[dataplane]\nmax-sessions = 20\n[limits]\nhalf-open = {percent}\nsource = 3\npeers = 0\n")
    assert load(path).settings().limits == Bounds(source=3, peers=0, half_open=sessions)


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("", None),
        ("127.0.0.1:9469", ("127.0.0.1", 9469)),
        ("127.8.0.9:65535", ("127.8.0.9", 65535)),
        ("[::1]:1", ("::1", 1)),
        ("/run/fwd/metrics.sock", Path("/run/fwd/metrics.sock")),
    ],
)
def test_metrics_are_nowhere_on_loopback_or_at_a_path(listen, address):
    config = Config.model_validate({"metrics": {"listen": listen, "tunnels": 7}})
    assert config.metrics.address == address and config.settings().tunnel_totals == 7


@pytest.mark.parametrize(
    ("collector", "endpoint", "timeout_s"),
    [
        ("", None, None),
        ("udp:192.0.2.9:4739", ("udp", "192.0.2.9", 4739), 5),
        ("tcp:[2001:DB8::9]:1", ("tcp", "2001:db8::9", 1), 5),
    ],
)
def test_flows_go_to_a_collector_or_nowhere(tmp_path, collector, endpoint, timeout_s):
    config = loaded(tmp_path, f'[ipfix]\ncollector = "{collector}"\nactive-timeout = 5\n')
    assert (config.ipfix.endpoint, config.settings().flow_active_timeout_s) == (endpoint, timeout_s)

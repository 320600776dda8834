"""What words mean, and what may come next: the tree of commands as one grammar."""

import click
import pytest

from fwd import rpc
from fwd.cli import main, pipes
from fwd.cli.client import Client
from fwd.cli.grammar import HINT, Asked, Clause, Command, Group, Number, OneOf, clause, expected, filtered
from fwd.core.session import Application, SessionType
from fwd.core.state import State


@click.group(cls=Group)
def tree():
    pass


@tree.group()
def show():
    """Show something."""


@show.command("log")
@filtered(rpc.FILTER_KEYS)
@clause(
    "sort", type=OneOf({"bytes": "Most bytes first.", "age": "Oldest first."}), metavar="KEY", help="In which order."
)
@clause("limit", type=Number(1, 100), metavar="N", help="How many at most.")
@clause("last-hour", is_flag=True, help="Only the last hour.")
def show_log(chosen, sort, limit, last_hour):
    """Show the log."""
    return chosen, sort, limit, last_hour


@show.command("logo")
def show_logo():
    """Show the logo."""


def said(words):
    return tree.main(words.split(), prog_name="x", standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("show log", ({}, None, None, False)),
        ("s log lim 5", ({}, None, 5, False)),
        ("s log --limit 5", ({}, None, 5, False)),
        ("s log --lim=5 --last-hour", ({}, None, 5, True)),
        ("s log filter state active sort by", ({"state": "active"}, "bytes", None, False)),
        ("s log last so age f st ACT ru limit l 7", ({"state": "active", "rule": "limit"}, "age", 7, True)),
        ("s log filter application ipsec-esp", ({"application": "ipsec-esp"}, None, None, False)),
        ("s log filter state not ACT,disc sort b", ({"state": "not active,discard"}, "bytes", None, False)),
        ("s log filter from not,x to not y", ({"from": "not,x", "to": "not y"}, None, None, False)),
        ("s log filter min-kb -1 limit 1", ({"min-kb": "-1"}, None, 1, False)),
        ("s log filter state closed rule --json", ({"state": "closed", "rule": "--json"}, None, None, False)),
    ],
)
def test_words_in_any_order_and_their_beginnings(words, meant):
    assert said(words) == meant


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("show lo", "'lo' is ambiguous: log, logo"),
        ("show map", "No such command 'map': there are log, logo"),
        ("show log l 5", "'l' is ambiguous: limit, last-hour"),
        ("show log filter s 5", "'s' is ambiguous: source, source-port, state"),
        ("show log filter state c", "filter state: 'c' is ambiguous: closing"),
        ("show log filter state active,x,c", "filter state: 'c' is ambiguous: closing"),
        ("show log filter state not", "'state' wants a value after it"),
        ("show log not", "found 'not', want 'filter KEY VALUE ...'"),
        ("show log limit", "'limit' wants a value after it"),
        ("show log limit 5 limit 6", "'limit' stands there twice"),
        ("show log limit 500", "found '500', want a number from 1 to 100"),
        ("show log sort colour", "found 'colour', want bytes or age"),
        ("show log filter", "filter wants KEY VALUE"),
        ("show log filter limit 5", "no filter key 'limit'"),
        ("show log sort age 7", "found '7', want 'filter KEY VALUE ...' or 'limit N' or 'last-hour'"),
        ("show log --lmiit 5", "No such option '--lmiit'"),
        ("show logo 7", "found '7', want nothing more"),
    ],
)
def test_what_is_wrong_is_said(words, reason, monkeypatch):
    closing = rpc.FilterKey(words=("closing", "closed"))
    monkeypatch.setitem(rpc.FILTER_KEYS, "state", closing)
    for parameter in show_log.params:
        if isinstance(parameter, Clause) and parameter.word == "filter":
            monkeypatch.setattr(parameter, "keys", rpc.FILTER_KEYS)
    with pytest.raises(click.UsageError) as caught:
        said(words)
    assert reason in caught.value.format_message()


def next_words(words, tree=tree, asked=None):
    """What Tab offers, and what `?` shows beside it."""
    *before, incomplete = words.split(" ")
    items = expected(tree, before, incomplete, asked)
    return [item.value for item in items if item.type != HINT], [item.value for item in items if item.type == HINT]


@pytest.mark.parametrize(
    ("words", "offered", "shown"),
    [
        ("", ["show"], []),
        ("s lo", ["log", "logo"], []),
        ("show log ", ["filter", "sort", "limit", "last-hour"], ["--help", "|", "<Enter>"]),
        ("show log l", ["limit", "last-hour"], []),
        ("show log --l", ["--limit", "--last-hour"], []),
        ("show log limit ", [], ["<1-100>"]),
        ("show log --limit ", [], ["<1-100>"]),
        ("show log limit 5 ", ["filter", "sort", "last-hour"], ["--help", "|", "<Enter>"]),
        ("show log sort ", ["bytes", "age"], []),
        ("show log filter ", list(rpc.FILTER_KEYS), ["--help"]),
        ("show log filter state a", ["active"], []),
        ("show log filter source ", ["not"], ["<value>"]),
        ("show log filter source not ", [], ["<value>"]),
        ("show log filter type ", ["flow", "pred", "not"], []),
        ("show log filter type not ", ["flow", "pred"], []),
        ("show log filter type not flow,", ["flow,pred"], []),
        ("show log filter state active,d", ["active,discard"], []),
        ("show log filter state active min", ["min-age", "min-kb"], []),
        ("show log filter state active li", ["limit"], []),
        ("show lo ", [], []),
        ("show map ", [], []),
        ("show log colour ", [], []),
    ],
)
def test_what_may_come_next(words, offered, shown):
    assert next_words(words) == (offered, shown)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("show session id ", [str(number) for number in range(1, 11)]),
        ("show session id 1", ["1", "10"]),
        ("show session id 0", []),
        ("show session id x", []),
        ("show session all filter from not ", ["any", "trust", "untrust"]),
        ("show session all filter from not any,t", ["any,trust"]),
        ("clear session all filter tunnel g", ["gw"]),
        ("show session all filter rule any", ["any-any"]),
        ("monitor filter ingress-interface not ", ["left", "right", "wan"]),
        ("show tunnel detail ", ["gw", "net"]),
    ],
)
def test_live_values_are_offered(small_daemon, words, offered):
    asked = Asked(Client(str(small_daemon)))
    found, hints = next_words(words, main.fwctl, asked)
    asked.client.close()
    assert sorted(found) == sorted(offered) and len(hints) >= 1
    assert not next_words(words, main.fwctl, Asked(Client("/nonexistent")))[0]


def test_how_many_is_no_list_and_has_no_other_way_round():
    assert next_words("show session all filter count ", main.fwctl)[0] == ["yes", "no"]
    with pytest.raises(click.UsageError, match="want yes or no"):
        main.fwctl.main(["show", "session", "all", "filter", "count", "not"], standalone_mode=False)


def test_filter_words_are_the_cores():
    assert set(rpc.FILTER_KEYS["application"].words) == set(Application)
    assert set(rpc.FILTER_KEYS["protocol"].words) == {str(application.protocol) for application in Application}
    assert set(rpc.FILTER_KEYS["state"].words) < {state.lower() for state in State}
    assert set(rpc.FILTER_KEYS["type"].words) == {kind.lower() for kind in SessionType}


def commands(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, Group):
            yield from commands(command, (*path, name))


@pytest.mark.parametrize(("path", "command"), list(commands(main.fwctl)))
def test_every_command_is_of_the_grammar_and_says_what_it_does(path, command):
    assert isinstance(command, Command | Group) and command.help
    words = [parameter.word for parameter in command.params if isinstance(parameter, Clause)]
    optional = [p for p in command.params if isinstance(p, click.Argument) and not p.required]
    assert not (words and optional), "a word may be the argument, or a clause"
    for parameter in command.params:
        assert parameter.help


@pytest.mark.parametrize(
    ("behind", "printed"),
    [
        ("", "one\ntwo\nthree\n"),
        ("| match t", "two\nthree\n"),
        ("| match ^t | exc hre", "two\n"),
        ("| ex t | count", "Count: 1 line\n"),
        ("| count | match Count", "Count: 3 lines\n"),
    ],
)
def test_pipes(capsys, behind, printed):
    _, *parts = pipes.split(["x", *behind.split()])
    with pipes.through(parts):
        click.echo("one")
        click.echo("two\nthr", nl=False)
        click.echo("ee", nl=False)
    out = capsys.readouterr().out
    assert out == printed if behind else out + "\n" == printed


@pytest.mark.parametrize(
    ("behind", "reason"),
    [("| grep x", "there are match, except, count"), ("| match (", "no regular expression"), ("| match", "RE")],
)
def test_pipes_that_make_no_sense(behind, reason):
    _, *parts = pipes.split(behind.split())
    with pytest.raises(click.UsageError) as caught, pipes.through(parts):
        pass
    assert reason in caught.value.format_message()

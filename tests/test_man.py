"""The manual pages, built from what the code says of itself."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fwd import man, rpc
from fwd.cli.main import fwctl
from tests.cli.test_grammar import commands


@pytest.fixture(scope="module")
def pages():
    return man.pages()


def plain(page):
    """The text of a page, without fonts and escapes."""
    text = re.sub(r"\\f[BIR]|\\&", "", page)
    return text.replace(r"\-", "-").replace(r"\(aq", "'").replace(r"\(dq", '"').replace(r"\~", " ")


def test_every_command_and_filter_key_is_there(pages):
    page = plain(pages["man1/fwctl.1"])
    headings = re.findall(r"^\.SS (.*)", page, re.MULTILINE)
    known = [" ".join(path) for path, command in commands(fwctl) if not hasattr(command, "commands")]
    assert [heading for heading in headings if heading in known] == known
    assert headings[-6:] == ["| match", "| except", "| count", "exit", "quit", "set cli pager"]
    for key in {**rpc.FILTER_KEYS, **rpc.LOG_FILTER_KEYS}:
        assert f"\n{key} VALUE\n" in page
    assert " explain packet src ADDRESS dst ADDRESS spi SPI [ports PORT PORT]" in page.replace("\n", " ")


def test_every_option_and_key_of_the_daemon_is_there(pages):
    for option in man.fwd.params:
        assert f"\n.TP\n{option.opts[0]}" in plain(pages["man8/fwd.8"])
    page = plain(pages["man5/fwd.toml.5"])
    for name, field in man.Config.model_fields.items():
        assert re.search(rf"^(\.SS \[+)?{field.alias or name}\b", page, re.MULTILINE)
    assert "\nqueue-length = 4096\n" in page and "[16 to 65536; restart]" in page.replace("\n", " ")


def test_roff_takes_nothing_for_a_request_or_an_escape(pages):
    known = {".TH", ".SH", ".SS", ".PP", ".TP", ".nf", ".fi", ".RS", ".RE"}
    for page in pages.values():
        for line in page.splitlines():
            assert len(line) <= 120 and line.isprintable()
            assert not line.startswith("'") and (not line.startswith(".") or line.split()[0] in known), line
            assert not re.sub(r"\\(f[BIR]|-|e|&|~|\((aq|dq|ha|ti|ga))", "", line).count("\\"), line
        assert page.count(".nf\n") == page.count(".fi\n")


def test_the_same_page_is_built_again(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert man.pages() == man.pages()
    assert all("1970-01-02" in page.splitlines()[0] for page in man.pages().values())


@pytest.mark.parametrize("formatter", ["groff -ww -man -Tutf8 -z", "mandoc -Tlint"])
def test_formatters_have_nothing_to_say(pages, formatter, tmp_path):
    command = formatter.split()
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    for name, page in pages.items():
        path = tmp_path / Path(name).name
        path.write_text(page)
        done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("", "")

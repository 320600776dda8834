"""`fwd --print-default-config`: the documented reference, from the models alone."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from fwd import reference, schema, toml_lines
from fwd.config import Config, load
from fwd.reference import WIDTH, default_config
from fwd.schema import AtStart, Section

INSTALLED = Path(__file__).parents[1] / "systemd" / "fwd.toml"


def everywhere(model=Config):
    for key in schema.keys(model):
        yield key
        if key.section:
            yield from everywhere(key.section)


def test_it_says_what_the_defaults_are_and_every_key():
    assert Config.model_validate(tomllib.loads(default_config())) == Config()
    for key in everywhere():
        assert re.search(
            rf"^(# )?({re.escape(key.name)} = |\[+{re.escape(key.name)}\])", default_config(), re.MULTILINE
        )


def test_the_file_that_is_installed_is_what_the_command_prints():
    command = [sys.executable, "-c", "from fwd.daemon import main; main()", "--print-default-config"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert INSTALLED.read_text() == printed, "fwd --print-default-config > systemd/fwd.toml"
    assert load(INSTALLED) == Config()


def test_its_examples_are_right(tmp_path):
    """They begin with `# ` and are TOML behind it, unlike the comments."""
    example = re.compile(r"^# (\[\[?[a-z-]+\]\]?|[a-z-]+ = [\"\[].*)$", re.MULTILINE)
    file = tmp_path / "fwd.toml"
    file.write_text(example.sub(r"\1", default_config()))
    config = load(file)
    assert config.zones == {"trust": ["eth1", "veth*"], "untrust": ["eth0"]}
    assert [rule.name for rule in config.rules] == ["any-any", "branch-through"]


def test_it_is_readable():
    lines = default_config().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("key", [key for key in everywhere() if key.choices], ids=lambda key: key.name)
def test_values_that_a_description_quotes_are_values_of_the_key(key):
    assert all(f'"{choice}"' in reference.remark(key) for choice in key.choices)
    assert {*re.findall(r'"([a-z0-9-]+)"', key.description)} <= {*key.choices}


class _Inner(Section):
    """Below a table."""

    size: int | None = Field(default=None, description="none: as it comes", examples=[7])


class _Outer(Section):
    """A section that nobody has thought of."""

    mode: AtStart[Literal["one", "two"]] = Field(default="one", description="how")
    tags: list[str] = Field(default=[], description="word " * 20)
    inner: _Inner = _Inner()


class _File(Section):
    outer: _Outer = _Outer()


def test_a_section_that_is_new_needs_nothing_but_its_descriptions(monkeypatch):
    monkeypatch.setattr(reference, "Config", _File)
    text = default_config()
    assert _File.model_validate(tomllib.loads(text)) == _File()
    assert text.split("file.\n\n", 1)[1] == (
        "# A section that nobody has thought of.\n"
        "[outer]\n"
        'mode = "one"                # how [one of "one", "two"; restart]\n'
        f"tags = []                   # {'word ' * 18}".rstrip()
        + "\n"
        "                            # word word\n"
        "\n"
        "# Below a table.\n"
        "[outer.inner]\n"
        "# size = 7                  # none: as it comes\n"
    )


def test_which_keys_want_a_restart_is_known_by_the_file_alone():
    marked = re.findall(r"^([a-z-]+) = .*\n?(?: +#.*\n?)*", INSTALLED.read_text(), re.MULTILINE)
    assert marked
    names = [name.split(".")[1] for name in Config().restart_keys()]
    text = re.sub(r"\n {5,}# ", " ", INSTALLED.read_text())
    assert re.findall(r"^([a-z-]+) = .*restart\]$", text, re.MULTILINE) == names


def test_lines_are_found_in_large_files_too_if_that_is_cheap():
    rules = "".join(f'[[rules]]\nname = "r{n}"\naction = "allow"\n\n' for n in range(300))
    lines = toml_lines.Lines(rules)
    assert [lines.find(("rules", n, "action")) for n in (250, 3)] == [4 * n + 3 for n in (250, 3)]
    endless = toml_lines.Lines("x = [\n" + "1,\n" * 2000 + "]\ny = 2\n")
    assert endless.find(("y",)) is None

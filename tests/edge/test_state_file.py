"""The state file: what was written is read again, or is set aside."""

import os
import sqlite3
import stat

import pytest

from fwd.edge.state_file import StateError, StateFile

ROWS = {b"a": b"1" * 100, b"b": b"", b"totals": bytes(range(256))}


@pytest.fixture
def path(tmp_path):
    tmp_path.chmod(0o755)
    return tmp_path / "state"


def write(path, rows, layout=1):
    file = StateFile(path, layout)
    found = file.open()
    file.write(rows)
    file.close()
    return found


def test_what_is_written_is_there_the_next_time(path):
    assert write(path, ROWS) == {}
    assert write(path, {b"a": None, b"c": b"3"}) == ROWS
    assert write(path, {}) == {b"b": b"", b"totals": ROWS[b"totals"], b"c": b"3"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_was_committed_outlives_a_kill(path):
    if (pid := os.fork()) == 0:
        file = StateFile(path, 1)
        file.open()
        file.write(ROWS)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert write(path, {}) == ROWS


def damage_a_byte(path):
    """One in the middle of a row's bytes: nothing but its checksum tells."""
    octets = bytearray(path.read_bytes())
    octets[octets.index(b"1" * 100) + 50] ^= 1
    path.write_bytes(octets)


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(os.urandom(10_000))


def another_program(path):
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE record (key, body, checksum)")
    database.close()


def another_boot(path):
    with sqlite3.connect(path) as database:
        database.execute("UPDATE world SET name = 'boot 1, net 2'")
    database.close()


def no_table(path):
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE record")
    database.close()


def text_for_bytes(path):
    with sqlite3.connect(path) as database:
        database.execute("UPDATE record SET body = 'text'")
    database.close()


def a_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def a_second_name(path):
    path.with_name("elsewhere").hardlink_to(path)


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = [damage_a_byte, cut, empty, garbage, another_program, another_boot, no_table, text_for_bytes]
DAMAGES += [a_link, a_second_name, a_folder, a_pipe]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_trusted_is_set_aside_whole_and_said_so(path, caplog, damage):
    write(path, ROWS)
    damage(path)
    inode = os.lstat(path).st_ino
    assert write(path, {b"new": b"1"}) == {}
    assert os.lstat(path.with_name("state.set-aside")).st_ino == inode
    assert "sessions begin anew" in caplog.text and "kept as" in caplog.text
    assert write(path, {}) == {b"new": b"1"}


def test_another_layout_is_set_aside(path, caplog):
    write(path, ROWS)
    assert write(path, {}, layout=2) == {}
    assert "layout of another version of fwd (1, not 2)" in caplog.text


def test_a_folder_where_others_may_write_is_refused(path):
    path.parent.chmod(0o777)
    with pytest.raises(StateError, match=r"can be changed by others.*\[state\] file chooses another"):
        StateFile(path, 1).open()


def test_a_file_that_another_process_has_is_left_alone(path):
    first = StateFile(path, 1)
    first.open()
    first.write(ROWS)
    with pytest.raises(StateError, match="another fwd has it"):
        StateFile(path, 1).open()
    first.write({b"more": b"2"})
    first.close()
    assert write(path, {}) == {**ROWS, b"more": b"2"}


def test_a_full_disk_is_told_and_nothing_of_the_rows_is_kept(path):
    file = StateFile(path, 1)
    file.open()
    file.write(ROWS)
    file._database.execute("PRAGMA max_page_count = 8")
    with pytest.raises(StateError, match="full"):
        file.write({b"small": b"1", b"large": bytes(10**6)})
    file.write({b"a": b"still"})
    file.close()
    assert write(path, {}) == {**ROWS, b"a": b"still"}

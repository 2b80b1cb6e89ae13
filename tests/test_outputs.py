import os
import signal
import subprocess
import sys

import pytest

from stages.core import outputs
from stages.core.errors import InputError


def test_a_file_appears_only_when_its_writing_ended_well(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with outputs.whole_file(path) as beside:
        beside.write_text("all")
        assert not path.exists()
    assert path.read_text() == "all"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_writing_leaves_the_former_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("former")
    with pytest.raises(ZeroDivisionError), outputs.whole_file(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["/dev/null", "."])
def test_what_is_not_a_plain_file_is_never_replaced(path):
    with pytest.raises(InputError, match=r"is not a plain file|is a directory"), outputs.whole_file(path):
        pass


@pytest.mark.parametrize("refusing", [outputs.refuse_occupied, outputs.refuse_no_file])
def test_a_link_to_nothing_is_named(tmp_path, refusing):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link to something that is not there"):
        refusing(tmp_path / "link")


def test_a_place_without_a_name_is_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is no name to write to"), outputs.locked("."):
        pass
    with pytest.raises(InputError, match="is no name to write to"):
        outputs.refuse_occupied(".")


def test_a_file_where_a_directory_must_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "new" / "b"
    for writing in (outputs.whole_file, outputs.whole_dir, outputs.locked):
        with pytest.raises(InputError, match="file/new/b cannot be written"), writing(path):
            pass
    with pytest.raises(InputError, match="file is no directory that you may write to"):
        outputs.refuse_occupied(path)


@pytest.mark.parametrize("writing", [outputs.whole_file, outputs.whole_dir, outputs.locked])
def test_a_place_that_the_system_keeps_for_itself_is_refused_in_words(writing):
    with pytest.raises(InputError, match="/proc/b cannot be written: "), writing("/proc/b"):
        pass


def test_a_directory_appears_only_when_its_writing_ended_well(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), outputs.whole_dir(path) as beside:
        (beside / "a").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with outputs.whole_dir(path) as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "a").write_text("all")
        assert not path.exists()
    assert (path / "sub" / "a").read_text() == "all"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_no_place_for_a_directory():
    with pytest.raises(InputError, match="/dev/null already holds something"), outputs.whole_dir("/dev/null"):
        pass


def test_an_empty_directory_may_be_written_and_a_full_one_may_not(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    with outputs.whole_dir(path) as beside:
        (beside / "a").touch()
    with pytest.raises(InputError, match="already holds something"), outputs.whole_dir(path):
        pass
    assert [file.name for file in path.iterdir()] == ["a"]


def test_what_a_killed_process_of_the_same_id_left_does_not_come_along(tmp_path):
    left = tmp_path / f".out.{outputs.HOST}-{os.getpid()}.partial"
    left.mkdir()
    (left / "old").touch()
    with outputs.whole_dir(tmp_path / "out") as beside:
        (beside / "new").touch()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new"]


DIES = """
import os, signal, sys
from stages.core import outputs
with outputs.claimed(sys.argv[1]), getattr(outputs, sys.argv[2])(sys.argv[1]) as beside:
    (beside / "half" if beside.is_dir() else beside).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("writing", ["whole_file", "whole_dir"])
def test_what_a_killed_process_left_goes_when_the_same_output_is_written_again(tmp_path, writing):
    path = tmp_path / "out"
    for name in (".out.partial", ".out.2.partial", ".out.manifest.json.7.partial", "out.4.partial"):
        (tmp_path / name).touch()  # another's, or an interrupted evaluation's
    others = set(tmp_path.iterdir())
    subprocess.run([sys.executable, "-c", DIES, str(path), writing], check=False)
    left = set(tmp_path.iterdir()) - others
    assert {file.suffix for file in left} == {".partial", ".lock"}
    with outputs.claimed(path), getattr(outputs, writing)(path) as beside:
        assert set(tmp_path.iterdir()) - others == {beside, tmp_path / ".out.lock"}
    assert set(tmp_path.iterdir()) - others == {path}


def test_what_another_machine_left_is_named_and_stays(tmp_path, capsys):
    left = tmp_path / ".out.elsewhere-12.partial"
    left.touch()
    with outputs.claimed(tmp_path / "out"):
        assert f"{left} was left unfinished on elsewhere: remove it if" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [left]


def test_a_claim_that_comes_to_nothing_leaves_no_directories(tmp_path):
    with pytest.raises(ZeroDivisionError), outputs.claimed(tmp_path / "new" / "deep" / "out"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_standard_output_needs_no_right(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with outputs.claimed("-"):
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a" * 250, f"{'b' * 256}/c"])
def test_a_name_too_long_is_refused_before_anything_is_made(tmp_path, name):
    with pytest.raises(InputError, match=r"cannot be written: .*(name too long|is too long)"):
        outputs.refuse_occupied(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/proc/out", "/sys/out", "/proc/self/new/out"])
def test_a_place_that_takes_no_files_is_refused_even_to_root(path):
    with pytest.raises(InputError, match=f"{path} cannot be written: "):
        outputs.refuse_unwritable(path)


HOLDER = """
import sys, time
from stages.core import outputs
with outputs.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_a_second_process_out_until_the_first_dies(tmp_path):
    path = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="is being written by another process"), outputs.locked(path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with outputs.locked(path):
        pass
    assert list(tmp_path.iterdir()) == []

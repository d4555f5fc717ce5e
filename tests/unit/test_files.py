"""Files and folders replaced whole, locks, and what a run that is another one is told."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal

import pytest

from amphista import files
from amphista.errors import ConfigError, DataError
from amphista.files import Lock, check_same_run, new_folder, read_json, recover_folder, replace_folder, replacing


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": "ü\n"})
    assert read_json(path) == {"a": "ü\n"} and b"\r" not in path.read_bytes()
    with pytest.raises(KeyError), replacing(path) as stream:
        stream.write(b"half of")
        raise KeyError("in the middle")
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": "ü\n"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_json_object_is_refused_with_its_path(tmp_path):
    for content in ("[1]", "{", "nothing"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DataError, match=r"a\.json"):
            read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "b.json")


def replaced(folder, content):
    fresh = new_folder(folder)
    (fresh / "content").write_text(content)
    replace_folder(fresh, folder)


@pytest.mark.parametrize("killed_at", ["rename", "rmtree", "never"])
def test_a_folder_is_whole_wherever_a_replacement_is_killed(tmp_path, monkeypatch, killed_at):
    folder = tmp_path / "state"
    replaced(folder, "old")
    (tmp_path / "other").mkdir()
    done = []

    def dying(self, target):
        if done and killed_at == "rename":
            raise SystemExit
        done.append(self)
        os.rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(files.Path, "rename", dying)
        if killed_at == "rmtree":
            patched.setattr(files.shutil, "rmtree", lambda path, **_: path.name == ".old-state" and done and exit())
        try:
            replaced(folder, "new")
        except SystemExit:
            assert killed_at != "never"
    recover_folder(folder)
    assert (folder / "content").read_text() == ("old" if killed_at == "rename" else "new")
    assert {path.name for path in tmp_path.iterdir()} == {"state", "other"}


def hold(path, pipe):
    lock = Lock(path, "held")
    pipe.send("held")
    pipe.recv()
    del lock


def test_all_of_a_folder_is_on_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.add(os.fstat(handle).st_ino), sync(handle)))
    fresh = new_folder(tmp_path / "run")
    (fresh / "deep").mkdir()
    (fresh / "a.bin").write_bytes(b"1")
    (fresh / "deep" / "b.bin").write_bytes(b"2")
    wanted = {path.stat().st_ino for path in (fresh / "a.bin", fresh / "deep" / "b.bin", fresh)}
    replace_folder(fresh, tmp_path / "run")
    assert wanted <= synced


def test_a_lock_is_held_by_one_and_given_back_by_a_killed_process(tmp_path):
    path = tmp_path / "deep" / ".lock"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(path, theirs))
    process.start()
    assert ours.recv() == "held"
    with pytest.raises(ConfigError, match="somebody is at work"):
        Lock(path, "somebody is at work")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with Lock(path, "still held"), pytest.raises(ConfigError, match="held by us"):
        Lock(path, "held by us")
    Lock(path, "given back").release()


def test_a_folder_that_cannot_be_is_refused_by_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*file"):
        Lock(tmp_path / "file" / ".lock", "held")


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog):
    def refuse(stream, *, wait):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock", refuse)
    with Lock(tmp_path / ".lock", "held"):
        assert "no locks" in caplog.text


def test_another_run_is_told_by_what_differs():
    there = {"seed": 8, "target": {"type": "int8", "sha": "a" * 80}, "gone": 1, "same": [1, 2]}
    check_same_run("here", there, {**there, "same": (1, 2)})
    here = {"seed": 9, "target": {"type": "float32", "sha": "b" * 80}, "same": [1, 2]}
    with pytest.raises(ConfigError) as told:
        check_same_run("runs/a holds another run", there, here)
    sentence = str(told.value)
    assert sentence.startswith("runs/a holds another run: gone is not set, there it is 1; seed is 9, there it is 8; ")
    assert "target.type is float32, there it is int8" in sentence and "a" * 41 not in sentence
    many = {f"setting{number}": number for number in range(9)}
    with pytest.raises(ConfigError, match="and 4 more"):
        check_same_run("x", many, {})

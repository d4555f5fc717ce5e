from __future__ import annotations

import json
import subprocess
import sys

import numpy
import torch

from amphista import provenance


def test_versions_are_the_installed_ones():
    found = provenance.versions()
    assert found["torch"] == torch.__version__ and found["numpy"] == numpy.__version__
    assert found["python"] == sys.version.split()[0]


def test_an_absent_package_is_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package-at-all"))
    assert set(provenance.versions()) == {"python", "numpy"}


def test_the_record_is_json_and_names_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/home/me/bin/amphista", "train", "--data", "/data/a.jsonl", "--out=/runs/b", "--set", "a=b"]
    )
    record = json.loads(json.dumps(provenance.record()))
    assert record["command"] == "amphista train --data a.jsonl --out=b --set a=b"
    assert set(record) == {"date", "command", "git", "versions", "machine"}
    assert record["machine"]["processor"] and record["machine"]["torch_threads"] >= 1


def test_git_state_is_none_where_there_is_no_git(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", missing)
    assert provenance.git_state() is None


def make_checkout(folder):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)

    (folder / "tracked.py").write_text("1\n")
    (folder / "untracked.py").write_text("2\n")
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "one")


def test_git_state_marks_local_changes_and_ignores_foreign_checkouts(monkeypatch, tmp_path):
    make_checkout(tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tracked.py"))
    clean = provenance.git_state()
    assert clean and not clean.endswith("+")
    (tmp_path / "tracked.py").write_text("3\n")
    assert provenance.git_state() == clean + "+"
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "untracked.py"))
    assert provenance.git_state() is None, "installed inside somebody else's checkout"

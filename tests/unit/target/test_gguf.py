from __future__ import annotations

import hashlib
import json

import pytest

from amphista.errors import TargetError
from amphista.target import gguf
from amphista.target.gguf import MANIFEST, PackagedTarget, convert, gguf_target_folder, is_whole, packaged_target_folder

CONTENT = b"GGUF and what follows"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PACKAGED = PackagedTarget(
    hub_id="owner/model", requirement="some-package==1.0", member="inside/model.gguf", sha256=SHA256
)


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """Conversion replaced by two small files; counts how often it ran."""
    runs = []

    def save(gguf_file, folder):
        runs.append(gguf_file.read_bytes())
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(1000))

    monkeypatch.setattr(gguf, "_save_as_transformers", save)
    monkeypatch.setenv("AMPHISTA_CACHE", str(tmp_path / "cache"))
    return runs


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(CONTENT)
    return file


def silent(line):
    pass


def left_over(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


def test_convert_once(converted, source, tmp_path):
    folder = tmp_path / "targets" / "here"
    assert convert(source, folder, silent, sha256=SHA256) == folder
    assert is_whole(folder) and left_over(folder) == []
    assert json.loads((folder / MANIFEST).read_text())["gguf_sha256"] == SHA256
    convert(source, folder, silent, sha256=SHA256)
    assert converted == [CONTENT], "a whole folder is not converted again"


def test_is_whole_notices_what_is_missing_truncated_or_altered(converted, source, tmp_path):
    folder = tmp_path / "targets" / "here"

    def fresh():
        convert(source, folder, silent, sha256=SHA256)
        assert is_whole(folder)

    def alter(data):
        return data[:500] + b"\x01" + data[501:]

    for change in (lambda data: data[:-1], alter, lambda data: data + b"\x00"):
        fresh()
        weights = folder / "model.safetensors"
        weights.write_bytes(change(weights.read_bytes()))
        assert not is_whole(folder)
    fresh()
    (folder / "config.json").unlink()
    assert not is_whole(folder)
    assert len(converted) == 4, "each broken folder is redone"


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"files": []}', '{"files": 3}', "null"])
def test_a_damaged_manifest_is_not_whole(tmp_path, manifest):
    assert not is_whole(tmp_path)
    (tmp_path / MANIFEST).write_text(manifest)
    assert not is_whole(tmp_path)


def test_a_failed_conversion_leaves_nothing_behind(converted, source, tmp_path, monkeypatch):
    folder = tmp_path / "targets" / "here"

    def fail(gguf_file, temporary):
        (temporary / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "_save_as_transformers", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(source, folder, silent, sha256=SHA256)
    assert not folder.exists() and left_over(folder) == []


def test_a_conversion_that_another_process_finished_first_is_used(converted, source, tmp_path, monkeypatch):
    folder = tmp_path / "targets" / "here"
    save = gguf._save_as_transformers

    def save_twice(gguf_file, temporary):
        save(gguf_file, temporary)
        if not folder.exists():
            monkeypatch.setattr(gguf, "_save_as_transformers", save)
            convert(gguf_file, folder, silent, sha256=SHA256)

    monkeypatch.setattr(gguf, "_save_as_transformers", save_twice)
    assert convert(source, folder, silent, sha256=SHA256) == folder
    assert is_whole(folder) and left_over(folder) == []


def test_a_damaged_gguf_file_is_refused(converted, source, tmp_path):
    source.write_bytes(CONTENT[:-1])
    with pytest.raises(TargetError, match=r"model\.gguf is damaged"):
        convert(source, tmp_path / "targets" / "here", silent, sha256=SHA256)
    assert converted == []


def test_a_folder_per_file_content(converted, source, tmp_path):
    first = gguf_target_folder(source, silent)
    source.write_bytes(CONTENT + b"!")
    second = gguf_target_folder(source, silent)
    assert first != second and is_whole(first) and is_whole(second)
    with pytest.raises(TargetError, match="there is no file"):
        gguf_target_folder(tmp_path / "none.gguf", silent)


def test_a_file_placed_by_hand_needs_no_download(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "_download", None)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.gguf").write_bytes(CONTENT)
    folder = packaged_target_folder(PACKAGED, silent)
    assert is_whole(folder) and folder == gguf.packaged_folder(PACKAGED)
    (tmp_path / "cache" / "model.gguf").unlink()
    assert packaged_target_folder(PACKAGED, silent) == folder, "once converted, the file is not needed"


def test_a_failed_download_says_what_to_do(converted, monkeypatch):
    from types import SimpleNamespace

    answer = SimpleNamespace(returncode=1, stderr="noise\nERROR: no matching distribution\n")
    monkeypatch.setattr(gguf.subprocess, "run", lambda *args, **kwargs: answer)
    with pytest.raises(TargetError) as caught:
        packaged_target_folder(PACKAGED, silent)
    for part in ("some-package==1.0", "ERROR: no matching distribution", "place model.gguf"):
        assert part in str(caught.value)


def test_where_targets_live(monkeypatch, tmp_path):
    monkeypatch.setenv("AMPHISTA_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert gguf.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("AMPHISTA_CACHE")
    assert gguf.cache_folder() == tmp_path / "b" / "amphista"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf.cache_folder() == tmp_path / ".cache" / "amphista"

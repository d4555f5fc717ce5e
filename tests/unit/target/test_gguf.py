from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from gguf import GGUFReader, GGUFWriter

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


def test_a_cache_that_cannot_be_written_is_named_and_how_to_name_another(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AMPHISTA_CACHE", str(tmp_path / "file"))
    for find in (lambda: gguf_target_folder(source, silent), lambda: packaged_target_folder(PACKAGED, silent)):
        with pytest.raises(TargetError, match=r"file.* cannot be written .*AMPHISTA_CACHE"):
            find()


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
    monkeypatch.setattr(gguf, "INDEX", "http://127.0.0.1:9")
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


# -- hashes are kept --------------------------------------------------------------------------------------------------


def counted(monkeypatch):
    """The files that were read to be hashed, from now on."""
    read, real = [], gguf.file_sha256
    monkeypatch.setattr(gguf, "file_sha256", lambda path: read.append(path.name) or real(path))
    return read


def test_a_second_load_reads_no_file_again(converted, source, monkeypatch):
    folder = gguf_target_folder(source, silent)
    read = counted(monkeypatch)
    assert gguf_target_folder(source, silent) == folder and is_whole(folder) and read == []
    source.write_bytes(CONTENT)  # another time, the same bytes
    assert gguf_target_folder(source, silent) == folder and read == ["model.gguf"]
    assert gguf_target_folder(source, silent) == folder and read == ["model.gguf"]


def test_a_folder_that_was_copied_is_hashed_once(converted, source, tmp_path, monkeypatch):
    folder = gguf_target_folder(source, silent)
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    read = counted(monkeypatch)
    assert is_whole(copied) and sorted(read) == ["config.json", "model.safetensors"]
    assert is_whole(copied) and len(read) == 2


def test_hashes_that_cannot_be_kept_are_done_without(converted, source, tmp_path, monkeypatch):
    folder = gguf_target_folder(source, silent)
    (tmp_path / "cache" / "targets" / "hashes.json").write_text("[3]")
    monkeypatch.setattr(gguf.os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError("read-only")))
    assert gguf_target_folder(source, silent) == folder


# -- end tokens -------------------------------------------------------------------------------------------------------


def test_every_end_token_of_the_metadata(tmp_path):
    writer = GGUFWriter(tmp_path / "some.gguf", "llama")
    writer.add_eos_token_id(7)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 9)
    writer.add_uint32("tokenizer.ggml.eom_token_id", 11)
    writer.add_array("tokenizer.ggml.eog_token_ids", [9, 13])
    writer.add_uint32("tokenizer.ggml.padding_token_id", 5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert gguf.end_tokens(GGUFReader(tmp_path / "some.gguf")) == [7, 9, 11, 13]


# -- fetching a wheel -------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index on this machine, which answers over HTTP as the public one does."""
    root = tmp_path / "index"
    (root / "some-package" / "1.0").mkdir(parents=True)
    wheel = root / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(PACKAGED.member, CONTENT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(root)))
    address = f"http://127.0.0.1:{server.server_port}"
    file = {
        "packagetype": "bdist_wheel",
        "filename": wheel.name,
        "url": f"{address}/{wheel.name}",
        "digests": {"sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()},
    }
    (root / "some-package" / "1.0" / "json").write_text(json.dumps({"urls": [{"packagetype": "sdist"}, file]}))
    monkeypatch.setattr(gguf, "INDEX", address)
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf.shutil, "which", lambda name: None)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield wheel
    server.shutdown()
    server.server_close()
    thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *message):
        pass


def test_without_pip_the_wheel_comes_over_https(converted, index):
    assert is_whole(packaged_target_folder(PACKAGED, silent)) and converted == [CONTENT]


def test_a_wheel_that_arrives_damaged_is_refused(converted, index):
    index.write_bytes(index.read_bytes() + b"!")
    with pytest.raises(TargetError, match=r"some_package-1.0-py3-none-any.whl arrived damaged.*place model.gguf"):
        packaged_target_folder(PACKAGED, silent)
    assert converted == []


def test_every_way_that_failed_is_named(converted, index, monkeypatch):
    monkeypatch.setattr(gguf, "INDEX", gguf.INDEX + "/nowhere")
    with pytest.raises(TargetError, match=r"pip: not in this environment; uv: not on the path; https: HTTP Error 404"):
        packaged_target_folder(PACKAGED, silent)

"""Publishing: a folder is checked whole, and then exactly its three files arrive, at a hub that speaks the real
client's protocol on this machine.
"""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from amphista.drafter.card import CardConfig, write_card
from amphista.drafter.checkpoint import load_drafter, save_drafter
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.publish import publishable_files, push
from amphista.errors import DrafterError
from tests.tiny import shaken
from tests.unit.drafter.test_card import FULL, TRAINED


@pytest.fixture
def folder(tmp_path, target):
    drafter = shaken(Medusa(MedusaConfig(num_heads=2), target.spec, target.shared))
    card = write_card(drafter, "owner/target", TRAINED, FULL)
    save_drafter(drafter, tmp_path / "here", target.fingerprint, card=card, training=TRAINED, dtype=torch.bfloat16)
    (tmp_path / "here" / "notes.txt").write_text("mine alone")
    return tmp_path / "here"


class Hub(BaseHTTPRequestHandler):
    """What the client asks of the hub to make a model repository and commit small files to it."""

    def log_message(self, *arguments):
        pass

    def _answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        repo = self.path.removeprefix("/api/models/").split("?")[0]
        if repo in self.server.repos:
            self._answer(200, {"id": repo, "private": self.server.repos[repo]["private"]})
        else:
            self._answer(404, {"error": "Repository not found"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        server = self.server
        server.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.decode().splitlines()]
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for line in lines[1:]:
                server.repos[repo]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"{server.address}/{repo}/commit/abc", "commitOid": "abc", "success": True})
        else:
            self._answer(404, {"error": f"nothing at {path}"})

    def _chunks(self):
        content = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return content

    def _create(self, wish):
        repo = f"{wish.get('organization') or 'me'}/{wish['name']}"
        url = f"{self.server.address}/{repo}"
        if wish.get("organization") == "forbidden":
            self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        elif repo in self.server.repos:
            self._answer(409, {"error": "You already created this model repo", "url": url})
        else:
            private = wish.get("visibility") == "private" or wish.get("private") is True
            self.server.repos[repo] = {"private": private, "files": {}}
            self._answer(200, {"url": url, "name": repo})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.tokens = {}, set()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_for_tests")
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


# -- what arrives -----------------------------------------------------------------------------------------------------


def test_exactly_the_three_files_arrive(folder, hub, target, tmp_path):
    assert push(folder, "owner/name") == f"{hub.address}/owner/name"
    repo = hub.repos["owner/name"]
    names = ["README.md", "config.json", "model.safetensors"]
    assert sorted(repo["files"]) == names and repo["private"] is False
    for name in names:
        assert repo["files"][name] == (folder / name).read_bytes()
    assert hub.tokens == {"Bearer hf_for_tests"}
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in repo["files"].items():
        (fetched / name).write_bytes(content)
    assert load_drafter(str(fetched), target.spec, target.shared, target.fingerprint).name == "medusa"


def test_a_second_push_replaces_the_first(folder, hub):
    push(folder, "owner/name")
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\nMore.\n")
    push(folder, "owner/name")
    assert hub.repos["owner/name"]["files"]["README.md"] == readme.read_bytes()


def test_private_makes_a_private_repository(folder, hub):
    push(folder, "owner/name", private=True)
    assert hub.repos["owner/name"]["private"] is True and len(hub.repos["owner/name"]["files"]) == 3


def test_private_never_uploads_to_a_public_repository(folder, hub):
    hub.repos["owner/name"] = {"private": False, "files": {}}
    with pytest.raises(DrafterError, match="owner/name is there already, and public"):
        push(folder, "owner/name", private=True)
    assert hub.repos["owner/name"]["files"] == {}


# -- what does not ----------------------------------------------------------------------------------------------------


def refused(folder, message, repo_id="owner/name"):
    with pytest.raises(DrafterError, match=message) as caught:
        push(folder, repo_id)
    assert "\n" not in str(caught.value)


def test_no_token_is_said_before_anything_is_sent(folder, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused(folder, "needs a token.*hf auth login.*HF_TOKEN")
    assert hub.repos == {} and hub.tokens == set()


def test_a_refusing_hub_is_one_sentence(folder, hub):
    refused(folder, "cannot upload to 'forbidden/name': .*403", "forbidden/name")


def test_no_network_is_one_sentence(folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_for_tests")
    refused(folder, "cannot upload to 'owner/name': .*offline mode")


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "owner/na me", "owner/", "-owner/name", ""])
def test_ids_the_hub_does_not_know_are_refused(folder, hub, repo_id):
    refused(folder, "is no repository id of the hub", repo_id)
    assert hub.repos == {}


def test_an_incomplete_card_is_refused_with_all_its_gaps(tmp_path, folder, hub, target):
    drafter = Medusa(MedusaConfig(num_heads=2), target.spec, target.shared)
    (folder / "README.md").write_text(write_card(drafter, "folder", TRAINED, CardConfig()))
    refused(folder, r"README.md lacks base_model as a hub id .*; license ")
    (folder / "README.md").write_text("# No front matter\n")
    refused(folder, r"lacks base_model .*; license .*; data .*; a measured tau")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("README.md", "holds no README.md"),
        ("config.json", "holds no config.json"),
        ("model.safetensors", "model.safetensors is missing or damaged"),
    ],
)
def test_a_missing_file_is_refused(folder, name, message):
    (folder / name).unlink()
    refused(folder, message)


def test_damaged_weights_and_no_folder_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused(folder, "missing or damaged")
    refused(folder / "none", "there is no folder")


def test_checking_asks_nobody(folder):
    """What a dry run lists; tests run offline, so any request would raise."""
    assert [file.name for file in publishable_files(folder)] == ["config.json", "model.safetensors", "README.md"]

"""A server over a tiny target on a socket of its own, in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from amphista.drafter.proposer import Proposer
from amphista.llm import LLM
from amphista.serve.server import server_of
from amphista.serve.settings import Settings
from tests.talkative import talkative_target

KEYS = ("first-key", "second-key")
ASKED = [{"role": "user", "content": "Who are you?"}]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ '[' + t['function']['name'] + ']' }}{% endfor %}"
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '(' + c['function']['name'] + c['function']['arguments'] | tojson + ')' }}"
    "{% endfor %}{% if not (loop.last and continue_final_message) %}{{ '</s>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@dataclass
class Served:
    """Where it listens, and what it is made of."""

    url: str
    llm: LLM
    server: object

    @property
    def worker(self):
        return self.server._service.worker

    def client(self, key: str | None = KEYS[0], **settings) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **settings)

    def post(self, path: str, body: dict, **settings) -> httpx.Response:
        with self.client(**settings) as client:
            return client.post(path, json=body)

    def chat(self, **body) -> dict:
        response = self.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 20, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def check_idle(self) -> None:
        """All rows are free again."""
        scheduler = self.worker._scheduler
        assert not scheduler.has_work and not self.worker._tickets
        scheduler.check_integrity()


def talkative_llm(template: str | None = None, **changes) -> LLM:
    target = talkative_target(**changes)
    if template is not None:
        target.text.tokenizer.chat_template = template
    return LLM(target, Proposer(use_lookup=True), tree="6")


@contextmanager
def serving(llm: LLM, **settings) -> Iterator[Served]:
    """Serve as long as the block runs."""
    addresses, listening = [], threading.Event()

    def told(address: str) -> None:
        addresses.append(address)
        listening.set()

    settings = {"port": 0, "api_keys": KEYS, "kv_gib": 0.05, "served_model_name": "tiny", "drain": 5.0, **settings}
    server = server_of(llm, Settings(**settings), told)
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    assert listening.wait(60), "the server did not start"
    try:
        yield Served(addresses[0], llm, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not end"

"""Who is let in, what is refused and how: one shape of errors, nobody else's rows, nothing without a key."""

from __future__ import annotations

import asyncio
import re
import threading
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from amphista.drafter.proposer import Proposer
from amphista.errors import ConfigError, TargetError
from amphista.llm import LLM
from amphista.serve.responses import ResponsesRequest
from amphista.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest
from amphista.serve.service import Service
from amphista.serve.settings import Settings, read_keys
from amphista.serve.shapes import Shape
from amphista.target.text import Text
from tests.serve.serving import ASKED, KEYS, serving, talkative_llm
from tests.talkative import talkative_target

CHAT = "/v1/chat/completions"
PATHS = [CHAT, "/v1/completions", "/v1/responses", "/v1/models", "/v1/models/tiny", "/tokenize", "/detokenize"]
PATHS += ["/apply-template"]
PATHS += ["/metrics", "/openapi.json", "/docs", "/page/../metrics", "/nowhere", "/health/x", "/app.js/"]


def checked(response: httpx.Response, status: int) -> dict:
    """An error as OpenAI's clients read it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert response.json().keys() == {"error"}
    return error


@pytest.mark.parametrize("key", [None, "first-ke", "first-key2", "FIRST-KEY", "first-key,second-key", "ü"])
def test_nothing_is_open_without_a_key_but_what_says_so(served, key):
    headers = [] if key is None else [(b"Authorization", f"Bearer {key}".encode())]
    with httpx.Client(base_url=served.url, headers=headers) as client:
        for path in PATHS:
            for method in ("GET", "POST", "OPTIONS"):
                response = client.request(method, path, json={} if method == "POST" else None)
                assert checked(response, 401)["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/app.js", "/style.css", "/health", "/ready", "/version"):
            assert client.get(path).status_code == 200
        assert client.get("/metrics", headers={"Authorization": f"Basic {KEYS[0]}"}).status_code == 401


def test_each_key_is_let_in(served):
    for key in KEYS:
        with served.client(key) as client:
            assert client.get("/v1/models").status_code == 200


def test_another_keys_prompts_leave_no_trace_in_mine(served):
    asked = {"messages": [{"role": "user", "content": "a secret plan " * 10}], "max_tokens": 2}

    def cached(key):
        return served.post(CHAT, asked, key=key).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEYS[0]) == 0 and cached(KEYS[0]) > 60
    assert cached(KEYS[1]) == 0 and cached(KEYS[1]) > 60


def test_servers_that_anybody_could_reach_need_a_key_or_a_word(tmp_path):
    with pytest.raises(ConfigError, match="--no-auth"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", no_auth=True).known_hosts is None
    assert Settings(host="0.0.0.0", api_keys=("k",)).known_hosts is None
    with pytest.raises(ConfigError, match="empty"):
        Settings(api_keys=(" ",))
    (tmp_path / "keys").write_text("one\n\n two\n")
    assert read_keys(["zero"], tmp_path / "keys", "three, four,") == ("zero", "one", "two", "three", "four")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys([], tmp_path / "none", None)


def test_other_sites_get_nothing_from_a_server_without_keys():
    settings = {"api_keys": (), "cors_origins": ("http://mine.example",)}
    with serving(talkative_llm(), **settings) as served, served.client(None) as client:
        assert client.get("/v1/models").status_code == 200
        port = served.url.rsplit(":", 1)[1]
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
            checked(client.get("/v1/models", headers={"Host": host}), 400)
        assert client.get("/v1/models", headers={"Host": f"localhost:{port}"}).status_code == 200
        plain = client.post(CHAT, content='{"messages": []}', headers={"Content-Type": "text/plain"})
        checked(plain, 400)
        ask = {"Origin": "http://mine.example", "Access-Control-Request-Method": "POST"}
        assert client.options(CHAT, headers=ask).headers["access-control-allow-origin"] == "http://mine.example"
        other = client.options(CHAT, headers={**ask, "Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        openai_js = {**ask, "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
        assert client.options(CHAT, headers=openai_js).status_code == 200


OUR_TYPES = re.compile(r"\w+\[|constrained|TextPart")
REGEX = {"type": "grammar", "syntax": "regex", "definition": "("}
ANYTHING = {"type": "json_schema", "json_schema": {"name": "any", "schema": True}}
BAD = {
    "messages": [None, [], "x", [{}], [{"role": "user"}], [{"role": "nobody", "content": "x"}]],
    "max_tokens": [0, -1, "5", 1.5, 10**9],
    "temperature": [-0.1, 2.1, "1", True],
    "top_p": [0, 1.1],
    "n": [0, 9],
    "seed": [2**63, 1.5],
    "stop": ["", [""], ["x"] * 17, 5, "x" * 257],
    "logit_bias": [{"a": 1}, {"1": 101}, {"1": "x"}, {"900": 1}],
    "top_logprobs": [21, 2],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, REGEX, ANYTHING],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "functions": [[{"name": "f"}]],
    "prediction": [{"type": "content", "content": "x"}],
    "web_search_options": [{}],
    "audio": [{"voice": "x"}],
    "modalities": [["text", "audio"]],
    "stop_token_ids": [[900], ["x"]],
    "amphista": [{"drafter": "other"}],
    "guided_json": [{"type": "object"}],
    "grammar": ['root ::= "a"'],
    "repeat_penalty": [1.1],
    "allowed_token_ids": [[1]],
    "include_stop_str_in_output": [True],
    "add_generation_prompt": [False],
}  # fmt: skip


@pytest.mark.parametrize("field", BAD)
def test_what_is_refused_says_which_field(served, field):
    for value in BAD[field]:
        asked = {"messages": ASKED, "max_tokens": 4, field: value}
        error = checked(served.post(CHAT, asked), 400)
        if value not in ({"900": 1}, [900]):
            assert error["param"] == field, error
        assert error["type"] == "invalid_request_error"
        assert not OUR_TYPES.search(error["message"]), error


def test_grammars_and_bodies_are_refused_by_a_whole_sentence(served):
    message = checked(served.post(CHAT, {"messages": ASKED, "response_format": REGEX}), 400)["message"]
    assert not message.endswith(":") and "unclosed group" in message
    with served.client() as client:
        sent = client.post(CHAT, content='{"messages": []}')
    assert "'Content-Type: application/json'" in checked(sent, 400)["message"]


def test_what_is_neutral_is_taken(served):
    neutral = {
        "user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
        "parallel_tool_calls": False, "reasoning_effort": "low", "verbosity": "low", "modalities": ["text"],
        "temperature": None, "stop": None, "tools": None, "something_new": {"x": 1}, "seed": -1, "functions": None,
        "repeat_penalty": 1.0, "skip_special_tokens": True, "n_predict": -1, "guided_json": None, "bad_words": [],
        "top_n_sigma": -1, "xtc_probability": 0.0,
    }  # fmt: skip
    assert served.chat(**neutral)["choices"]
    begun = [*ASKED, {"role": "assistant", "content": "Well,"}]
    assert served.chat(messages=begun, continue_final_message=True, add_generation_prompt=False)["choices"]
    body = {"prompt": "x", "max_tokens": 2, "n": 2, "best_of": 2}
    assert len(served.post("/v1/completions", body).json()["choices"]) == 2
    for bad in ({"best_of": 3}, {"suffix": "x"}, {"prompt": []}, {"prompt": ""}):
        checked(served.post("/v1/completions", {**body, **bad}), 400)
    checked(served.post("/v1/completions", {"prompt": ["x"] * 30, "n": 8}), 400)


@pytest.mark.parametrize(
    "name", ["chat_template", "tools", "tokenizer_kwargs", "messages", "add_generation_prompt", "self"]
)
def test_nobody_brings_a_template_of_their_own(served, name):
    asked = {"messages": ASKED, "chat_template_kwargs": {name: "{% for i in range(9) %}{% endfor %}"}}
    assert checked(served.post(CHAT, asked), 400)["param"] == "chat_template_kwargs"


def test_images_are_refused_by_name(served):
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    error = checked(served.post(CHAT, {"messages": [{"role": "user", "content": content}]}), 400)
    assert error["param"] == "messages"
    assert error["message"].startswith("messages.0.content.1.type: images are not supported")
    image = [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]
    error = checked(served.post("/v1/responses", {"input": image}), 400)
    assert error["message"].startswith("input.0.content.0.type: images are not supported")


def test_prompts_longer_than_the_context(served):
    long = [{"role": "user", "content": "x" * 600}]
    assert checked(served.post(CHAT, {"messages": long}), 400)["code"] == "context_length_exceeded"
    error = checked(served.post(CHAT, {"messages": ASKED, "max_tokens": 500}), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "max_tokens"


@pytest.mark.parametrize(
    "path, many",
    [
        (CHAT, {"messages": ASKED * 90_000}),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 90_000}]}),
        (CHAT, {"messages": [{"role": "user", "content": [1] * 2000}] * 250}),
        (CHAT, {"messages": ASKED, "logit_bias": {f"x{number}": 0 for number in range(200_000)}}),
        (CHAT, {"messages": ASKED, "modalities": [1] * 900_000}),
        ("/v1/completions", {"prompt": [-1] * 900_000}),
        ("/v1/completions", {"prompt": [[-1] * 1000] * 900}),
        ("/v1/completions", {"prompt": ["x", 1] * 400_000}),
        ("/v1/responses", {"input": [1] * 900_000}),
        ("/v1/responses", {"input": "x", "metadata": {str(number): 0 for number in range(200_000)}}),
        ("/detokenize", {"tokens": ["a"] * 900_000}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_many_small_parts_are_refused_before_each_is_checked(path, many):
    """Each would have an error of its own: a million of them take gigabytes, and nobody else is answered meanwhile."""
    model = {CHAT: ChatRequest, "/v1/completions": CompletionRequest, "/v1/responses": ResponsesRequest}
    with pytest.raises(ValidationError) as refused:
        model.get(path, DetokenizeRequest).model_validate(many)
    assert refused.value.error_count() < 20


def test_the_form_that_was_meant_is_told(served):
    for asked, said in (
        ({"prompt": [3, -1]}, "greater"),
        ({"prompt": [-1]}, "greater"),
        ({"prompt": "x", "stop": ["a", ""]}, "at least 1 character"),
    ):
        message = checked(served.post("/v1/completions", asked), 400)["message"]
        assert said in message and not OUR_TYPES.search(message)


def test_a_defect_is_logged_and_ends_one_request_alone(served, monkeypatch, caplog):
    """Whole or streamed; the connection is kept, since whoever asks next on it has done nothing."""

    def broken(*args, **settings):
        raise FloatingPointError("of ours")

    asked = {"messages": ASKED, "max_tokens": 4}
    with served.client() as client:
        for name, error in (("_prompt", FloatingPointError), ("check_model", TargetError)):
            monkeypatch.setattr(Service, name, broken if error is FloatingPointError else bad_target)
            message = checked(client.post(CHAT, json=asked), 500)["message"]
            monkeypatch.undo()
            assert "of ours" not in message and "of ours" in caplog.text
            caplog.clear()
            assert client.post(CHAT, json=asked).status_code == 200
        monkeypatch.setattr(Shape, "_deltas", broken)
        assert "internal_error" in client.post(CHAT, json={**asked, "stream": True}).text and "of ours" in caplog.text
        monkeypatch.undo()
        assert client.post(CHAT, json=asked).status_code == 200


def bad_target(*args):
    raise TargetError("of ours")


def test_who_comes_behind_the_end_is_told_so():
    with serving(talkative_llm()) as served, served.client() as client:
        service = served.server._service
        closing = asyncio.run_coroutine_threadsafe(service.close(0), service.worker._asyncio)
        closing.result(20)
        for path, asked in ((CHAT, {"messages": ASKED}), ("/tokenize", {"prompt": "x"})):
            assert "retry-after" in client.post(path, json=asked).headers
            checked(client.post(path, json=asked), 503)


@pytest.mark.parametrize(
    "path, asked",
    [
        (CHAT, {"messages": [{"role": "user", "content": "word " * 200}, {"role": "user", "content": "word " * 400}]}),
        ("/v1/completions", {"prompt": ["word " * 600, "short"]}),
        ("/tokenize", {"prompt": "word " * 600}),
    ],
)
def test_what_can_be_no_prompt_is_never_tokenized(served, monkeypatch, path, asked):
    for name in ("encode", "encode_part", "render"):
        monkeypatch.setattr(Text, name, None)
    assert checked(served.post(path, asked), 400)["code"] == "context_length_exceeded"


def test_what_the_framework_refuses_has_the_same_shape(served):
    with served.client() as client:
        checked(client.get("/nowhere"), 404)
        response = client.get(CHAT)
        checked(response, 405)
        assert response.headers["allow"] == "POST"
        json = {"Content-Type": "application/json"}
        for content in (
            b"{",
            b"",
            b"\xff\xfe",
            b'{"messages": "\xff"}',
            b"[" * 10_000,
            b"[" * 10_000 + b"]" * 10_000,
            b"nul",
        ):
            checked(client.post(CHAT, content=content, headers=json), 400)
        for odd in ('"\\ud800"', "NaN", "1e999", "{" * 500 + "}" * 500):
            body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "%s": %s}'
            for field in ("temperature", "cache_salt", "stop", "chat_template_kwargs", "response_format"):
                checked(client.post(CHAT, content=body % (field.encode(), odd.encode()), headers=json), 400)


def test_deep_values_do_not_break_what_reads_them(served):
    deep: dict = {}
    for _ in range(300):
        deep = {"a": deep}
    checked(
        served.post(
            CHAT, {"messages": ASKED, "response_format": {"type": "json_schema", "json_schema": {"schema": deep}}}
        ),
        400,
    )
    for field in ("chat_template_kwargs", "metadata"):
        response = served.post(CHAT, {"messages": ASKED, "max_tokens": 2, field: deep})
        assert response.status_code in (200, 400)


def test_a_full_queue_says_when_to_try_again():
    with serving(talkative_llm(), max_running=1, max_waiting=1) as served:
        asked = {"messages": ASKED, "ignore_eos": True, "max_tokens": 400}
        threads = [threading.Thread(target=served.post, args=(CHAT, asked)) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while served.worker.load.num_waiting < 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        response = served.post(CHAT, asked)
        assert checked(response, 429)["type"] == "rate_limit_error" and int(response.headers["retry-after"]) >= 1
        checked(served.post(CHAT, {**asked, "stream": True}), 429)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[0], max_retries=8) as client:
            said = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=3)  # it waits and asks again
            assert said.choices
        for thread in threads:
            thread.join()
        with served.client() as client:
            text = client.get("/metrics").text
        assert 'amphista:requests_refused_total{model_name="tiny",reason="queue_full"}' in text


def test_metrics_add_up():
    llm = LLM(talkative_target(), Proposer(use_lookup=True))
    with serving(llm) as served:
        asked = {
            "max_tokens": 30,
            "ignore_eos": True,
            "seed": 1,
            "messages": [{"role": "user", "content": "repeat " * 9}],
        }
        said = [served.chat(**asked) for _ in range(2)]
        deadline = time.monotonic() + 5
        while served.worker.load.num_running and time.monotonic() < deadline:
            time.sleep(0.01)
        with served.client() as client:
            families = text_string_to_metric_families(client.get("/metrics").text)
            samples = [sample for family in families for sample in family.samples]
    found = {}
    for sample in samples:
        assert sample.labels.pop("model_name") == "tiny"
        found[" ".join([sample.name.removeprefix("amphista:"), *sample.labels.values()])] = sample.value
    usages = [one["usage"] for one in said]
    assert found["generation_tokens_total"] == found["iteration_tokens_total_sum"] == 60
    assert found["prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
    assert found["prefix_cache_hits_total"] == usages[1]["prompt_tokens_details"]["cached_tokens"] > 0
    assert found["request_success_total length"] == 2
    assert found["num_requests_running"] == found["num_requests_waiting"] == 0
    accepted = sum(one["timings"]["draft_n_accepted"] for one in said)
    assert sum(value for name, value in found.items() if "num_accepted_tokens_total" in name) == accepted > 0
    assert sum(value for name, value in found.items() if "per_pos_total" in name) == accepted
    assert found["spec_decode_num_draft_tokens_total"] == sum(one["timings"]["draft_n"] for one in said)
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert found["cost_model_ratio"] > 0 and found[f"{name}_count"] == 2 and found[f"{name}_sum"] >= 0

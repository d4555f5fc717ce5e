"""The Responses API by the official client: the same answers as chats give, told in items and events."""

from __future__ import annotations

import json

import openai
import pytest
from pydantic import BaseModel

from tests.serve.serving import ASKED, KEYS, TOOL_TEMPLATE, serving, talkative_llm

SAMPLED = {"temperature": 1.0, "top_p": 0.9, "extra_body": {"seed": 11}}
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False}
THOUGHT = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<s>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<", "close": ">", "content": "text"},
        "tool_calls": {
            "open": "{", "close": "}", "repeats": True, "content": "text",
            "transform": {"type": "function", "function": {"name": "weather", "arguments": {"days": "{content}"}}},
        },
        "content": {"content": "text"},
    },
}  # fmt: skip
FORM = {"type": "grammar", "syntax": "regex", "definition": r"<[d-f]{3}>[a-c]{2}\{[0-9]\}\{[0-9]\}"}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def thinking():
    """A server whose answers are a thought, a text and two calls, with its client."""
    llm = talkative_llm(TOOL_TEMPLATE)
    llm.target.text.tokenizer.response_template = THOUGHT
    with serving(llm) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEYS[0]) as client:
        yield served, client


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, SAMPLED])
@pytest.mark.parametrize("limit", [20, 400])
def test_a_response_is_the_answer_of_a_chat(served, client, settings, limit):
    said = client.responses.create(model="tiny", input="Who are you?", max_output_tokens=limit, **settings)
    chat = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=limit, **settings)
    is_cut = chat.choices[0].finish_reason == "length"
    assert said.output_text == chat.choices[0].message.content
    assert said.status == ("incomplete" if is_cut else "completed") and said.error is None
    assert (said.incomplete_details.reason if is_cut else said.incomplete_details) == (
        "max_output_tokens" * is_cut or None
    )
    assert [item.type for item in said.output] == ["message"] and said.output[0].status == said.status
    assert (
        said.usage.input_tokens == chat.usage.prompt_tokens and said.usage.output_tokens == chat.usage.completion_tokens
    )
    assert said.object == "response" and said.id.startswith("resp_") and said.store is False


def test_its_events_make_up_the_whole(thinking):
    """Each item is added, told piece by piece and done; the last event holds what a response not streamed is."""
    _, client = thinking
    asked = {"model": "tiny", "input": "Who are you?", "tools": [TOOL], "text": {"format": FORM}}
    whole = client.responses.create(**asked, extra_body={"seed": 1})
    events = list(client.responses.create(**asked, extra_body={"seed": 1}, stream=True))
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[-1].type == "response.completed"
    told = {}
    for event in events[2:-1]:
        number, kind = event.output_index, event.type.removeprefix("response.")
        assert number == len(told) - (kind != "output_item.added"), "one item behind the other"
        if kind == "output_item.added":
            assert event.item.status == "in_progress"
            told[number] = ""
        elif kind.endswith(".delta"):
            told[number] += event.delta
        elif kind.endswith("text.done"):
            assert event.text == told[number]
        elif kind == "output_item.done":
            item = event.item.model_dump()
            assert item == events[-1].response.output[number].model_dump()
            same = {name: value for name, value in item.items() if "id" not in name}
            assert same == {k: v for k, v in whole.output[number].model_dump().items() if "id" not in k}
            assert told[number] == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    assert len(told) == 4 and whole.output_text == told[1]
    assert (len(told[0]), len(told[1])) == (3, 2) and json.loads(told[3])["days"] in "0123456789"


def test_items_of_an_answer_go_back_into_the_conversation(thinking):
    served, client = thinking
    said = client.responses.create(
        model="tiny", input="Who?", tools=[TOOL], text={"format": FORM}, instructions="Be kind."
    )
    calls = [item for item in said.output if item.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"} for call in calls]
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}, *said.output, *results]
    again = client.responses.create(
        model="tiny", instructions="Be kind.", input=items, tools=[TOOL], max_output_tokens=4
    )
    functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": said.output_text},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function} for function in functions]},
        *({"role": "tool", "content": "sun"} for _ in calls),
    ]
    tools = [{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}]
    chat = served.chat(messages=messages, tools=tools, max_tokens=4)
    assert again.usage.input_tokens == chat["usage"]["prompt_tokens"] > said.usage.input_tokens


def test_an_answer_in_a_form(client):
    class Choice(BaseModel):
        ok: bool

    said = client.responses.parse(model="tiny", input="Who are you?", text_format=Choice, temperature=0.0)
    assert isinstance(said.output_parsed, Choice)
    for form in ({"type": "json_object"}, {"type": "text"}, {"type": "json_schema", "name": "any", "schema": {}}):
        said = client.responses.create(model="tiny", input="Who?", text={"format": form}, max_output_tokens=30)
        assert said.text.format.type == form["type"]


def test_log_probabilities_are_told_where_they_are_included(served, client):
    asked = {"model": "tiny", "input": "Who are you?", "temperature": 0.0, "max_output_tokens": 12}
    told = client.responses.create(**asked, include=["message.output_text.logprobs"], top_logprobs=2)
    chat = served.chat(messages=ASKED, temperature=0.0, max_tokens=12, logprobs=True, top_logprobs=2)
    found = [entry.model_dump() for entry in told.output[0].content[0].logprobs]
    assert found == chat["choices"][0]["logprobs"]["content"]
    assert client.responses.create(**asked).output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, None),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [7]}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [TOOL]}, "tools"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 7}}}}, "text"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(served, wrong, param):
    response = served.post("/v1/responses", {"input": "Who?", **wrong})
    assert response.status_code == (404 if "model" in wrong else 400), response.text
    assert response.json()["error"]["param"] == param and response.json()["error"]["message"]

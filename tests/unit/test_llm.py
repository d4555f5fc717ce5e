"""The door: what people type first, lists of prompts, lazy and closed streams, the model's own settings."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from amphista.accept.chooser import Chooser
from amphista.engine.params import FinishReason, SamplingParams
from amphista.engine.step import Engine
from amphista.engine.stream import finish
from amphista.errors import CapacityError, ConfigError, RequestError, TargetError
from amphista.llm import LLM, load
from amphista.target.target import Target
from amphista.target.text import Text
from tests.tiny import byte_tokenizer, tiny_model

FEW = {"max_tokens": 6}
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm(text_target):
    return LLM(text_target)


@pytest.fixture
def prefills(monkeypatch):
    """The number of rows of each chunk of a prompt that is read."""
    found, forward = [], Target.forward

    def counted(target, spans, taps=()):
        found.extend(span.tree.num_nodes for span in spans if span.only_last)
        return forward(target, spans, taps)

    monkeypatch.setattr(Target, "forward", counted)
    return found


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_turn_that_is_refused_ends_no_other(llm):
    conversation = llm.conversation()
    pieces = conversation.stream("a", max_tokens=12, ignore_eos=True)
    steps = pieces.steps()
    next(steps)
    for settings in ({"max_tokens": 0}, {"stop_token_ids": [10**6]}):
        with pytest.raises(RequestError):
            conversation.stream("b", **settings)
    assert not list(conversation.messages) and list(steps) and len(pieces.answer.token_ids) == 12
    assert len(conversation.messages) == 2


def test_log_probabilities_may_be_taken_back(llm):
    params = llm.params(SamplingParams(logprobs=3), logprobs=False)
    assert not params.logprobs and not params.top_logprobs


def test_a_list_of_prompts_gives_a_list_of_answers(llm):
    ids = llm.prompt_ids("one")
    alone = [llm.generate(text, **FEW).token_ids for text in ("one", "two")]
    for prompts in (["one", "two"], ("one", "two"), [ids, llm.prompt_ids("two")], [ids, "two"]):
        assert [answer.token_ids for answer in llm.generate(prompts, **FEW)] == alone
    conversations = [[{"role": "user", "content": text}] for text in ("one", "two")]
    assert [answer.token_ids for answer in llm.generate(conversations, **FEW)] == alone
    assert [answer.token_ids for answer in llm.generate(["one"], **FEW)] == alone[:1]


def test_several_prompts_are_answered_together(llm, monkeypatch):
    prompts = [f"number {n}" for n in range(7)]
    sizes, step = [], type(llm.engine).step
    monkeypatch.setattr(type(llm.engine), "step", lambda engine, batch: sizes.append(len(batch)) or step(engine, batch))
    found = llm.generate(prompts, batch_size=3, temperature=0.8, seed=0, **FEW)
    assert max(sizes) == 3 and all(answer.error is None for answer in found)
    assert [answer.prompt_ids for answer in found] == [llm.prompt_ids(text) for text in prompts]
    assert all(
        answer.text == llm.generate(text, temperature=0.8, seed=0, **FEW).text
        for answer, text in zip(found, prompts, strict=True)
    )
    ended = dict(llm.answers(prompts, batch_size=7, **FEW))
    assert sorted(ended) == list(range(7))
    seeds = {answer.params.seed for answer in llm.generate(prompts[:3], temperature=0.8, **FEW)}
    assert len(seeds) == 3, "each has a fresh seed of its own"


def test_what_fails_in_mid_batch_is_its_own_answers_error(llm, monkeypatch, caplog):
    expected = [llm.generate(text, **FEW).token_ids for text in ("one", "two", "three")]
    broken, scores = llm.prompt_ids("two"), Chooser.scores

    def fails(chooser, logits, position, path=()):
        if position == len(broken) + 1:
            raise TargetError("broken here")
        return scores(chooser, logits, position, path)

    monkeypatch.setattr(Chooser, "scores", fails)
    found = llm.generate(["one", "two", "three"], batch_size=3, **FEW)
    failed = [answer for answer in found if answer.error is not None]
    assert failed and all(answer.finish_reason == "error" and "broken here" in str(answer.error) for answer in failed)
    assert all(len(answer.token_ids) == 1 for answer in failed) and "could not be answered" in caplog.text
    for answer, tokens in zip(found, expected, strict=True):
        assert answer.error is not None or answer.token_ids == tokens
    assert found[1].error is not None and found[2].error is None


def test_a_batch_that_memory_may_not_hold_is_refused_before_anything_is_decoded(llm, monkeypatch, prefills):
    monkeypatch.setattr("amphista.engine.batch.free_bytes", lambda device: 2 * 300 * llm.engine.row_bytes)
    with pytest.raises(CapacityError, match=r"a batch of 9 may need .* take a smaller batch_size or max_tokens"):
        llm.generate(["one"] * 20, batch_size=9, max_tokens=200)
    with pytest.raises(CapacityError, match="give more memory"):
        raise llm.generate(["one"] * 2, max_tokens=400)[0].error
    assert prefills == []
    assert len(llm.generate(["one"] * 5, **FEW)) == 5, "as many at a time as fit"


def test_a_batch_size_is_for_a_list_and_at_least_1(llm):
    with pytest.raises(RequestError, match="batch_size is for a list"):
        llm.generate("one", batch_size=2)
    with pytest.raises(ConfigError, match="a batch of 0"):
        llm.generate(["one"], batch_size=0)


def test_an_interrupt_in_mid_batch_keeps_the_answers_that_had_ended(llm, monkeypatch):
    running, found = llm.answers(["one", "two", "three", "four"], batch_size=2, **FEW), {}
    found.update([next(running)])
    step = type(llm.engine).step

    def interrupted(engine, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(llm.engine), "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.update(running)
    monkeypatch.setattr(type(llm.engine), "step", step)
    assert len(found) >= 1
    for index, answer in found.items():
        assert answer.token_ids == llm.generate(["one", "two", "three", "four"][index], **FEW).token_ids


def test_one_prompt_in_any_of_its_forms_gives_one_answer(llm):
    expected = llm.generate("hi", **FEW).token_ids
    for prompt in (
        HI,
        tuple(HI),
        llm.prompt_ids("hi"),
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    ):
        assert llm.generate(prompt, **FEW).token_ids == expected
    assert llm.chat(HI, **FEW).token_ids == expected


@pytest.mark.parametrize("bad", ["", " ", "\ud83d", [], [{"role": "user"}], [9999], ["x"]])
def test_a_bad_prompt_among_others_is_named_before_anything_is_decoded(llm, bad, prefills):
    with pytest.raises(RequestError, match=r"^prompts\[1\]: "):
        llm.generate(["fine", bad], **FEW)
    assert prefills == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"role": "user", "content": "x"}, "expected a text, a list of messages"),
        (5, "expected a text, a list of messages"),
        (None, "expected a text"),
        ([], "expected a text"),
        ([HI[0], "x"], "expected a text"),
        ([1, "x"], "expected a text"),
        ([1.5], "expected a text"),
        ([{"content": "x"}], "expected an object with 'role' and 'content'"),
        ([{"role": "user", "content": 5}], "expected a text, or a list of text parts"),
        ([{"role": "a<|b", "content": "x"}], "expected a word"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}],
            "'image_url': this target reads text",
        ),
        ("half \ud83d", "half a character"),
        ([{"role": "user", "content": "half \ud83d"}], "half a character"),
        ([{"role": "user", "content": "x", "name": "half \ud83d"}], "half a character"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}], "half a character"),
    ],
)
def test_what_is_no_prompt_is_refused_by_a_sentence(llm, prompt, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, **FEW)


def test_token_ids_may_be_arrays_tensors_or_a_tokenizers_own(llm):
    ids = [5, 17, 230, 44]
    expected = llm.generate(ids, **FEW).token_ids
    for prompt in (np.array(ids), torch.tensor(ids), [np.int64(token) for token in ids], {"input_ids": ids}):
        assert llm.generate(prompt, **FEW).token_ids == expected
        assert finish(llm.stream(prompt, **FEW)).token_ids == expected
    assert [a.token_ids for a in llm.generate(torch.tensor([ids, ids]), **FEW)] == [expected, expected]
    assert llm.generate(range(5, 8), **FEW).prompt_ids == [5, 6, 7]
    assert finish(llm.stream_ids(np.array(ids), llm.params(**FEW))).token_ids == expected
    for bad in ([True, False], torch.tensor([1.5]), torch.tensor(3), np.array([])):
        with pytest.raises(RequestError, match="expected a text"):
            llm.generate(bad)
    for bad, named in (([-1, 4], "-1"), ([4, 999], "999"), ("hi", "'h'"), ([1.5], "1.5")):
        with pytest.raises(RequestError, match=f"token id {named};"):
            llm.stream_ids(bad, llm.params())


@pytest.mark.parametrize("turn", [5, None, [5, 6], ["x"], HI[0], []])
def test_what_is_no_turn_is_refused_by_a_sentence_and_changes_nothing(llm, turn):
    conversation = llm.conversation()
    with pytest.raises(RequestError, match="expected a text, or a list of messages"):
        conversation.send(turn)
    assert conversation.messages == []


@pytest.mark.parametrize("name", ["messages", "conversation", "tokenize", "return_dict", "return_tensors", 5])
def test_what_is_no_template_variable_is_refused_by_a_sentence(llm, name):
    with pytest.raises(RequestError, match=r"no variable of a chat template|of names and values"):
        llm.generate("x", chat_template_kwargs={name: True})


@pytest.mark.parametrize("raw", [False, True])
def test_half_characters_are_refused_wherever_text_enters(llm, raw):
    for arguments in ({"prompt": "\udc00"}, {"prompt": "x", "stop": ["\udc00"]}, {"prompt": "x", "system": "\udc00"}):
        with pytest.raises(RequestError):
            llm.generate(**arguments, raw=raw, **FEW)
    with pytest.raises(RequestError, match="half a character"):
        llm.conversation("\udc00").send("x", **FEW)


def test_template_variables_reach_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template += "{% if mood is defined %}{{ mood }}{% endif %}"
    llm = LLM(Target(tiny_model(), Text(tokenizer)))
    settings = {"chat_template_kwargs": {"mood": "gay"}}
    assert tokenizer.decode(llm.prompt_ids("x", **settings)).endswith("gay")
    for answer in (
        llm.generate("x", **settings, **FEW),
        llm.stream("x", **settings, **FEW),
        llm.chat(HI, **settings, **FEW),
        llm.conversation(**settings).send("x", **FEW),
    ):
        ids = answer.prompt_ids if hasattr(answer, "prompt_ids") else answer.request.prompt_ids
        assert tokenizer.decode(ids).endswith("gay")
    with pytest.raises(RequestError, match="expected a dictionary"):
        llm.prompt_ids("x", chat_template_kwargs="mood")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_a_seed_is_fresh_and_told(llm):
    answers = [llm.generate("hi", temperature=1.5, max_tokens=20) for _ in range(3)]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    again = llm.generate("hi", temperature=1.5, max_tokens=20, seed=answers[1].params.seed)
    assert again.token_ids == answers[1].token_ids


def test_each_prompt_of_a_list_may_have_settings_of_its_own(llm):
    prompts, hot = ["one", "one", "two"], SamplingParams(temperature=1.5, seed=1)
    each = [hot, replace(hot, seed=2), None]
    found = llm.generate(prompts, params=each, max_tokens=20)
    alone = [llm.generate(prompt, params=one, max_tokens=20) for prompt, one in zip(prompts, each, strict=True)]
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]
    assert found[0].token_ids != found[1].token_ids and [len(answer.token_ids) for answer in found[:2]] == [20, 20]
    assert [answer.params.temperature for answer in found] == [1.5, 1.5, 0]
    one_noise = llm.generate(prompts[:2], params=hot, **FEW)
    assert one_noise[0].token_ids == one_noise[1].token_ids
    assert llm.generate(["one"], params=("model",), **FEW)[0].token_ids == llm.generate("one", **FEW).token_ids


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["a", "b"], [None], "params holds 1 for 2 prompts"),
        ("a", [None], "'model', or one for each of a list"),
        (["a", "b"], [None, 5], r"prompts\[1\]: params is 5: expected SamplingParams"),
        (["a", "b"], [None, SamplingParams(logit_bias={300: 1})], r"prompts\[1\]: logit_bias names token id 300"),
    ],
)
def test_settings_of_their_own_that_fit_no_prompt_are_refused_by_a_sentence(llm, prefills, prompts, params, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, params=params)
    assert prefills == []


def test_settings_are_checked_by_name(llm):
    with pytest.raises(RequestError, match="unknown setting 'tempreature'"):
        llm.generate("x", tempreature=1)
    with pytest.raises(RequestError, match="the same setting"):
        llm.generate("x", max_tokens=1, max_new_tokens=2)
    with pytest.raises(RequestError, match="expected SamplingParams"):
        llm.generate("x", params={"temperature": 1})
    with pytest.raises(RequestError, match="logit_bias names token id 300"):
        llm.generate("x", logit_bias={300: 1})


def test_a_stop_string_may_be_a_special_token_alone_or_among_text():
    model = tiny_model()
    llm = LLM(Target(model, Text(byte_tokenizer())))
    free = llm.generate("x", max_tokens=12, ignore_eos=True)
    at = next(i for i, token in enumerate(free.token_ids) if token not in free.token_ids[:i] and 2 < i < 10)
    token = free.token_ids[at]
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.add_special_tokens(["<|x|>"])
    text = Text(tokenizer)
    special = text.special_tokens["<|x|>"]
    rows = model.lm_head.weight
    rows.data[[token, special]] = rows.data[[special, token]]
    changed = LLM(Target(model, text))
    answer = changed.generate("x", max_tokens=12, ignore_eos=True, stop="<|x|>")
    assert answer.token_ids == [*free.token_ids[:at], special] and answer.finish_reason == "stop"
    assert "<|x|>" not in answer.text and answer.text == text.decode(free.token_ids[:at])
    whole = changed.generate("x", max_tokens=12, ignore_eos=True)
    following = text.decode(whole.token_ids[at + 1 : at + 2], with_special=True)
    mixed = changed.generate("x", max_tokens=12, ignore_eos=True, stop=["<|x|>" + following])
    assert mixed.token_ids == whole.token_ids[: at + 2] and mixed.text == answer.text


def configured(**settings):
    model = tiny_model()
    model.generation_config = GenerationConfig(eos_token_id=257, pad_token_id=257, **settings)
    return model


def test_the_models_own_settings_are_told_and_taken_only_when_asked_for(tmp_path, caplog):
    configured(do_sample=True, temperature=0.6, repetition_penalty=1.2, typical_p=0.9).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    llm = load(tmp_path, "none", tree=1)
    (told,) = [record for record in caplog.records if record.levelname == "WARNING"]
    for part in ("do_sample=True", "temperature=0.6", "repetition_penalty=1.2", "typical_p=0.9", "not applied"):
        assert part in told.getMessage()
    assert llm.generate("x", **FEW).params.is_greedy
    caplog.clear()
    params = llm.generate("x", params="model", seed=1, **FEW).params
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.6, 50, 1.2)
    assert "not supported" in caplog.text and "typical_p" in caplog.text and "temperature" not in caplog.text


def test_nothing_is_told_of_a_configuration_without_settings(target_folder, caplog):
    load(target_folder, "none", tree=1)
    assert "generation_config" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"suppress_tokens": [119, 205]},
        {"min_new_tokens": 20, "repetition_penalty": 1.1},
        {"bad_words_ids": [[119], [104]], "temperature": 0.5},
    ],
)
def test_the_models_own_settings_give_the_tokens_of_stock_generate(settings):
    import torch

    model = configured(**settings)
    prompt = torch.tensor([[5, 17, 230, 44, 9]])
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24)[0, 5:].tolist()
    llm = LLM(Target(model, Text(byte_tokenizer())))
    assert llm.generate(prompt[0].tolist(), params="model", max_tokens=24).token_ids == theirs
    plain = llm.generate(prompt[0].tolist(), max_tokens=24).token_ids
    assert plain != theirs or "min_new_tokens" in settings


def test_an_end_token_among_the_models_bad_words_ends_an_answer_as_in_stock_generate():
    import torch

    model = configured()
    prompt = torch.tensor([[5, 17, 230, 44, 9]])
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)[0, 5:].tolist()
    end, never = plain[4], next(token for token in range(300) if token not in plain)
    model.generation_config.update(eos_token_id=[257, end], bad_words_ids=[[end], [never]])
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)[0, 5:].tolist()
    assert theirs[-1] == end and len(theirs) < 12
    answer = LLM(Target(model, Text(byte_tokenizer()))).generate(prompt[0].tolist(), params="model", max_tokens=12)
    assert answer.token_ids == theirs


# -- the hub ----------------------------------------------------------------------------------------------------------


def test_where_a_target_comes_from_is_passed_on(monkeypatch):
    class AskedError(Exception):
        pass

    def noted(name, **settings):
        raise AskedError(name, settings)

    monkeypatch.setattr("amphista.llm.load_target", noted)
    with pytest.raises(AskedError) as caught:
        load("owner/name", revision="v1", token="secret", cache_dir=Path("/hub"), local_files_only=True)
    name, settings = caught.value.args
    assert name == "owner/name" and settings.pop("device") is settings.pop("dtype") is None
    assert settings.pop("fast") and settings.pop("native")
    assert settings == {"revision": "v1", "token": "secret", "cache_dir": "/hub", "local_files_only": True}


def test_where_a_drafter_comes_from_is_passed_on(monkeypatch, text_target):
    import huggingface_hub

    from amphista.drafter.hub import HubAccess
    from amphista.errors import DrafterError
    from amphista.llm import choose_drafter

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how, name=name) or "/no")
    access = HubAccess(token="secret", cache_dir="/hub", local_only=True)
    assert "secret" not in repr(access)
    with pytest.raises(DrafterError, match=r"config\.json"):
        choose_drafter(text_target, "owner/name@v2", hub=access)
    del asked["allow_patterns"]
    expected = {"name": "owner/name", "revision": "v2", "token": "secret"}
    assert asked == {**expected, "cache_dir": "/hub", "local_files_only": True}


# -- streams ----------------------------------------------------------------------------------------------------------


def test_nothing_is_read_before_the_stream_is(llm, prefills):
    stream = llm.stream("hi", **FEW)
    assert prefills == [] and stream.stats.num_tokens == 0
    with pytest.raises(RequestError, match="has not ended"):
        _ = stream.answer
    text = "".join(stream)
    assert prefills == [len(llm.prompt_ids("hi"))] and stream.answer.text == text


def test_a_closed_stream_keeps_what_had_come(llm):
    whole = llm.generate("hi", max_tokens=30, ignore_eos=True)
    with llm.stream("hi", max_tokens=30, ignore_eos=True) as stream:
        for _, _ in zip(range(3), stream.steps(), strict=False):
            pass
    answer = stream.answer
    assert answer.finish_reason is FinishReason.ABORT and list(stream) == []
    assert answer.token_ids == whole.token_ids[: len(answer.token_ids)] and 3 <= len(answer.token_ids) < 30
    assert whole.text.startswith(answer.text.rstrip("\ufffd"))
    never = llm.stream("hi", **FEW)
    never.close()
    assert never.answer.token_ids == [] and never.answer.text == ""


def test_streams_are_awaited_in_one_thread_of_their_own(llm, monkeypatch):
    threads, step = set(), llm.engine.step

    def noted(sequence):
        threads.add(threading.current_thread())
        return step(sequence)

    monkeypatch.setattr(llm.engine, "step", noted)
    expected = llm.generate("hi", max_tokens=12)
    assert threads.pop() is threading.main_thread()

    async def read(stream):
        return [piece async for piece in stream]

    async def both():
        return await asyncio.gather(*(read(llm.stream("hi", max_tokens=12)) for _ in range(2)))

    for pieces in asyncio.run(both()):
        assert "".join(pieces) == expected.text and len(pieces) > 2
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_an_awaited_stream_that_is_cancelled_can_be_closed(llm):
    async def begin(stream):
        async for _ in stream:
            raise asyncio.CancelledError

    stream = llm.stream("hi", max_tokens=100, ignore_eos=True)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(begin(stream))
    stream.close()
    assert 0 < len(stream.answer.token_ids) < 100 and stream.answer.finish_reason == "abort"


def test_a_reader_who_gives_up_in_mid_step_and_reads_on_misses_nothing(llm, monkeypatch):
    step, calls, is_in, may_go = Engine.step, [], threading.Event(), threading.Event()

    def waiting(engine, batch):
        calls.append(len(batch))
        if len(calls) == 4:
            is_in.set()
            assert may_go.wait(60)
        return step(engine, batch)

    async def read(stream, pieces):
        async for piece in stream:
            pieces.append(piece)

    async def impatient():
        stream, pieces = llm.stream("hi", max_tokens=12, ignore_eos=True), []
        reading = asyncio.create_task(read(stream, pieces))
        await asyncio.to_thread(is_in.wait, 60)
        reading.cancel()
        await asyncio.wait([reading])
        may_go.set()
        await read(stream, pieces)
        return pieces, stream.answer.text

    monkeypatch.setattr(Engine, "step", waiting)
    pieces, text = asyncio.run(impatient())
    assert "".join(pieces) == text and len(pieces) > 2


def test_a_batch_size_in_words_is_refused(llm):
    with pytest.raises(RequestError, match="batch_size is 'x': expected a whole number"):
        llm.generate(["a", "b"], batch_size="x")


def test_what_is_loaded_tells_of_itself(llm):
    assert repr(llm) == f"<LLM {llm.target.name}: float32, {llm.target.path} path, drafter {llm.drafter.name}>"


def test_a_conversation_may_be_awaited(llm):
    async def talk():
        conversation = llm.conversation()
        text = "".join([piece async for piece in conversation.stream("hi", **FEW)])
        assert conversation.messages[-1] == {"role": "assistant", "content": text}
        return conversation

    assert len(asyncio.run(talk()).messages) == 2


def test_log_probabilities_are_told_with_the_answer(llm):
    answer = llm.generate("hi", logprobs=2, **FEW)
    assert [one.token_id for one in answer.logprobs] == answer.token_ids
    assert all(len(one.top) == 2 and one.logprob == max(one.top.values()) for one in answer.logprobs), "greedy"
    assert llm.generate("hi", **FEW).logprobs is None
    assert llm.generate("hi", params=SamplingParams(max_new_tokens=2, logprobs=True)).logprobs[0].top == {}

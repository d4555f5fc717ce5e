"""evaluation/methods.py and stock.py: what a method is called, what it runs, and what hooks count."""

from __future__ import annotations

import pytest
import torch

from amphista.engine.params import SamplingParams
from amphista.errors import ConfigError, DrafterError
from amphista.evaluation.methods import METHODS, MethodSettings, MethodSpec, build_method, parse_methods
from amphista.evaluation.stock import StockGenerate, plain, prompt_lookup
from tests.tiny import EOS, tiny_target

PROMPT = [5, 17, 230, 5, 17, 230, 5, 17]


def test_names():
    specs = parse_methods("amphista@16, none,mine=some/folder@static:8,hf,hf-lookup")
    assert specs == [
        MethodSpec("none", "none"),
        MethodSpec("amphista", "drafter", "amphista", "16"),
        MethodSpec("mine", "drafter", "some/folder", "static:8"),
        MethodSpec("hf", "hf"),
        MethodSpec("hf-lookup", "hf-lookup"),
    ]
    assert [s.name for s in parse_methods("amphista,amphista@16,medusa@16")] == [
        "none",
        "amphista@auto",
        "amphista@16",
        "medusa",
    ]
    assert parse_methods("lookup,amphista+lookup@8")[1:] == [
        MethodSpec("lookup", "drafter", "lookup"),
        MethodSpec("amphista+lookup", "drafter", "amphista+lookup", "8"),
    ]
    assert parse_methods("hf-assisted=small")[1] == MethodSpec("hf-assisted", "hf-assisted", "small")


def test_a_path_may_hold_the_separator(tmp_path):
    (tmp_path / "run@3").mkdir()
    (spec,) = parse_methods(f"mine={tmp_path}/run@3")[1:]
    assert (spec.drafter, spec.tree) == (f"{tmp_path}/run@3", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected one or more"),
        ("none,,hf", "expected one or more"),
        ("=x", "is not of the form"),
        ("a=", "is not of the form"),
        ("hf=x", "hf takes no drafter"),
        ("none@4", "none grows no tree"),
        ("hf-assisted", "needs a draft model"),
        ("hf-lookup@chain", "at least 2"),
        ("hf-lookup@1", "at least 2"),
        ("medusa@bush", "neither auto"),
        ("medusa@0", "at least 1"),
        ("a=x,a=y", "names 'a@auto' twice"),
        ("none,none", "twice"),
    ],
)
def test_bad_names(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_methods(text)


def test_errors_name_the_method(text_target):
    (spec,) = parse_methods("mine=no/such/folder/at/all")[1:]
    with pytest.raises(DrafterError, match="method mine: "):
        build_method(spec, text_target, MethodSettings())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def target(request):
    return tiny_target(request.param, with_text=True)


def run(target, variant, prompt=PROMPT, **settings):
    return StockGenerate(target, variant).run(prompt, SamplingParams(**settings))


def test_stock_is_none_token_for_token_and_step_for_step(target):
    none = METHODS["none"](MethodSpec("none", "none"), target, MethodSettings())
    ours = none.run(PROMPT, SamplingParams(max_new_tokens=12))
    theirs = run(target, plain(), max_new_tokens=12)
    for key in ("token_ids", "accepted", "tree_nodes", "finish_reason"):
        assert ours[key] == theirs[key], key
    assert "".join(ours["pieces"]) == "".join(theirs["pieces"])
    for found in (ours, theirs):
        assert len(found["step_seconds"]) == len(found["accepted"]) == len(found["token_ids"]) - 1
        assert found["seconds"] == pytest.approx(found["prefill_seconds"] + sum(found["step_seconds"]), rel=0.3)


def test_prompt_lookup_is_counted_by_its_forwards(target):
    """A repeating prompt and a target made to repeat: drafts are accepted, and every token is accounted for."""
    expected = run(target, plain(), max_new_tokens=40)["token_ids"]
    prompt = [*PROMPT, *expected]  # the answer stands in the prompt, so looking it up must pay
    reference = run(target, plain(), [*prompt, *PROMPT], max_new_tokens=24)
    found = run(target, prompt_lookup("5"), [*prompt, *PROMPT], max_new_tokens=24)
    assert found["token_ids"] == reference["token_ids"]
    committed = found["prefill_tokens"] + sum(count + 1 for count in found["accepted"])
    assert committed == len(found["token_ids"])
    assert len(found["accepted"]) == len(found["tree_nodes"]) == len(found["step_seconds"])
    assert max(found["tree_nodes"], default=1) <= 5
    assert all(count < nodes for count, nodes in zip(found["accepted"], found["tree_nodes"], strict=True))


def test_accepted_lookups_are_seen():
    """A target that copies: each token is answered by itself, so every drafted token is accepted."""
    target = copying_target()
    found = run(target, prompt_lookup("5"), [7] * 12, max_new_tokens=13)
    assert found["token_ids"] == [7] * 13
    assert found["prefill_tokens"] == 5 and found["accepted"] == [4, 2]
    assert found["tree_nodes"][0] == 5
    assert run(target, plain(), [7] * 12, max_new_tokens=5)["accepted"] == [0] * 4


def copying_target():
    target = tiny_target(with_text=True)
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            if "layers" in name:
                parameter.zero_()
        target.model.lm_head.weight.copy_(target.model.model.embed_tokens.weight)
    return target


def test_the_end_token_ends_stock_answers_too():
    target = copying_target()
    found = run(target, plain(), [3, EOS], max_new_tokens=9)
    assert found["token_ids"] == [EOS] and found["finish_reason"] == "stop" and found["accepted"] == []


def test_ignored_end_tokens_end_no_answer():
    """Ours and stock go on behind them alike; the last token is at the limit, not an end token by chance."""
    target = copying_target()
    target.model.generation_config.pad_token_id = None  # as of Llama 3
    none = METHODS["none"](MethodSpec("none", "none"), target, MethodSettings())
    ours = none.run([3, EOS], SamplingParams(max_new_tokens=9, ignore_eos=True))
    found = run(target, plain(), [3, EOS], max_new_tokens=9, ignore_eos=True)
    assert ours["token_ids"] == found["token_ids"] == [EOS] * 9
    assert ours["finish_reason"] == found["finish_reason"] == "length"
    assert ours["accepted"] == found["accepted"] == [0] * 8


def test_stock_sampling_depends_on_the_seed_alone(target):
    settings = dict(max_new_tokens=16, temperature=1.0)
    state = torch.random.get_rng_state()
    one = run(target, plain(), seed=2**63 + 1, **settings)["token_ids"]
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert run(target, plain(), seed=2**63 + 1, **settings)["token_ids"] == one
    assert run(target, plain(), seed=3, **settings)["token_ids"] != one
    assert run(target, plain(), seed=2**63 + 1, top_k=-1, **settings)["token_ids"] == one, "-1 is off, too"


def test_the_models_own_generation_config_decides_nothing(target):
    wanted = run(target, plain(), max_new_tokens=12)["token_ids"]
    config = target.model.generation_config
    before = config.to_dict()
    config.repetition_penalty, config.max_new_tokens, config.num_beams = 5.0, 2, 3
    config.do_sample, config.temperature, config.min_p, config.top_k = True, 3.0, 0.9, 1
    try:
        assert run(target, plain(), max_new_tokens=12)["token_ids"] == wanted
        sampled = run(target, plain(), max_new_tokens=12, temperature=1.0, seed=5)["token_ids"]
    finally:
        config.update(**before)
    assert sampled == run(target, plain(), max_new_tokens=12, temperature=1.0, seed=5)["token_ids"]


def test_stock_ends_where_the_context_ends():
    target = tiny_target(with_text=True, max_position_embeddings=16)
    none = METHODS["none"](MethodSpec("none", "none"), target, MethodSettings())
    params = SamplingParams(max_new_tokens=50)
    ours, theirs = none.run(PROMPT, params), StockGenerate(target, plain()).run(PROMPT, params)
    assert ours["token_ids"] == theirs["token_ids"] and theirs["finish_reason"] == ours["finish_reason"]

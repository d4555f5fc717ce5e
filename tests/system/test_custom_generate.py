"""`amphista dev export transformers`, then transformers' own `generate` on the user's model: the tokens of plain
decoding, in fewer forwards; what would change an answer and is not supported is refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from amphista.drafter.checkpoint import save_drafter
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.errors import RequestError
from amphista.llm import LLM
from amphista.target.loading import load_target
from amphista.target.target import Target
from tests.system.test_cli import amphista
from tests.tiny import EOS, byte_tokenizer, shaken, tiny_model

PROMPTS = [[5, 17, 230, 44, 5, 17], [9, 61, 9, 63]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "custom"
    result = amphista("dev", "export", "transformers", out, "--drafter", "lookup")
    assert result.returncode == 0 and f'custom_generate="{out}"' in result.stdout, result.stderr
    return out


@pytest.fixture(scope="module", autouse=True)
def _modules(tmp_path_factory):
    """Where transformers copies code to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def generate(folder, model):
    """transformers' generate with the exported folder."""

    def generate(ids, **settings):
        return model.generate(ids, custom_generate=str(folder), trust_remote_code=True, **settings)

    return generate


def row(ids):
    return torch.tensor([ids])


def padded():
    ids = torch.tensor([PROMPTS[0], [EOS, EOS, *PROMPTS[1]]])
    return ids, torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def test_greedy_tokens_are_those_of_transformers_in_fewer_forwards(generate, model):
    settings = {"max_new_tokens": 60, "repetition_penalty": 0.5}  # below 1: it repeats itself
    plain = model.generate(row(PROMPTS[0]), do_sample=False, **settings)
    assert generate(row(PROMPTS[0]), tree=8, **settings).tolist() == plain.tolist()
    llm = model._amphista[1]
    assert llm.drafter.name == "lookup" and llm.target.path != "stock"
    assert llm.generate(PROMPTS[0], **settings).stats.tau > 1.2
    generate(row(PROMPTS[1]), tree=8, max_new_tokens=5)
    assert model._amphista[1] is llm


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # stock generate, where nothing is said
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_length": 20},
        {"max_new_tokens": 30, "repetition_penalty": 1.3},
        {"max_new_tokens": 30, "min_length": 20, "eos_token_id": list(range(150))},
        {"max_new_tokens": 30, "min_new_tokens": 2, "min_length": 20, "eos_token_id": list(range(150))},
        {"max_new_tokens": 30, "eos_token_id": [3, 100, 101, 102, 103, 104, 105]},
        {"generation_config": GenerationConfig(max_new_tokens=12, eos_token_id=EOS)},
        {"max_new_tokens": 60, "eos_token_id": None},
        {"max_new_tokens": 60, "eos_token_id": -1},
        {"max_new_tokens": 9, "logits_processor": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList()},
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_in_transformers(generate, model, settings):
    ids, mask = padded()
    plain = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    assert generate(ids, attention_mask=mask, **settings).tolist() == plain.tolist()


def test_sampled_tokens_are_those_of_plain_decoding_with_the_same_seed(generate):
    ids, mask = padded()
    settings = {"temperature": 0.8, "top_k": 20}
    found = generate(ids, attention_mask=mask, do_sample=True, seed=7, max_new_tokens=30, **settings)
    baseline = LLM(Target(tiny_model()))
    for number, prompt in enumerate(PROMPTS):
        plain = baseline.generate(prompt, seed=7 + number, max_new_tokens=30, **settings).token_ids
        assert found[number, ids.shape[1] :].tolist()[: len(plain)] == plain
    torch.manual_seed(3)
    one = generate(row(PROMPTS[0]), do_sample=True)
    assert generate(row(PROMPTS[0]), do_sample=True).tolist() != one.tolist()
    torch.manual_seed(3)
    assert generate(row(PROMPTS[0]), do_sample=True).tolist() == one.tolist()


def test_a_drafter_of_a_folder_knows_the_model_by_its_tokenizer(target_folder, tmp_path):
    target = load_target(str(target_folder))
    heads = shaken(Medusa(MedusaConfig(num_heads=2), target.spec, target.shared))
    save_drafter(heads, tmp_path / "mine", target.fingerprint, card="", training={})
    exported = amphista("dev", "export", "transformers", tmp_path / "with-mine", "--drafter", tmp_path / "mine")
    assert exported.returncode == 0, exported.stderr
    model = AutoModelForCausalLM.from_pretrained(target_folder)
    settings = {"custom_generate": str(tmp_path / "with-mine"), "trust_remote_code": True, "max_new_tokens": 20}
    found = model.generate(row(PROMPTS[0]), **settings)
    assert found.tolist() == model.generate(row(PROMPTS[0]), max_new_tokens=20, do_sample=False).tolist()
    assert model._amphista[1].drafter.name == "medusa"


def test_changed_weights_are_seen(generate, model):
    before = generate(row(PROMPTS[0]), max_new_tokens=20)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-1)
    after = generate(row(PROMPTS[0]), max_new_tokens=20)
    assert after.tolist() == model.generate(row(PROMPTS[0]), max_new_tokens=20, do_sample=False).tolist()
    assert after.tolist() != before.tolist()


def test_stop_strings_and_streamers(generate, model):
    class Kept(BaseStreamer):
        tokens, ended = [], False

        def put(self, value):
            self.tokens.extend(value.tolist())

        def end(self):
            self.ended = True

    tokenizer, kept = byte_tokenizer(), Kept()
    plain = model.generate(row(PROMPTS[0]), max_new_tokens=40, do_sample=False)[0, 6:].tolist()
    stop = next(text for text in map(tokenizer.decode, plain[4:]) if text.isascii())
    settings = {"max_new_tokens": 40, "stop_strings": [stop], "tokenizer": tokenizer}
    stopped = generate(row(PROMPTS[0]), streamer=kept, **settings)
    assert stopped.tolist() == model.generate(row(PROMPTS[0]), do_sample=False, **settings).tolist()
    assert kept.tokens == stopped[0].tolist() and kept.ended and stopped.shape[1] < 46


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 3}, "num_beams"),
        ({"logits_processor": [print]}, "logits_processor"),
        ({"inputs_embeds": torch.zeros(1, 1, 32)}, "inputs_embeds"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"max_time": 3.0}, "max_time"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"max_length": 3}, "max_new_tokens"),
        ({"stop_strings": ["a"], "min_new_tokens": 4}, "stop_strings"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_by_name(generate, settings, named):
    with pytest.raises(RequestError, match=named):
        generate(row(PROMPTS[0]), **settings)


def test_an_export_is_not_written_over(folder):
    result = amphista("dev", "export", "transformers", folder)
    assert result.returncode == 2 and "another folder" in result.stderr

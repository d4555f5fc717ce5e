"""Families of every kind, tiny and random, through the check at load and hostile drafters: the tokens are stock's.

The whole list of the installed `transformers` takes minutes: `python -m tests.families`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoConfig

from amphista.errors import TargetError
from amphista.target.exactness import check_exactness
from amphista.target.target import Target
from amphista.target.tiny import WINDOW, tiny_config, tiny_model
from tests.families import configuration, judge

EQUAL = {
    "mistral": "a window in every layer; the fast path",
    "dots1": "a window in the configuration that no layer has",
    "gemma3": "text inside a multimodal configuration, windows in some layers",
    "gemma3n_text": "layers that read an earlier layer's keys and values",
    "gemma4_text": "heads of another size in some layers",
    "llama4_text": "chunks",
    "gpt_oss": "sinks, eager attention",
    "codegen": "an attention of its own",
    "beam": "no rotation in some layers",
    "granite_swa": "windows, eager attention",
    "afmoe": "experts",
}
REFUSED = {
    "bert": "LM head that drafters share",
    "deepseek_v32": "DynamicIndexedLayer",
    "doge": "as configured it is not causal",
    "gpt_neo": "tree's node",
    "mllama": "read images",
    "openai-gpt": "takes no cache",
    "qwen3_next": "one recurrent state",
    "rwkv": "one recurrent state",
}


@pytest.mark.parametrize("family", EQUAL)
def test_decodes_as_stock(family):
    verdict = judge(family)
    assert verdict.result == "equal", verdict
    assert verdict.num_different >= 8, "a text that repeats itself proves little"


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_true_reason(family):
    verdict = judge(family)
    assert verdict.result == "refused" and REFUSED[family] in verdict.why, verdict


def test_what_no_tiny_copy_can_be_made_of_is_read_beyond_its_windows(monkeypatch):
    """The model itself, then; a window too long to be read is refused by name."""

    def refuse(config):
        raise TargetError("no tiny model of this class can be built")

    monkeypatch.setattr("amphista.target.exactness.tiny_model", refuse)
    check_exactness(Target(tiny_model(configuration("mistral"))))
    with pytest.raises(TargetError, match="tree's node"):
        check_exactness(Target(tiny_model(GPTNeoConfig())))
    target = Target(tiny_model(configuration("mistral")))
    target.config.sliding_window = 100_000
    with pytest.raises(TargetError, match="within windows of 100000 tokens"):
        check_exactness(target)


def test_a_model_that_hardly_reads_its_context_is_not_taken_at_its_word(monkeypatch):
    def refuse(config):
        raise TargetError("no tiny model of this class can be built")

    model = tiny_model(configuration("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-9)
    monkeypatch.setattr("amphista.target.exactness.tiny_model", refuse)
    with pytest.raises(TargetError, match="hardly depend on the context"):
        check_exactness(Target(model))


def test_tiny_copies_keep_kinds_of_layers_and_their_order():
    small = tiny_config(configuration("gemma3n_text"))
    big = configuration("gemma3n_text")
    own = small.num_hidden_layers - small.num_kv_shared_layers
    assert small.num_kv_shared_layers > 0 and set(small.layer_types[:own]) == set(big.layer_types)
    assert small.layer_types[:own] == big.layer_types[:own] and len(small.intermediate_size) == small.num_hidden_layers
    assert small.sliding_window == WINDOW
    assert big.num_hidden_layers > small.num_hidden_layers, "the original is left alone"

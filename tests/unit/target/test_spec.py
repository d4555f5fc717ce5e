from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma4TextConfig, LlamaConfig, Phi3Config, PreTrainedConfig

from amphista.errors import TargetError
from amphista.target.spec import Fingerprint, LogitTransform, SharedWeights, TargetSpec
from amphista.target.target import Target
from tests.tiny import FAMILIES, SIZES, tiny_model, tiny_target

VOCABULARY = {"a": 0, "b": 1, "\u00e9": 2}


def shared_of(weight, bias=None, transform=None):
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    head.weight.data = weight
    if bias is not None:
        head.bias.data = bias
    return SharedWeights(nn.Embedding(weight.shape[0], 4), head, transform or LogitTransform())


def fingerprint(target, vocabulary=VOCABULARY):
    return Fingerprint.of(target.spec, target.shared, vocabulary)


@pytest.mark.parametrize("family", FAMILIES)
def test_dimensions_of_every_family(family):
    spec = tiny_target(family).spec
    assert (spec.hidden_size, spec.embedding_size, spec.vocab_size, spec.num_layers) == (32, 32, 300, 2)
    assert (spec.num_attention_heads, spec.head_size, spec.max_positions) == (4, 8, 512)
    assert spec.num_key_value_heads == (4 if family in ("gpt2", "gpt_neox", "opt") else 2)
    assert spec.intermediate_size == (128 if family == "gpt2" else 48)
    assert spec.rope_theta > 0 and 0 < spec.norm_eps < 1e-3


def test_a_configuration_without_sizes_is_refused():
    with pytest.raises(TargetError, match="num_attention_heads, n_head"):
        TargetSpec.from_config(PreTrainedConfig(), embedding_size=8, vocab_size=9)


def spec_of(config):
    return TargetSpec.from_config(config, embedding_size=8, vocab_size=9)


def test_of_sizes_by_layer_the_largest_counts():
    assert spec_of(PreTrainedConfig(**SIZES | {"intermediate_size": [16, 64, 32]})).intermediate_size == 64
    config = Gemma4TextConfig(
        **SIZES | {"num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    assert spec_of(config).head_size == 16


def test_text_inside_a_configuration_of_several_parts():
    spec = spec_of(Gemma3Config(text_config=dict(SIZES, head_dim=8)))
    assert (spec.family, spec.hidden_size, spec.num_layers) == ("gemma3_text", 32, 2)


def rope(kind, **settings):
    return {"rope_type": kind, "rope_theta": 5000.0, **settings}


@pytest.mark.parametrize("rope_parameters", [None, {}, {"full_attention": None, "sliding_attention": rope("default")}])
def test_rotary_parameters_may_be_missing(rope_parameters):
    spec = spec_of(PreTrainedConfig(**SIZES, rope_parameters=rope_parameters))
    assert spec.max_positions == 512 and spec.rope_theta == (5000.0 if rope_parameters else 10000.0)


def test_the_context_that_a_configuration_really_allows():
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=512)
    assert spec_of(LlamaConfig(**SIZES, rope_parameters=yarn)).max_positions == 2048
    whole = LlamaConfig(**SIZES | {"max_position_embeddings": 2048}, rope_parameters=yarn)
    assert spec_of(whole).max_positions == 2048
    linear = LlamaConfig(**SIZES, rope_parameters=rope("linear", factor=4.0))
    assert spec_of(linear).max_positions == 512 and spec_of(linear).context == "512"


def test_a_context_cut_short_says_why():
    factors = rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=64)
    spec = spec_of(Phi3Config(**SIZES, rope_parameters=factors, original_max_position_embeddings=64))
    assert spec.max_positions == 64 and spec.context.startswith("64 (longrope: beyond its original context of 64")
    dynamic = spec_of(LlamaConfig(**SIZES, rope_parameters=rope("dynamic", factor=4.0)))
    assert dynamic.max_positions == 512 and dynamic.context.startswith("512 (dynamic: beyond its original context")


# -- logits -----------------------------------------------------------------------------------------------------------


def test_logit_transform_multiplies_divides_then_caps():
    logits = torch.tensor([-30.0, 0.0, 2.0, 30.0])
    assert torch.equal(LogitTransform()(logits), logits)
    found = LogitTransform(multiply=3.0, divide=2.0, softcap=10.0)(logits)
    torch.testing.assert_close(found, torch.tanh(logits * 1.5 / 10.0) * 10.0)
    LogitTransform(multiply=3.0, divide=2.0, softcap=10.0).apply(logits)
    assert torch.equal(logits, found)


def test_drafters_in_c_cap_and_scale_logits_as_the_target_does():
    logits = torch.tensor([-30.0, 0.0, 2.0, 30.0])
    transform = LogitTransform(multiply=3.0, divide=2.0, softcap=10.0)
    shared = shared_of(torch.eye(4), transform=transform)
    found = torch.tanh(logits / shared.logit_cap) * shared.logit_cap * shared.logit_scale
    torch.testing.assert_close(found, shared.transform(logits))
    assert shared_of(torch.eye(4), transform=LogitTransform(divide=2.0)).logit_cap == 0


def test_logit_transform_reads_each_familys_own_names():

    def read(config):
        return LogitTransform.from_config(config)

    assert read(PreTrainedConfig()) == LogitTransform()
    assert read(PreTrainedConfig(logit_scale=0.25)) == LogitTransform(multiply=0.25)
    assert read(PreTrainedConfig(logits_scaling=8.0)) == LogitTransform(divide=8.0)
    assert read(PreTrainedConfig(final_logit_softcapping=30.0)) == LogitTransform(softcap=30.0)
    assert read(PreTrainedConfig(logit_scale=None, final_logit_softcapping=None)) == LogitTransform()


def test_project_reproduces_a_capped_familys_logits():
    target = tiny_target("gemma2")
    output = target.prefill([1, 2, 3], target.new_cache())
    torch.testing.assert_close(target.shared.project(output.hidden[-1:]), output.logits)
    assert target.shared.transform(torch.tensor([1e6])) == pytest.approx(30.0)


def test_head_rows_are_copies_with_their_bias():
    weight, bias = torch.randn(9, 4), torch.randn(9)
    rows, row_bias = shared_of(weight.clone(), bias.clone()).head_rows(torch.tensor([3, 0]))
    assert torch.equal(rows, weight[[3, 0]]) and torch.equal(row_bias, bias[[3, 0]])
    shared = shared_of(weight.clone())
    rows, row_bias = shared.head_rows(torch.tensor([3]))
    rows.zero_()
    assert row_bias is None and torch.equal(shared.head_weight[3], weight[3])


def test_gradients_reach_the_states_never_the_target(target):
    states = torch.randn(2, 32, requires_grad=True)
    target.shared.project(states).sum().backward()
    assert states.grad is not None and target.shared.head_weight.grad is None
    assert not target.shared.embed(torch.tensor([1])).requires_grad


# -- fingerprint ------------------------------------------------------------------------------------------------------


def test_the_same_weights_in_another_dtype_are_the_same_target():
    """What a bf16 file holds gives one fingerprint, loaded in bf16 or in float32."""
    model = tiny_model().to(torch.bfloat16)
    in_bf16 = fingerprint(Target(model))
    in_float32 = fingerprint(Target(tiny_model().to(torch.bfloat16).to(torch.float32)))
    assert in_bf16 == in_float32 and in_bf16.differences(in_float32) == []
    assert in_bf16 == fingerprint(Target(tiny_model())), "and so does a float32 file, rounded or not"


def test_other_weights_differ_in_the_lm_head_alone(target):
    assert fingerprint(target).differences(fingerprint(tiny_target(seed=1))) == ["lm_head_sha256"]


def test_one_changed_row_among_the_hashed_ones_is_noticed():
    target, before = tiny_target(), fingerprint(tiny_target())
    with torch.no_grad():
        target.shared.head_weight[299, 3] += 0.5  # the last row is always hashed
    assert fingerprint(target).differences(before) == ["lm_head_sha256"]


@pytest.mark.parametrize("other", [{"a": 0, "b": 1}, {"a": 0, "b": 2, "\u00e9": 1}, {"a": 0, "b": 1, "e": 2}])
def test_another_vocabulary_differs(target, other):
    assert fingerprint(target).differences(fingerprint(target, other)) == ["tokenizer_sha256"]


def test_the_order_of_a_vocabulary_does_not_matter(target):
    assert fingerprint(target) == fingerprint(target, dict(reversed(VOCABULARY.items())))


def test_other_dimensions_are_named(target):
    differences = fingerprint(target).differences(fingerprint(tiny_target("qwen2", hidden_size=16)))
    assert differences == ["family", "hidden_size", "embedding_size", "lm_head_sha256"]

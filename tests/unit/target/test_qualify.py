"""Who takes the fast path: exactly the family's own modules; anything unknown keeps the stock model, and says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Gemma3Config

from amphista.cache.static import KVCache
from amphista.errors import TargetError
from amphista.kernels.linear import TorchLinear
from amphista.target import qualify
from amphista.target.experts import Experts
from amphista.target.loading import load_target
from amphista.target.qualify import why_not_fast
from amphista.target.target import Target
from tests.tiny import FAMILIES, tiny_model

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    reason = why_not_fast(tiny_model(family))
    if family in ("gpt_neox", "gpt2", "opt"):
        assert "not of the families that the fast forward knows" in reason
    else:
        assert reason is None


def _adapter(model):
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj)


def _subclass(model):
    class Scaled(nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj.__class__ = Scaled


def _hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _patched(model):
    model.model.layers[0].forward = lambda *_: None


def _extra_part(model):
    model.model.layers[0].gate = nn.Linear(2, 2)


def _half(model):
    model.model.layers[0].half()


def _act(model):
    model.model.layers[1].mlp.act_fn = nn.GELU()


def _rope(model):
    model.config.rope_parameters = {"rope_type": "proportional", "factor": 2.0, "rope_theta": 10000.0}


def _parametrised(model):
    torch.nn.utils.parametrizations.orthogonal(model.model.layers[0].self_attn.o_proj)


def _other_module(model):
    """Code that comes with a model may be called as the library's."""
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "somebody.modeling_llama"})


def _adapted_embedding(model):
    model.model.embed_tokens.__class__ = type("Embedding", (nn.Embedding,), {"__module__": "somebody.adapters"})


def _quantised(model):
    model.config.quantization_config = {"quant_method": "somehow"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_adapter, "not a plain linear layer"),
        (_subclass, "not a plain linear layer"),
        (_hook, "carries a hook"),
        (_patched, "patched forward"),
        (_extra_part, "parts that are not the family's"),
        (_half, "several types"),
        (_act, "activation is GELU"),
        (_rope, "of type proportional"),
        (_parametrised, "parametri"),
        (_other_module, "LlamaForCausalLM is not of the families"),
        (_adapted_embedding, "embedding or LM head is not a plain one"),
        (_quantised, "it is quantised"),
    ],
)
def test_what_is_unknown_stays_stock(change, said):
    model = tiny_model()
    change(model)
    assert said in why_not_fast(model)


def _hooked_router(model):
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: None)


def _other_experts(model):
    experts = model.model.layers[1].mlp.experts
    experts.__class__ = type("Glm4MoeExperts", (type(experts),), {"__module__": "somebody.experts"})


def _further_part(model):
    model.model.layers[1].mlp.memory = nn.Linear(2, 2)


def _adapted_shared(model):
    model.model.layers[1].mlp.shared_experts.up_proj = nn.Sequential(model.model.layers[1].mlp.shared_experts.up_proj)


def _groups(model):
    model.model.layers[1].mlp.gate.num_group = 2


def _half_experts(model):
    model.model.layers[1].mlp.experts.half()


def _biased_gate(model):
    model.model.layers[1].mlp.shared_expert_gate = nn.Linear(32, 1)


def _adapted_gate(model):
    gate = model.model.layers[1].mlp.shared_expert_gate
    gate.__class__ = type("Linear", (nn.Linear,), {"__module__": "somebody.adapters"})


@pytest.mark.parametrize(
    ("change", "said"), [(_biased_gate, "shared expert has a bias"), (_adapted_gate, "not a plain linear layer")]
)
def test_the_gate_of_a_shared_expert_is_a_plain_one(change, said):
    model = tiny_model("qwen2_moe")
    change(model)
    assert said in why_not_fast(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_hooked_router, "carries a hook"),
        (_other_experts, "parts that are not the family's"),
        (_further_part, "parts that are not the family's"),
        (_adapted_shared, "not a plain linear layer"),
        (_groups, "chosen within groups"),
        (_half_experts, "several types"),
    ],
)
def test_what_is_unknown_of_experts_stays_stock(change, said):
    model = tiny_model("glm4_moe")
    change(model)
    assert said in why_not_fast(model)


def test_a_router_may_be_of_its_own_type():
    model = tiny_model("ernie4_5_moe", dtype=torch.bfloat16)
    model.model.layers[1].mlp.gate.float()
    target = Target(model)
    assert target.speed_up(), target.why_stock


def test_norms_may_be_of_their_own_type():
    """As gpt-oss's are where its weights are bfloat16."""
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    for module in model.modules():
        if type(module).__name__ == "GptOssRMSNorm":
            module.float()
    target = Target(model)
    assert target.speed_up(native=True), target.why_stock
    assert target.path in ("native", "fast")


def test_routers_multiply_in_float32_where_the_family_does():
    block = tiny_model("glm4_moe", dtype=torch.bfloat16).model.layers[1].mlp
    assert Experts.of(block, TorchLinear).router.weight.dtype is torch.float32


def test_clipped_queries_stay_stock():
    assert "clipped" in why_not_fast(tiny_model("olmoe", clip_qkv=0.5))
    assert why_not_fast(tiny_model("llama", clip_qkv=0.5)) is None  # which does not read it


def test_a_subclass_of_the_family_stays_stock():
    model = tiny_model()
    model.__class__ = type("MyLlama", (type(model),), {})
    assert "MyLlama is not of the families" in why_not_fast(model)


def test_a_quantised_model_of_text_and_images_stays_stock():
    text = tiny_model("gemma3").config
    model = AutoModelForImageTextToText.from_config(Gemma3Config(text_config=text.to_dict(), vision_config=VISION))
    assert why_not_fast(model) is None
    model.config.quantization_config = {"quant_method": "somehow"}
    assert why_not_fast(model) == "it is quantised"


@pytest.mark.parametrize(("family", "capped"), [("llama", False), ("gemma", False), ("gemma2", True)])
def test_scores_are_capped_where_the_layers_say_so(family, capped):
    """A configuration may hold a cap that nothing reads; sdpa leaves it out where something does."""
    model = tiny_model(family, attn_logit_softcapping=1.5)
    assert (why_not_fast(model) is None) == capped
    model.config._attn_implementation = "sdpa"
    assert (why_not_fast(model) is None) != capped
    assert why_not_fast(tiny_model("gemma2", attn_logit_softcapping=None)) is None


def test_settings_that_the_family_does_not_know_are_not_read():
    """`transformers` keeps what a configuration holds, whether anything reads it or not."""
    expected = Target(tiny_model("llama")).prefill([5, 6, 7], KVCache(2))
    for name in ("hidden_activation", "residual_multiplier", "embedding_multiplier"):
        target = Target(tiny_model("llama", **{name: "relu" if name == "hidden_activation" else 3.0}))
        assert target.speed_up() and target.prefill([5, 6, 7], target.new_cache()).distance(expected) < 1e-5
    for name in ("logits_scaling", "final_logit_softcapping"):  # what all targets read is told at the latest here
        with pytest.raises(TargetError, match="differs from its stock model"):
            Target(tiny_model("llama", **{name: 3.0})).speed_up()


def test_float16_stays_stock():
    target = Target(tiny_model(dtype=torch.float16))
    assert not target.speed_up() and target.path == "stock" and "float16" in target.why_stock
    assert target.stock() is target


def test_float64_is_fast():
    target = Target(tiny_model(dtype=torch.float64))
    assert target.speed_up() and target.path == "fast"


def test_a_loaded_target_is_fast_and_gives_its_stock_model_up(target_folder):
    fast, stock = load_target(str(target_folder)), load_target(str(target_folder), fast=False)
    assert fast.path in ("native", "fast") and stock.path == "stock" and fast.fingerprint == stock.fingerprint
    with pytest.raises(TargetError, match="load it with fast=False"):
        _ = fast.model
    assert fast.stock().path == "stock" and fast.stock() is fast.stock()
    ids = torch.arange(5)[None]
    torch.testing.assert_close(fast.hidden_states(ids), fast.stock().hidden_states(ids), atol=1e-4, rtol=1e-4)
    held = Target(tiny_model())
    assert held.speed_up(release=True)
    with pytest.raises(TargetError, match="cannot be loaded again"):
        held.stock()


def test_half_precision_is_for_gpus():
    assert qualify._type_reason(torch.float16, "cuda") is None
    assert qualify._type_reason(torch.float16, "cpu") == "its weights are float16"
    assert qualify._type_reason(torch.bfloat16, "cpu") is None
    assert qualify._type_reason(torch.float32, "mps") == "the fast path has not been tried on mps devices"

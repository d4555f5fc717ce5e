"""Tiny random targets of every tested family, a byte tokenizer, and hostile drafters. Nothing is downloaded."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from itertools import pairwise

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from amphista.drafter.amphista import Amphista, AmphistaConfig
from amphista.drafter.base import Drafter
from amphista.drafter.eagle import Eagle, EagleConfig
from amphista.drafter.early_exit import EarlyExit, EarlyExitConfig
from amphista.drafter.falcon import Falcon, FalconConfig
from amphista.drafter.hydra import Hydra, HydraConfig
from amphista.drafter.medusa import Medusa, MedusaConfig
from amphista.drafter.proposer import Proposer
from amphista.drafter.scoring import ScoringDrafter
from amphista.drafter.tandem import Tandem, TandemConfig
from amphista.target.target import Target
from amphista.target.text import Text
from amphista.tree.candidates import Candidates, ConditionalRanks, NgramDraft
from amphista.tree.grow import AutoGrower
from amphista.tree.tune import Costs

VOCAB = 300
EOS = 257
WINDOW = 8
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=256,
    eos_token_id=EOS,
    pad_token_id=EOS,
)
WITHOUT_KV_HEADS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}

FEW_OF_MANY = {"num_experts_per_tok": 3, "moe_intermediate_size": 20}  # experts, of odd sizes
BY_SIGMOID = {**FEW_OF_MANY, "n_routed_experts": 7, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-windowed": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-windowed": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=8),
    "gemma2": lambda: Gemma2Config(  # scores are capped where they are large
        **SIZES, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=2, attn_logit_softcapping=1.5
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3-by-kind": lambda: Gemma3TextConfig(  # rotated by other angles in other layers
        **SIZES,
        head_dim=8,
        sliding_window=WINDOW,
        query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    ),
    "phi3": lambda: Phi3Config(**SIZES, sliding_window=None),
    "phi3-windowed": lambda: Phi3Config(**SIZES, sliding_window=WINDOW),
    "phi3-half": lambda: Phi3Config(  # half a head is rotated, by other angles in long texts
        **{**SIZES, "max_position_embeddings": 1024},
        original_max_position_embeddings=512,
        sliding_window=None,
        head_dim=8,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.5, 2.5],
            "long_factor": [3.0, 9.0],
        },
    ),
    "granite": lambda: GraniteConfig(
        **SIZES, embedding_multiplier=3.0, logits_scaling=7.0, residual_multiplier=0.3, attention_multiplier=0.2
    ),
    "smollm3": lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0], use_sliding_window=False),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "olmo3": lambda: Olmo3Config(**SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "ernie4_5": lambda: Ernie4_5Config(**SIZES, use_bias=True, head_dim=8),
    "glm4": lambda: Glm4Config(**SIZES, head_dim=8, rope_parameters=HALF),
    "exaone4": lambda: Exaone4Config(
        **SIZES, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **FEW_OF_MANY, num_experts=7, head_dim=8, norm_topk_prob=True),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, **FEW_OF_MANY, num_experts=7, shared_expert_intermediate_size=28, mlp_only_layers=[0]
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=WINDOW),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=7, num_experts_per_tok=3),
    "granitemoe": lambda: GraniteMoeConfig(
        **SIZES, num_local_experts=6, num_experts_per_tok=2, residual_multiplier=0.3, attention_multiplier=0.2
    ),
    "glm4_moe": lambda: Glm4MoeConfig(
        **SIZES, **BY_SIGMOID, head_dim=8, use_qk_norm=True, rope_parameters=HALF, routed_scaling_factor=1.8
    ),
    "dots1": lambda: Dots1Config(**SIZES, **BY_SIGMOID, head_dim=8, n_shared_experts=2, norm_topk_prob=False),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(
        **SIZES, moe_num_experts=7, moe_k=3, moe_intermediate_size=20, moe_layer_start_index=1, use_bias=False
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        swiglu_limit=0.7,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**WITHOUT_KV_HEADS),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=256, eos_token_id=EOS
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=32,
        bos_token_id=256,
        eos_token_id=EOS,
        pad_token_id=EOS,
    ),
}


def tiny_model(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model; weights are spread out so that choices vary and near-ties are rare."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    config._experts_implementation = "eager"  # of any size, in any type
    capped = getattr(config, "attn_logit_softcapping", None)  # sdpa leaves that out
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch says that nothing is to be drawn
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                parameter.normal_(0, 0.2)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.35 if "embed" not in name and "wte" not in name else 1.0)
            elif name.endswith("sinks"):
                parameter.normal_(0, 1.0)
    model.generation_config.eos_token_id = EOS
    return model.to(dtype).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; ids 256.. are special. Multi-byte characters therefore take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def tiny_target(family: str = "llama", *, with_text: bool = False, **changes) -> Target:
    text = Text(byte_tokenizer()) if with_text else None
    return Target(tiny_model(family, **changes), text, name=f"tiny-{family}")


# -- drafters ---------------------------------------------------------------------------------------------------------


class Scripted(Drafter):
    """Offers whatever a function says for the next `depth` positions; knows positions from the rows it was given."""

    name = "scripted"

    def __init__(self, depth: int, offer, fall: float = 0.1) -> None:
        """fall: by how much a rank's log-probability lies below that of the rank before."""
        super().__init__()
        self._depth, self._offer, self._fall = depth, offer, fall

    @property
    def num_heads(self) -> int:
        return self._depth

    def commit(self, state, hidden, next_ids) -> None:
        state.num_rows += hidden.shape[0]
        state.features = [*(state.features or [])[: state.num_rows - hidden.shape[0]], *next_ids.tolist()]

    def trim(self, state, num_rows) -> None:
        state.num_rows = min(state.num_rows, num_rows)

    def draft(self, state, num_ranks, max_depth=None) -> Candidates:
        depths = range(1, min(self._depth, max_depth or self._depth) + 1)
        offered = [self._offer(state, depth, num_ranks) for depth in depths]
        return Candidates(offered, [[-0.1 - self._fall * rank for rank in range(len(ranks))] for ranks in offered])


def _distinct(tokens, num_ranks):
    return list(dict.fromkeys(token % VOCAB for token in tokens))[:num_ranks]


def always_right(tokens: list[int]) -> Scripted:
    """Knows the whole sequence (prompt and answer); the pending token sits at index num_rows."""

    def offer(state, depth, num_ranks):
        at = state.num_rows + depth
        token = tokens[at] if at < len(tokens) else 0
        return _distinct([token, *(token + 1 + i for i in range(num_ranks))], num_ranks)

    return Scripted(4, offer, fall=20.0)  # it is sure, whatever the noise of a sampled answer says


def always_wrong(tokens: list[int]) -> Scripted:
    """ChildCandidates every rank but the right one."""

    def offer(state, depth, num_ranks):
        at = state.num_rows + depth
        token = tokens[at] if at < len(tokens) else 0
        return _distinct((token + 1 + i for i in range(min(num_ranks, VOCAB - 1))), num_ranks)

    return Scripted(4, offer)


def randomly(tokens: list[int]) -> Scripted:
    """Other tokens in every call."""
    source = random.Random(1)
    return Scripted(5, lambda state, depth, num_ranks: source.sample(range(VOCAB), min(num_ranks, VOCAB)))


class OnPaths(Scripted):
    """Scripted, and below every token the next depth's in another order, as likely as chance has it."""

    def draft(self, state, num_ranks, max_depth=None) -> Candidates:
        flat = super().draft(state, num_ranks, max_depth)
        source = random.Random(state.num_rows)
        ranks = [
            [source.sample(range(len(children)), min(num_ranks, len(children))) for _ in parents]
            for parents, children in pairwise(flat.tokens)
        ]
        logs = [[sorted((-3 * source.random() for _ in row), reverse=True) for row in rows] for rows in ranks]
        return replace(flat, below=ConditionalRanks(ranks, logs))


def misled(tokens: list[int]) -> Scripted:
    """ChildCandidates the right tokens among others, and says wild things of which stands below which."""

    def offer(state, depth, num_ranks):
        at = state.num_rows + depth
        return _distinct([tokens[at] if at < len(tokens) else 0, *range(num_ranks)], num_ranks)

    return OnPaths(4, offer)


def repeating(tokens: list[int]) -> Scripted:
    """ChildCandidates the pending token again and again, then its neighbours."""

    def offer(state, depth, num_ranks):
        return _distinct((state.features[-1] + i for i in range(num_ranks)), num_ranks)

    return Scripted(3, offer)


def ends_early(tokens: list[int]) -> Scripted:
    """Puts the end token into every path, first among the right tokens, then before them."""

    def offer(state, depth, num_ranks):
        at = state.num_rows + depth
        token = tokens[at] if at < len(tokens) else EOS
        order = [EOS, token] if depth % 2 else [token, EOS]
        return _distinct([*order, *range(num_ranks)], num_ranks)

    return Scripted(4, offer)


HOSTILE = {
    "always-right": always_right,
    "always-wrong": always_wrong,
    "random": randomly,
    "repeating": repeating,
    "ends-early": ends_early,
    "misled": misled,
}


class Grafting(Proposer):
    """Heads or none, and a graft that a function makes of what the sequence will be, from the pending token on."""

    def __init__(self, heads: Drafter | None, tokens: list[int], graft) -> None:
        super().__init__(heads, use_lookup=True)
        self._tokens, self._graft = tokens, graft

    def ngrams(self, lookup, token_ids, max_depth, *, seldom=False) -> NgramDraft | None:
        coming = self._tokens[len(token_ids) : len(token_ids) + max_depth]
        said = [token % VOCAB for token in self._graft(token_ids, coming)][:max_depth]
        return NgramDraft(said, [-0.05] * len(said)) if said else None


GRAFTS = {
    "right": lambda known, coming: coming,
    "wrong": lambda known, coming: [token + 1 for token in coming],
    "right-then-wrong": lambda known, coming: [*coming[:2], *(token + 1 for token in coming[2:])],
    "ends-early": lambda known, coming: [*coming[:1], EOS, *coming[2:]],
    "repeating": lambda known, coming: known[-1:] * 9,
    "now-and-then": lambda known, coming: coming if len(known) % 3 else [],
}


def shaken(drafter: ScoringDrafter, seed: int = 0, scale: float = 0.3) -> ScoringDrafter:
    """Random weights everywhere: zero-started projections would hide whole branches from a test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_((noise * scale).to(parameter.dtype))
    return drafter.eval()


class Steady(AutoGrower):
    """Steps take as long as is said, so that what is drafted repeats itself."""

    def observe(self, plan, accepted, seconds, planning=0.0) -> None:
        super().observe(plan, accepted, self.budget.costs.seconds(plan.forward))


AUTO_TREES = {
    "auto-cheap": Steady(Costs.measured({1: 1.0, 2: 1.05, 8: 1.2, 24: 1.6}, draft=0.15)),
    "auto-dear": Steady(Costs.measured({1: 1.0, 2: 1.25, 8: 2.4}, draft=0.5)),  # the heads rest more often than not
}


def anew(grower):
    """The same grower, before its first step."""
    return replace(grower) if isinstance(grower, AutoGrower) else grower


AMPHISTA_SWITCHES = {
    "full": {},
    "one-stage": {"stages": 1},
    "no-stages": {"stages": 0},
    "no-auto-embedding": {"auto_embedding": False},
    "causal-slots": {"slot_mask": "causal"},
    "own-slots": {"slot_mask": "own"},
    "no-position-encoding": {"position_encoding": False},
    "own-head": {"lm_head": "own"},
    "draft-vocabulary": {"draft_vocab": 100},
    "own-draft-vocabulary": {"draft_vocab": 100, "lm_head": "own"},
    "two-encoders": {"num_encoder_layers": 2, "encoder_intermediate_size": 16, "num_heads": 3},
    "split-first": {"stage_split": 0},
    "paths": {"path_rank": 8, "path_shortlist": 6},
    "own-paths": {"path_rank": 4, "path_shortlist": 20, "lm_head": "own", "draft_vocab": 100},
    "taps": {"taps": (1, 2), "num_heads": 3},
}
MEDUSA_SWITCHES = {
    "shared": {},
    "own": {"lm_head": "own"},
    "own-two-layers": {"lm_head": "own", "num_layers": 2, "num_heads": 3},
    "own-draft-vocabulary": {"lm_head": "own", "draft_vocab": 100},
    "two-layers": {"num_layers": 2, "num_heads": 3},
    "paths": {"path_rank": 8, "path_shortlist": 6, "draft_vocab": 100},
}


HYDRA_SWITCHES = {
    "staged": {},
    "hidden": {"base": "hidden", "num_layers": 2, "num_heads": 3},
    "prefix": {"base": "prefix", "lm_head": "own", "head_bias": True, "draft_vocab": 100, "num_heads": 3},
}
EAGLE_SWITCHES = {
    "full": {},
    "taps": {"taps": (1, 2), "num_heads": 3},
    "draft-vocabulary": {"draft_vocab": 100, "num_heads": 3, "intermediate_size": 16},
}
TANDEM_SWITCHES = {"taps": {"taps": (1,), "num_heads": 3}, "alone": {"reads_target": False, "draft_vocab": 100}}
FALCON_SWITCHES = {
    "pairs": {"num_heads": 5, "mixer": "lstm"},
    "triples": {"num_heads": 4, "block_size": 3, "taps": (1, 2), "draft_vocab": 100},
    "last": {"num_heads": 3, "slots": "last", "lm_head": "own", "intermediate_size": 16},
}
EARLY_EXIT_SWITCHES = {"full": {"exit_layer": 2, "rank": 8, "num_heads": 3}, "bare": {"rank": 0, "draft_vocab": 100}}


def real_drafters(target: Target, seed: int = 1) -> dict[str, Drafter | Proposer]:
    """Every real drafter with every switch that the target can have, on random weights, alone; some beside lookup."""
    torch.manual_seed(seed)  # whatever was drawn before
    heads: dict[str, Drafter] = {}
    for name, switches in AMPHISTA_SWITCHES.items():
        heads[f"amphista-{name}"] = shaken(Amphista(AmphistaConfig(**switches), target.spec, target.shared))
    for name, switches in MEDUSA_SWITCHES.items():
        heads[f"medusa-{name}"] = shaken(Medusa(MedusaConfig(**switches), target.spec, target.shared))
    for name, switches in HYDRA_SWITCHES.items():
        heads[f"hydra-{name}"] = shaken(Hydra(HydraConfig(**switches), target.spec, target.shared))
    for name, switches in EAGLE_SWITCHES.items():
        heads[f"eagle-{name}"] = shaken(Eagle(EagleConfig(**switches), target.spec, target.shared))
    for name, switches in TANDEM_SWITCHES.items():
        heads[f"tandem-{name}"] = shaken(Tandem(TandemConfig(**switches), target.spec, target.shared))
    for name, switches in FALCON_SWITCHES.items():
        heads[f"falcon-{name}"] = shaken(Falcon(FalconConfig(**switches), target.spec, target.shared))
    for name, switches in EARLY_EXIT_SWITCHES.items() if target.shared.early_layers is not None else ():
        heads[f"early-exit-{name}"] = shaken(EarlyExit(EarlyExitConfig(**switches), target.spec, target.shared))
    heads = {name: one.to(target.dtype) for name, one in heads.items()}
    beside = {f"{name}+lookup": Proposer(heads.get(name), use_lookup=True) for name in BESIDE_LOOKUP}
    return {"none": Proposer(), **heads, **beside}


BESIDE_LOOKUP = ["none", "amphista-full", "medusa-own", "amphista-paths", "eagle-full"]
SEQUENTIAL = [
    *(f"hydra-{name}" for name in HYDRA_SWITCHES),
    *(f"eagle-{name}" for name in EAGLE_SWITCHES),
    *(f"tandem-{name}" for name in TANDEM_SWITCHES),
    *(f"falcon-{name}" for name in FALCON_SWITCHES),
    *(f"early-exit-{name}" for name in EARLY_EXIT_SWITCHES),
]


REAL_DRAFTERS = [
    "none",
    *(f"amphista-{name}" for name in AMPHISTA_SWITCHES),
    *(f"medusa-{name}" for name in MEDUSA_SWITCHES),
    *SEQUENTIAL,
    *(f"{name}+lookup" for name in BESIDE_LOOKUP),
]

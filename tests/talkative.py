"""A tiny random target that answers in printable characters and ends by itself: its answers survive being text."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PhiConfig

from amphista.target.target import Target
from amphista.target.text import Text
from tests.tiny import EOS, SIZES, byte_tokenizer

NUM_PRINTABLE = 94  # the byte tokenizer's first ids: '!' to '~'


def talkative_model(dtype=torch.float32, end_bias=2.0):
    """Phi, because its LM head has a bias: only printable characters and the end token can be chosen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiConfig(**SIZES, partial_rotary_factor=0.5), attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.35 if "embed" not in name else 1.0)
        model.lm_head.bias.fill_(-1e4)
        model.lm_head.bias[:NUM_PRINTABLE] = 0.0
        model.lm_head.bias[EOS] = end_bias
    model.generation_config.eos_token_id = EOS
    return model.to(dtype).eval()


def talkative_target(dtype=torch.float64, **changes) -> Target:
    return Target(talkative_model(dtype, **changes), Text(byte_tokenizer()), name="talkative")


def asked(count, turns=1):
    """Prompt lines: `count` conversations of 1 to `turns` user turns, with answers of somebody else among them."""
    lines = []
    for n in range(count):
        messages = [{"role": "system", "content": "Be brief."}] if n % 3 == 0 else []
        for turn in range(1 + n % turns):
            messages.append({"role": "user", "content": f"Question {n}, part {turn}" + "?" * (n % 7)})
            messages.append({"role": "assistant", "content": "Somebody else's words."})
        lines.append({"id": f"q{n}", "messages": messages[: -1 if n % 2 else None]})
    return lines

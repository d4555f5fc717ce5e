"""What a model's generation_config asks of sampling: told when it is loaded, taken only when `params="model"` says so.

Its end tokens are always used (`Target.eos_ids`). Everything else that would change an answer either has a setting of
ours or is named as not supported.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from amphista.target.target import Target

OURS = {  # its name -> ours
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "suppress_tokens": "suppress_tokens",
}
SAMPLED_ONLY = ("temperature", "top_k", "top_p", "min_p")
SAMPLED = {"temperature": 1.0, "top_k": 50}  # what `generate` samples with where the configuration says no more
NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
}
OF_AN_ANSWER = (  # all that may change one; the rest is about tokens' ids, caches, outputs and other programs' drafts
    *NEUTRAL,
    "max_new_tokens",
    "stop_strings",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "force_words_ids",
    "constraints",
    "exponential_decay_length_penalty",
    "penalty_alpha",
    "dola_layers",
    "top_h",
    "watermarking_config",
)
logger = logging.getLogger("amphista")


def effective(config: Any) -> dict[str, Any]:
    """What of a generation_config would change an answer of stock `generate`, under its own names."""
    values = {name: getattr(config, name, None) for name in OF_AN_ANSWER}
    return {name: value for name, value in values.items() if value not in (None, [], {}) and value != NEUTRAL.get(name)}


def tell_unused(target: Target) -> None:
    """Log what is not applied unless it is asked for, in one line."""
    if found := effective(target.generation_config):
        told = ", ".join(f"{name}={_shown(value)}" for name, value in found.items())
        logger.warning(
            f"the generation_config of {target.name} sets {told}: not applied, unless by params='model' "
            "(--model-defaults)"
        )


def model_settings(target: Target) -> dict[str, Any]:
    """The generation_config as settings of SamplingParams; what has none is logged."""
    settings, left_out = settings_of(target.generation_config)
    if left_out:
        logger.warning(f"not supported of the generation_config of {target.name}: {', '.join(left_out)}")
    return settings


def settings_of(config: Any) -> tuple[dict[str, Any], list[str]]:
    """A generation_config as settings of SamplingParams, and the names of what has none."""
    asked = effective(config)
    is_sampled = bool(asked.pop("do_sample", False))
    if is_sampled:
        asked = {**SAMPLED, **asked}
    settings = {OURS[name]: value for name, value in asked.items() if name in OURS}
    if not is_sampled:
        settings = {name: value for name, value in settings.items() if name not in SAMPLED_ONLY}
    words = asked.get("bad_words_ids", [])
    if words and all(len(word) == 1 for word in words):
        ends = ids_of(config.eos_token_id)  # which `generate` leaves out, too: an answer may end
        banned = [token for word in asked.pop("bad_words_ids") for token in word if token not in ends]
        settings["suppress_tokens"] = [*settings.get("suppress_tokens", ()), *banned]
    return settings, [name for name in asked if name not in OURS]


def ids_of(value: Any) -> list[int]:
    """A generation_config's token ids, which may be one, several or None."""
    return [] if value is None else torch.as_tensor(value).reshape(-1).tolist()


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."

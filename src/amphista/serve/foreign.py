"""Fields of other servers that change tokens, and are not this one's: who sends one expects another answer."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

FORMS = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "grammar",
    "json_schema",
)
LLAMA_FILTERS = ("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range", "top_n_sigma")

# What each is where it changes nothing, and what to ask for in its place.
FOREIGN: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(FORMS, (None, "response_format")),
    **dict.fromkeys(LLAMA_FILTERS, (0, "")),
    **dict.fromkeys(("length_penalty", "typical_p", "typical"), (1, "")),
    **dict.fromkeys(("bad_words", "allowed_token_ids"), (None, "logit_bias")),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output"), (False, "")),
    **dict.fromkeys(("truncate_prompt_tokens", "logits_processors"), (None, "")),
    "add_generation_prompt": (True, "continue_final_message"),
    "n_predict": (-1, "max_tokens"),
    "prompt_logprobs": (None, "echo with logprobs"),
    "repeat_penalty": (1, "repetition_penalty"),
    "skip_special_tokens": (True, ""),
}


def refuse_foreign(body: Any) -> None:
    """raises ValidationError that names the field."""
    for name in FOREIGN.keys() & (body.keys() if isinstance(body, dict) else set()):
        neutral, instead = FOREIGN[name]
        if body[name] not in (None, neutral, [], {}):
            error = PydanticCustomError("foreign", f"not supported: {f'use {instead}' if instead else 'leave it out'}")
            raise ValidationError.from_exception_data("", [{"type": error, "loc": (name,), "input": None}])

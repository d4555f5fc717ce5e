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

# What they are where they change nothing, and what to ask for in their place.
FOREIGN: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(FORMS, ((), "response_format")),
    **dict.fromkeys(LLAMA_FILTERS, ((0, -1), "")),
    **dict.fromkeys(("length_penalty", "typical_p", "typical"), ((1,), "")),
    **dict.fromkeys(("bad_words", "allowed_token_ids"), ((), "logit_bias")),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output"), ((False,), "")),
    **dict.fromkeys(("truncate_prompt_tokens", "logits_processors"), ((), "")),
    "add_generation_prompt": ((True,), "continue_final_message"),
    "n_predict": ((-1,), "max_tokens"),
    "prompt_logprobs": ((), "echo with logprobs"),
    "repeat_penalty": ((1,), "repetition_penalty"),
    "skip_special_tokens": ((True,), ""),
}


def refuse_foreign(body: Any) -> None:
    """raises ValidationError that names the field."""
    given = dict(body) if isinstance(body, dict) else {}
    if given.get("continue_final_message"):  # who asks for that says so, too
        given.pop("add_generation_prompt", None)
    for name in FOREIGN.keys() & given.keys():
        neutral, instead = FOREIGN[name]
        if given[name] not in (None, [], {}, *neutral):
            error = PydanticCustomError("foreign", f"not supported: {f'use {instead}' if instead else 'leave it out'}")
            raise ValidationError.from_exception_data("", [{"type": error, "loc": (name,), "input": None}])

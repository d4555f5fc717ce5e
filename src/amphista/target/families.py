"""Which configurations are refused before any weight is read, and what each layer of a model keeps of a token.

What a layer keeps is asked of `transformers`' own cache for the configuration, not told by the family's name. All else
that cannot be verified is found by the check at load (exactness.py).
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from amphista.errors import TargetError

KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # the last keeps nothing
BY_ROWS = ("bloom", "mpt")  # and falcon, where it is configured so


def kept_by_layers(config: Any) -> list[str]:
    """What each layer of a model keeps, as the names of cache layers; empty where `transformers` cannot tell."""
    try:
        return [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    except (AttributeError, ValueError, KeyError, TypeError):
        return []


def auto_class(config: Any) -> Any:
    """The auto class that makes a model of this configuration: causal LMs, or those that read images beside text, which
    are given text alone. raises TargetError for any other."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise TargetError(f"{config.model_type} is no causal LM of the installed transformers: choose another target")


def decoder_of(model: Any) -> Any:
    """The part of a causal LM that makes hidden states of ids; some name another part, or themselves, as decoder."""
    named = (model.get_decoder(), model.base_model, getattr(model, "model", None), getattr(model, "transformer", None))
    kind = next(base for base in type(model).__mro__ if base.__name__ == "PreTrainedModel")
    return next((part for part in named if isinstance(part, kind) and part is not model), model)


def refuse_unsupported(config: Any) -> None:
    """Raise TargetError, naming the family and the reason, for what cannot be verified as a tree."""
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(f"{family} is an encoder-decoder model: amphista accelerates decoder-only causal LMs")
    reason = _reason(config, auto_class(config)._model_mapping[type(config)])
    if reason is not None:
        raise TargetError(f"{family} models cannot be verified as a tree: {reason}. Choose a target of another family")


def _reason(config: Any, kind: Any) -> str | None:
    if config.model_type in BY_ROWS or (config.model_type == "falcon" and getattr(config, "alibi", False)):
        return "its ALiBi biases follow rows, not positions"
    stateful = getattr(kind, "_is_stateful", False)
    other = set(kept_by_layers(config)) - KEYS_AND_VALUES  # after the class: importing it brings its cache layers
    text = config.get_text_config(decoder=True)
    layer_types = getattr(text, "layer_types", None)
    if getattr(text, "cross_attention_layers", None):
        return "some of its layers read images (cross-attention), and text alone leaves them empty"
    if any("Linear" in name for name in other) or (stateful and layer_types is None):
        return "its layers, or some of them, keep one recurrent state, which cannot hold several branches"
    if other:
        return f"its layers keep more of a token than keys and values ({', '.join(sorted(other))})"
    return None

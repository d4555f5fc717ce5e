"""What a GGUF file says beside its weights and `transformers`' loader does not read: how positions are scaled, all end
tokens; and tensors that nobody reads, without which it would be another model.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np

from amphista.errors import TargetError

END_TOKENS = re.compile(
    r"tokenizer\.ggml\.(eos|eot|eom|eog)_token_ids?"
)  # end of text, of turn, of message; all of them
FREQUENCIES = "rope_freqs.weight"  # what each frequency is divided by: Llama 3's, as llama.cpp writes it
FACTORS = {f"{kind}_factor": f"rope_factors_{kind}.weight" for kind in ("short", "long")}  # the same, Phi-3's
POSITIONS = {"linear", "yarn"}
BY_KIND = "full_attention"  # where a configuration has positions for each kind of layer
LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
CAPS = "attn_logit_softcapping", "final_logit_softcapping"  # Gemma 2's
INNER_SIZES = {  # of experts
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
UNREAD = {  # what no configuration takes, and the values that change nothing
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    **dict.fromkeys(CAPS, (0,)),
}
WHOLE_HEADS = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "gpt_oss"}  # all of them rotated
# llama.cpp's names of ways to cut a text, by the way that transformers takes for all names it does not know. The second
# line's cut each digit off, too: no token of theirs has two.
CUTS_OF_GPT2 = {"default", "gpt-2", "phi-2", "mpt", "olmo", "jais"}
CUTS_OF_GPT2 |= {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
CUTS_OF_QWEN = {"default", "qwen2", "qwen35", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"}
KNOWN = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}


def end_tokens(reader: Any) -> list[int]:
    """Every token that a GGUF file's metadata names as the end of an answer; `transformers` reads the first alone."""
    found: list[int] = []
    for name, entry in reader.fields.items():
        if END_TOKENS.fullmatch(name):
            value = entry.contents()
            found += [int(token) for token in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(found))


def complete(reader: Any, config: Any) -> None:
    """Give a configuration what the loader leaves at defaults; raises TargetError for what is not known here."""
    if config.model_type == "phi3":
        _turn_as_phi3(reader, config)
    _scale_positions(reader, config)
    for name, entry in reader.fields.items():
        setting = INNER_SIZES.get(name.partition(".")[2])
        if setting is not None:
            setattr(config, setting, int(entry.contents()))
    if config.model_type == "gemma2":
        for name in CAPS:
            entry = reader.fields.get(f"gemma2.{name}")
            setattr(config, name, getattr(config, name) if entry is None else entry.contents())
    if config.model_type in LAYERS_OF_27B:  # by size, as llama.cpp does: no file says it
        is_27b = config.num_hidden_layers == LAYERS_OF_27B[config.model_type]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    _refuse_settings(reader, config)


def _refuse_settings(reader: Any, config: Any) -> None:
    """Raise TargetError for a setting that is not read and without which the file would be another model."""
    neutral: dict[str, tuple[Any, ...]] = {name: (*v, getattr(config, name, None)) for name, v in UNREAD.items()}
    if heads := getattr(config, "num_attention_heads", 0):
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        neutral["attention.scale"] += (getattr(config, "query_pre_attn_scalar", size) ** -0.5, size**-0.5)
        if config.model_type in WHOLE_HEADS:
            neutral["rope.dimension_count"] = (0, size)
    for name, entry in reader.fields.items():
        values = neutral.get(name.partition(".")[2])
        if values is None:
            continue
        value = entry.contents()
        if not any(one is not None and np.allclose(value, one, rtol=1e-3) for one in values):
            raise TargetError(
                f"the file says {name} = {value}, which is not read here, and would be another model without: use the "
                "model's transformers folder"
            )


def _turn_as_phi3(reader: Any, config: Any) -> None:
    """How far back is seen, which part of a head is rotated, and longrope's factors (arXiv 2402.13753), which lie among
    the tensors."""
    window = reader.fields.get("phi3.attention.sliding_window")
    if window is not None:
        config.sliding_window = int(window.contents()) or None  # 0: Phi-4, which sees all
    rope = dict(config.rope_parameters)
    said = {name.partition(".rope.")[2]: entry.contents() for name, entry in reader.fields.items() if ".rope." in name}
    head_size = config.hidden_size // config.num_attention_heads
    turned = said.get("dimension_count", head_size)
    rope["partial_rotary_factor"] = turned / head_size
    tensors = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name in FACTORS.values()}
    original = said.get("scaling.original_context_length")
    if tensors:
        if len(tensors) < len(FACTORS) or original is None or any(2 * part.size != turned for part in tensors.values()):
            raise TargetError(
                f"the file scales {turned} of a head's {head_size} numbers by {', '.join(sorted(tensors))}: expected "
                f"{' and '.join(FACTORS.values())} with {turned // 2} numbers each, and "
                "rope.scaling.original_context_length"
            )
        rope |= {name: np.asarray(tensors[place], np.float64).ravel().tolist() for name, place in FACTORS.items()}
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        rope["factor"] = config.max_position_embeddings / original
        config.original_max_position_embeddings = original
        if "scaling.attn_factor" in said:
            rope["attention_factor"] = float(said["scaling.attn_factor"])
    config.rope_parameters = rope


def _scale_positions(reader: Any, config: Any) -> None:
    """Give a configuration the scaling of positions that the file asks for; raises TargetError for one unknown here."""
    rope, said = getattr(config, "rope_parameters", None) or {}, _scaling(reader)
    if BY_KIND in rope:  # Gemma 3: layers that see all are scaled
        part = copy.copy(config)
        part.rope_parameters = rope[BY_KIND]
        _scale_positions(reader, part)
        config.rope_parameters = {**rope, BY_KIND: part.rope_parameters}
        return
    if rope.get("rope_type", "default") != "default":
        return  # the loader has read it
    divisors = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    if not said and divisors is None:
        return
    kind = said.pop("type", "linear" if said else None)
    unknown = said.keys() - KNOWN.keys()
    if unknown or kind not in {None, *POSITIONS} or (kind and divisors is not None) or "rope_theta" not in rope:
        what = ", ".join(
            [f"rope.scaling.type {kind}", *sorted(unknown), *([FREQUENCIES] if divisors is not None else [])]
        )
        raise TargetError(
            f"the file scales its positions in a way that is not known here ({what}), and would be another model "
            "without: use the model's transformers folder"
        )
    scaling = {"rope_type": kind, **{KNOWN[name]: value for name, value in said.items()}}
    config.rope_parameters = {**rope, **(scaling if divisors is None else _divided(divisors.data, rope, config))}


def _scaling(reader: Any) -> dict[str, Any]:
    """What the metadata says of it, without what means nothing."""
    found = {}
    for name, entry in reader.fields.items():
        _, is_scaling, suffix = name.partition(".rope.scaling.")
        if is_scaling:
            found[suffix] = entry.contents()
        elif name.endswith(".rope.scale_linear"):
            found["factor"] = entry.contents()
    found.pop("finetuned", None)
    changes_nothing = found.get("factor", 1) in (0, 1) and found.keys() <= {"type", *KNOWN}
    is_none = found.get("type") == "none" or (changes_nothing and found.get("type", "linear") in POSITIONS)
    return {} if is_none else found


def _divided(divisors: Any, rope: dict[str, Any], config: Any) -> dict[str, Any]:
    """Frequencies each divided by a number of its own: longrope's form, with no other numbers for long texts."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = np.asarray(divisors, dtype=np.float64).ravel().tolist()
    expected = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
    if len(numbers) != expected:
        raise TargetError(f"{FREQUENCIES} of the file holds {len(numbers)} numbers: expected {expected}")
    return {
        "rope_type": "longrope",
        "short_factor": numbers,
        "long_factor": numbers,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def refuse_unread(reader: Any, model: Any) -> None:
    """Raise TargetError where the file holds what the model has no place for and would be another one without: biases,
    and divisors of positions for long texts."""
    biases = {tensor.name: tensor.n_elements for tensor in reader.tensors if tensor.name.endswith(".bias")}
    places = sum(numbers.numel() for name, numbers in model.state_dict().items() if name.endswith("bias"))
    is_read = model.config.model_type == "phi3"
    unread = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_factors") and not is_read]
    if sum(biases.values()) > places:
        unread += list(biases)
    if unread:
        raise TargetError(
            f"the file holds tensors that {type(model).__name__} has no place for, as {unread[0]}, and would be "
            "another model without: use the model's transformers folder"
        )


def other_tokens(reader: Any, tokenizer: Any) -> list[str]:
    """What a file says of its text and the tokenizer made of it does not do, a sentence each."""
    names = ("model", "pre", "add_space_prefix")
    said = {name: entry.contents() for name in names if (entry := reader.fields.get(f"tokenizer.ggml.{name}"))}
    backend, found = tokenizer.backend_tokenizer, []
    is_qwens, is_gpt2s = (
        type(tokenizer).__name__.startswith("Qwen"),
        type(backend.pre_tokenizer).__name__ == "ByteLevel",
    )
    known, whose = (CUTS_OF_QWEN, "Qwen's") if is_qwens else (CUTS_OF_GPT2, "GPT-2's")
    if said.get("model") == "gpt2" and (is_qwens or is_gpt2s) and said.get("pre", "default") not in known:
        found.append(f"tokenizer.ggml.pre = {said['pre']} is not known, text is cut as {whose}")
    begins_with_space = backend.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581")
    if said.get("add_space_prefix") is False and begins_with_space:
        found.append("tokenizer.ggml.add_space_prefix = False is not followed, text begins with a space")
    return found

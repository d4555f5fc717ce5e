"""amphista: bi-directional multi-head speculative decoding. The target's own tokens, sooner.

Public names are imported on first use, so that `import amphista` (and the command line's help) stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AmphistaError": "errors",
    "Answer": "engine.stream",
    "CapacityError": "errors",
    "ConfigError": "errors",
    "Conversation": "llm",
    "DataError": "errors",
    "DrafterError": "errors",
    "FinishReason": "engine.params",
    "LLM": "llm",
    "RequestError": "errors",
    "SamplingParams": "engine.params",
    "StepResult": "engine.step",
    "Stream": "engine.stream",
    "TargetError": "errors",
    "TokenLogprob": "accept.logprobs",
    "load": "llm",
}
__all__ = [
    "LLM",
    "AmphistaError",
    "Answer",
    "CapacityError",
    "ConfigError",
    "Conversation",
    "DataError",
    "DrafterError",
    "FinishReason",
    "RequestError",
    "SamplingParams",
    "StepResult",
    "Stream",
    "TargetError",
    "TokenLogprob",
    "__version__",
    "load",
]

if TYPE_CHECKING:
    from amphista.accept.logprobs import TokenLogprob
    from amphista.engine.params import FinishReason, SamplingParams
    from amphista.engine.step import StepResult
    from amphista.engine.stream import Answer, Stream
    from amphista.errors import (
        AmphistaError,
        CapacityError,
        ConfigError,
        DataError,
        DrafterError,
        RequestError,
        TargetError,
    )
    from amphista.llm import LLM, Conversation, load


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'amphista' has no attribute {name!r}")
    return getattr(import_module(f"amphista.{_HOMES[name]}"), name)

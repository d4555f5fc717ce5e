"""What a forward of a stock model leaves beside its logits: hidden states, and taps, the states between its layers.

Hidden states are what the LM head reads (after the final norm), taken by a hook on the decoder's output (asking for all
hidden states would keep every layer). A tap is the residual stream after so many layers, as it is: in some rows it is
huge (25,000 in the first row of SmolLM2), so who reads taps norms them. Layers are hooked when a tap of them is first
asked for.

Shapes: B sequences, N rows, D hidden size, L layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from amphista.errors import TargetError

Taps = tuple[int, ...]  # after how many layers (1..L), ascending


class HookedStates:
    """The hooks on one model, and what each thread's last forward left there."""

    def __init__(self, decoder: nn.Module, num_layers: int) -> None:
        self._decoder, self._num_layers = decoder, num_layers
        self._local = threading.local()  # two threads may decode at once
        self._lock = threading.Lock()
        self._hooks = {0: decoder.register_forward_hook(self._keep(0))}

    def hook(self, taps: Taps) -> None:
        """Keep these taps, too, from the next forward on. raises TargetError where layers are not found."""
        missing = [tap for tap in taps if tap not in self._hooks]
        if not missing:
            return
        layers = next((m for m in self._decoder.modules() if _is_list_of(m, self._num_layers)), None)
        if not isinstance(layers, nn.ModuleList):
            raise TargetError(f"{type(self._decoder).__name__} has no list of layers: no drafter can read its taps")
        with self._lock:
            for tap in set(missing) - set(self._hooks):
                self._hooks[tap] = layers[tap - 1].register_forward_hook(self._keep(tap))

    def take(self, taps: Taps) -> Tensor:
        """Hidden states of this thread's last forward with the taps behind each: [B, N, (1 + taps) * D]."""
        states: dict[int, Tensor] = vars(self._local).pop("states")
        kept = [states[which] for which in (0, *taps)]
        if any(part.shape != kept[0].shape for part in kept):
            raise TargetError(f"{type(self._decoder).__name__} has states between its layers that are no hidden states")
        return torch.cat(kept, dim=-1) if taps else kept[0]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks.values():
            hook.remove()

    def _keep(self, which: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            is_tuple = isinstance(output, tuple)
            states = output[0] if is_tuple else output if isinstance(output, Tensor) else output.last_hidden_state
            vars(self._local).setdefault("states", {})[which] = states

        return keep


def _is_list_of(module: nn.Module, length: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == length

"""Sharded: one model over several processes, by the tensor-parallel plan that `transformers` has for its family.

    torchrun --nproc-per-node 2 -m amphista serve --target FOLDER --tensor-parallel

Each process holds a share of every layer, and keys and values of its own heads. The first decides everything; the
others repeat its forwards. What has become of caches meanwhile is told with the next forward: nobody reads them before.
"""

from __future__ import annotations

import atexit
import copy
import itertools
import signal
from collections import defaultdict, deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn, Unpack

import torch.distributed as dist
from torch import Tensor, nn

from amphista.cache.static import KVCache
from amphista.errors import TargetError
from amphista.target.exactness import check_exactness
from amphista.target.families import auto_class, refuse_unsupported
from amphista.target.hidden_states import Taps
from amphista.target.loading import DTYPES, Hub, ModelSource, keep_cap, load_text, locate
from amphista.target.spans import Span
from amphista.target.spec import LogitTransform, SharedWeights
from amphista.target.target import Target
from amphista.target.text import Text
from amphista.tree.token_tree import TokenTree

FOR_EVER = timedelta(days=3650)  # nobody may ask for a long time
Told = tuple[Any, ...]  # (number of a cache, method of `KVCache`, arguments)


class LedCache(KVCache):
    """A cache whose changes are noted for the other processes."""

    def __init__(self, num_layers: int, number: int, told: deque[Told]) -> None:
        super().__init__(num_layers)
        self.number, self._told = number, told

    def commit(self, path: Sequence[int]) -> None:
        super().commit(path)
        self._told.append((self.number, "commit", list(path)))

    def trim(self, num_rows: int) -> None:
        super().trim(num_rows)
        self._told.append((self.number, "trim", num_rows))

    def take_copy(self, other: KVCache, num_rows: int) -> None:
        assert isinstance(other, LedCache), "a cache from before there was anybody to lead"
        super().take_copy(other, num_rows)
        self._told.append((self.number, "take_copy", other.number, num_rows))

    def __del__(self) -> None:
        self._told.append((self.number, "forget"))


class ShardedTarget(Target):
    """A target of which this process has a share. Until `lead` or `follow` all processes do the same."""

    def __init__(self, model: Any, text: Text | None = None, *, name: str = "target") -> None:
        super().__init__(model, text, name=name)
        self.why_stock = "it is spread over several processes"
        parts = (_whole(model.get_input_embeddings()), _whole(model.get_output_embeddings()))
        self.shared = SharedWeights(*parts, LogitTransform.from_config(model.config))
        self._group = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self._told: deque[Told] | None = None
        self._numbers = itertools.count()

    @property
    def row_bytes(self) -> int:
        """In this process."""
        return super().row_bytes // dist.get_world_size()

    def new_cache(self) -> KVCache:
        """An empty cache; of who leads, one that the others will have, too."""
        if self._told is None:
            return super().new_cache()
        return LedCache(self._num_caches, next(self._numbers), self._told)

    def lead(self) -> None:
        """Decide from now on; at the end of this process the others end."""
        self._told = deque()
        atexit.register(self._send, None)

    def follow(self) -> None:
        """Repeat what the first process does; returns when that has ended, and by no signal before."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        caches = defaultdict[int, KVCache](self.new_cache)
        while (message := self._received()) is not None:
            told, spans = message
            for number, method, *arguments in told:
                if method == "forget":
                    caches.pop(number, None)
                elif method == "take_copy":
                    caches[number].take_copy(caches[arguments[0]], arguments[1])
                else:
                    getattr(caches[number], method)(*arguments)
            self.forward([Span(TokenTree(*tree), caches[number], only_last) for number, tree, only_last in spans])

    def _run(
        self, spans: Sequence[Span], wanted: list[int] | None, taps: Taps
    ) -> tuple[Tensor, Tensor, list[int] | None]:
        if any(span.probes is not None for span in spans):
            raise TargetError("a tensor-parallel target reads no probes: choose another drafter")
        if self._told is not None:
            told = [self._told.popleft() for _ in range(len(self._told))]
            self._send((told, [(_number(s.cache), (s.tree.tokens, s.tree.parents), s.only_last) for s in spans]))
        return super()._run(spans, wanted, taps)

    def _send(self, message: Any) -> None:
        dist.broadcast_object_list([message], src=0, group=self._group)

    def _received(self) -> Any:
        found = [None]
        dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]


def load_sharded(name: str, *, dtype: str | None = None, **hub: Unpack[Hub]) -> ShardedTarget:
    """This process's share of a target, in each that `torchrun` has started; trees are checked in all at once.

    Only the first returns: the others follow it, and end with it.
    """
    if not dist.is_torchelastic_launched():
        raise TargetError("a tensor-parallel target needs several processes: torchrun --nproc-per-node N -m amphista")
    from transformers.distributed import DistributedConfig

    source = ModelSource(name, locate(name), hub)
    config = source.config()
    refuse_unsupported(config)
    keep_cap(config)
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"a tensor-parallel target cannot be loaded in {dtype}: expected one of {', '.join(DTYPES)}")
    plan = DistributedConfig(tp_plan="auto")
    settings = {"config": config, "dtype": "auto" if dtype is None else DTYPES[dtype], "distributed_config": plan}
    target = ShardedTarget(source.model(auto_class(config), **settings), load_text(source), name=name)
    check_exactness(target)
    if dist.get_rank():
        _follow_to_the_end(target)
    target.lead()
    return target


def _follow_to_the_end(target: ShardedTarget) -> NoReturn:
    target.follow()
    raise SystemExit(0)


def _whole(module: nn.Module) -> Any:
    """A module with all rows of its weights, of which each process has some."""
    made = copy.copy(module)
    made._parameters = {
        name: nn.Parameter(value.full_tensor() if hasattr(value, "full_tensor") else value.data, requires_grad=False)
        for name, value in module._parameters.items()
        if value is not None
    }
    made._forward_hooks, made._forward_pre_hooks = type(module._forward_hooks)(), type(module._forward_pre_hooks)()
    return made


def _number(cache: KVCache) -> int:
    assert isinstance(cache, LedCache), "a cache from before there was anybody to lead"
    return cache.number

"""The frozen target: one forward over spans, on the unmodified `transformers` model or, for the families of lean.py, on
its weights without its overhead: in torch, in C (native_forward.py), or as captured graphs (captured_forward.py).

Hidden states are what the LM head reads (after the final norm); behind each, in its row, stand the taps that are asked
for: states after so many layers (hidden_states.py).

Shapes: B sequences, T prompt tokens, N tree nodes, D hidden size, W = (1 + taps) D, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from amphista.cache.persistent import BufferedCache
from amphista.cache.static import KVCache, sent
from amphista.errors import CapacityError, CaptureError, TargetError
from amphista.target.attention import refuse_attention
from amphista.target.blocks import GGUF
from amphista.target.captured_forward import CapturedForward
from amphista.target.experts import all_taken
from amphista.target.families import kept_by_layers
from amphista.target.hidden_states import Taps
from amphista.target.lean import LeanModel
from amphista.target.lean_layers import routers_of
from amphista.target.native_forward import NativeForward, native_form, product_of, tolerance_of, why_not_native
from amphista.target.output import TargetOutput, choices_of
from amphista.target.pages import give_back, trim_allocator
from amphista.target.probe_rows import Groups
from amphista.target.products import NativeLinear
from amphista.target.qualify import why_not_fast
from amphista.target.spans import Span
from amphista.target.spec import Fingerprint, LogitTransform, Probes, SharedWeights, TargetSpec
from amphista.target.stock import StockForward
from amphista.target.text import Text
from amphista.tree.token_tree import TokenTree

PREFILL_CHUNK = 512
PROBE_ROWS = 12
PROBE_TREE = TokenTree([7, 8, 9], [-1, 0, 0])  # padded in its bucket


class Target:
    """A frozen causal LM that reads chains and trees of tokens.

    model: a `transformers` causal LM. text: its tokenizer side, None for tests on bare token ids. static: whether the
    fast path verifies in fixed shapes (captured_forward.py); by default where that is worth it, on CUDA.
    """

    def __init__(
        self, model: Any, text: Text | None = None, *, name: str = "target", static: bool | None = None
    ) -> None:
        self._model: Any = model.eval().requires_grad_(False)
        refuse_attention(model.config)
        self.config, self.text, self.name = model.config, text, name
        self._generation_config = getattr(model, "generation_config", None)
        self._lean: LeanModel | None = None
        self._wants_static = static
        self._captured: CapturedForward | None = None
        self._native: NativeForward | None = None
        self.why_not_native: str | None = "it was not asked for"
        self._why_not_captured: str | None = None
        self.why_stock: str | None = why_not_fast(model)
        self.load_stock: Callable[[], Target] | None = None
        self._stock: Target | None = None
        embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        if embedding is None or lm_head is None:
            raise TargetError(f"{model.config.model_type} has no embedding or no LM head that drafters could share")
        self.shared = SharedWeights(embedding, lm_head, LogitTransform.from_config(model.config))
        self.device: torch.device = lm_head.weight.device
        self.dtype: torch.dtype = lm_head.weight.dtype
        self.spec = TargetSpec.from_config(
            model.config, embedding_size=embedding.weight.shape[1], vocab_size=lm_head.weight.shape[0]
        )
        self._num_caches = len(kept_by_layers(model.config)) or self.spec.num_layers
        self._stock_forward = StockForward(model, self.spec.num_layers)
        self.num_weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        decoder = self._stock_forward.decoder
        self.num_layer_weights = sum(p.numel() for p in decoder.parameters()) - embedding.weight.numel()

    @property
    def model(self) -> Any:
        """The stock model; raises TargetError once the fast path has taken its weights (`stock()` loads it again)."""
        if self._model is None:
            raise TargetError(f"{self.name} runs on the fast path and holds no stock model: load it with fast=False")
        return self._model

    @property
    def path(self) -> str:
        """Which forward verifies: `native`, `captured` (captured_forward.py; off CUDA `fast-static`), `fast` (lean.py),
        `-int8` behind it, or `stock`. While another thread has the captured graphs it is `fast` in this one."""
        if self._lean is None:
            return "stock"
        if self._native is not None:
            return {"int8": "native-int8", GGUF: "native-gguf"}.get(self.type_name, "native")
        fast = "fast-int8" if self.has_int8 else "fast"
        captured = self._captured
        if captured is None or not captured.lease.is_open():
            return fast
        return "captured" if self.device.type == "cuda" else f"{fast}-static"

    @property
    def lean(self) -> LeanModel | None:
        """The fast forward; None on the stock path."""
        return self._lean

    @property
    def why_not_captured(self) -> str | None:
        """Why the calling thread decodes without recorded forwards; None where it has them, or nobody wanted them."""
        captured = self._captured
        if captured is not None and not captured.lease.is_open():
            return "another thread decodes with the captured graphs now, this one without until that one rests"
        return self._why_not_captured

    def give_back_graphs(self) -> None:
        """Let any thread decode with the recorded forwards: this one, which loads or measures, is done with them."""
        if self._captured is not None:
            self._captured.lease.give_back()

    @property
    def is_static(self) -> bool:
        """Whether trees are verified in fixed shapes; drafters then draft in them too."""
        return self._captured is not None

    @property
    def is_native(self) -> bool:
        """Whether the C step verifies; drafters then draft there too."""
        return self._native is not None

    @property
    def has_int8(self) -> bool:
        """Whether products are of 8 bits; what flows between them is of `dtype`."""
        return self._lean is not None and isinstance(head := self._lean.head, NativeLinear) and head.has_8_bits

    @property
    def has_blocks(self) -> bool:
        """Whether its weights are a GGUF file's blocks: those of the float32 target, unless `has_int8`."""
        return self.shared.is_blocked

    @property
    def type_name(self) -> str:
        """`float32`, `bfloat16`, `float16`; `int8` where products are; else `gguf` for a file's blocks."""
        return "int8" if self.has_int8 else GGUF if self.has_blocks else str(self.dtype).removeprefix("torch.")

    def speed_up(self, *, release: bool = False, int8: bool = False, native: bool = False) -> bool:
        """Take the fast path where the model qualifies and a forward of both agrees; `why_stock` tells why not.

        release: give up the stock model, so that its weights are not there twice. int8: round rows to 8 bits, and all
        weights but blocks: another target (products.py), in C alone. native: let the C step decode where it can be
        built; `why_not_native` tells why not.
        """
        if self._lean is not None or self.why_stock is not None:
            return self._lean is not None
        ids = [(7 + row * (self.spec.vocab_size // PROBE_ROWS + 1)) % self.spec.vocab_size for row in range(PROBE_ROWS)]
        with all_taken(routers_of(self._model.get_decoder())):
            expected = self.prefill(ids, self.new_cache())
        if native:
            self.why_not_native = why_not_native(self.name, self.device, self.dtype, is_static=bool(self._wants_static))
            native = self.why_not_native is None
        if int8 and not native:
            raise TargetError(f"weights of 8 bits need the C step: {self.why_not_native or 'native is False'}")
        if release:
            self._stock_forward.remove()
        product = product_of(self._model.get_output_embeddings(), int8=int8, native=native)
        self._lean = LeanModel(self._model, product=product, release=release)
        with all_taken(self._lean.experts):
            difference = self.prefill(ids, self.new_cache()).distance(expected)
        if not difference <= self._probe_tolerance:
            raise TargetError(
                f"the fast path of {self.name} differs from its stock model by {difference:.2g} of the scale (allowed "
                f"{self._probe_tolerance:.2g}): load it with fast=False (--no-fast) and report it"
            )
        self.shared.early_layers = self._lean if self._lean.has_plain_scores else None
        if native:
            form = native_form(self.name, self._lean, self.spec.max_positions, self._probe_tolerance)
            self._native, self.why_not_native = form
        if int8 or self.has_blocks:  # of blocks the embedding mostly is the head
            embedding_bytes = 0 if self.has_blocks else self._model.get_input_embeddings().weight.nbytes
            self.num_weight_bytes = self._lean.num_product_bytes + embedding_bytes
        if release:
            if self._lean.head.is_copy:
                give_back(self._model.get_input_embeddings().weight, self.shared.head_weight)  # read by single rows now
            self._model = None
            del self._stock_forward
            trim_allocator()
        if self.device.type == "cuda" if self._wants_static is None else self._wants_static:
            self._captured = CapturedForward(self._lean, self.spec)
            self._check_captured()
        return True

    def _check_captured(self) -> None:
        """A recorded forward must equal the same forward as it is; where it cannot be recorded it is done without."""
        outputs = []
        for cache in (self.new_cache(), KVCache(self._num_caches)):
            rows = min(PROBE_ROWS, self.spec.max_positions - PROBE_TREE.num_nodes)
            self.prefill([token % self.spec.vocab_size for token in range(7, 7 + rows)], cache)
            outputs.append(self.verify(PROBE_TREE, cache).hidden)
        difference = float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
        if not difference <= self._probe_tolerance:
            self._uncapture(f"a recorded forward differs from the same one as it is by {difference:.2g}")
        self.give_back_graphs()

    @property
    def _probe_tolerance(self) -> float:
        return tolerance_of(self.type_name, self._lean.products if self._lean is not None else [])

    def _uncapture(self, reason: str) -> None:
        """Go on without recorded forwards, and say so once."""
        self._captured, self._why_not_captured = None, reason
        warnings.warn(f"{self.name} decodes without captured graphs, slower: {reason}", RuntimeWarning, stacklevel=2)

    def stock(self) -> Target:
        """This target on its stock model, loaded anew where the fast path has taken the weights."""
        if self._lean is None:
            return self
        if self._stock is None:
            if self._model is not None:
                self._stock = Target(self._model, self.text, name=self.name)
            elif self.load_stock is not None:
                self._stock = self.load_stock()
            else:
                raise TargetError(f"{self.name} runs on the fast path and cannot be loaded again: use fast=False")
        return self._stock

    @property
    def generation_config(self) -> Any:
        """The model's own, None where it has none; nothing but its end tokens is used unasked."""
        return self._generation_config

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """All end tokens of the generation configuration; it may name one or several."""
        for source in (self._generation_config, self.config):
            ids = getattr(source, "eos_token_id", None)
            if ids is not None:
                ids = ids if isinstance(ids, list | tuple) else [int(ids)]
                return frozenset(token for token in ids if token in range(self.spec.vocab_size))
        eos = None if self.text is None else self.text.eos_id
        return frozenset() if eos is None else frozenset([eos])

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Which target this is, for drafter checkpoints."""
        return Fingerprint.of(self.spec, self.shared, {} if self.text is None else self.text.vocabulary)

    @property
    def identity(self) -> dict[str, Any]:
        """Which target this is, its type included: what is computed with it depends on no other property of it."""
        head = None if self._lean is None else self._lean.head
        kind = head.arithmetic if isinstance(head, NativeLinear) else self.type_name
        return {**asdict(self.fingerprint), "type": kind}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of keys and values in all layers."""
        spec = self.spec
        return 2 * self._num_caches * spec.num_key_value_heads * spec.head_size * self.dtype.itemsize

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return KVCache(self._num_caches) if self._captured is None else BufferedCache(self._num_caches)

    def copy_rows(self, source: KVCache, to: KVCache, num_rows: int) -> None:
        """Let an empty cache hold the first committed rows of another."""
        if self._captured is not None:
            self._captured.detach(source)
        to.take_copy(source, num_rows)

    def prefill(self, token_ids: Sequence[int], cache: KVCache, taps: Taps = ()) -> TargetOutput:
        """Read and commit a prompt (or its continuation) in chunks: logits of the last token, hidden of all."""
        hidden, output = [], None
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = TokenTree.chain(token_ids[start : start + PREFILL_CHUNK])
            (output,) = self.forward([Span(chunk, cache, only_last=True)], taps)
            cache.commit(range(chunk.num_nodes))
            hidden.append(output.hidden)
        if output is None:
            raise CapacityError("cannot prefill an empty prompt")
        return TargetOutput(output.logits, torch.cat(hidden))

    def verify(self, tree: TokenTree, cache: KVCache, taps: Taps = ()) -> TargetOutput:
        """One forward over the tree's N nodes behind the committed rows; the caller commits the accepted path."""
        return self.forward([Span(tree, cache)], taps)[0]

    def forward(self, spans: Sequence[Span], taps: Taps = ()) -> list[TargetOutput]:
        """One forward over trees of any number of sequences, each on a cache of its own; what each span gets of it.

        The caller commits the paths it accepts. A forward that fails or is interrupted leaves no row behind.
        """
        for span in spans:
            self._check_context(span.num_past + max(span.tree.depths))
        if self._captured is not None and (output := self._replay(spans, taps)) is not None:
            return [output]
        try:
            return self._forward(spans, taps)
        except BaseException:
            for span in spans:
                span.cache.trim(span.num_past)
            raise

    @torch.inference_mode()
    def _replay(self, spans: Sequence[Span], taps: Taps) -> TargetOutput | None:
        """A recorded forward, where there is one: of a single tree. What others read and write lies elsewhere."""
        captured = self._captured  # which another thread may give up meanwhile
        if captured is None:
            return None
        if len(spans) > 1 or spans[0].only_last or spans[0].probes is not None:
            for span in spans:
                captured.detach(span.cache)
            return None
        try:
            return captured.verify(spans[0].tree, spans[0].cache, taps)
        except CaptureError as error:
            self._uncapture(str(error))
            return None

    @torch.inference_mode()
    def prepare(self, max_nodes: int, num_rows: int, taps: Taps = ()) -> None:
        """Record the forwards over up to so many nodes and rows now; nothing where forwards are not recorded."""
        if self._captured is not None:
            try:
                self._captured.prepare(max_nodes, min(num_rows, self.spec.max_positions) + max_nodes, taps)
            except CaptureError as error:
                self._uncapture(str(error))

    def _forward(self, spans: Sequence[Span], taps: Taps) -> list[TargetOutput]:
        sizes, num_logits = [span.tree.num_nodes for span in spans], [span.num_logits for span in spans]
        wanted: list[int] | None = None  # rows whose logits are wanted; None: all
        if num_logits != sizes:
            ends = [end - span.num_probes for end, span in zip(accumulate(sizes), spans, strict=True)]
            wanted = [row for end, number in zip(ends, num_logits, strict=True) for row in range(end - number, end)]
        logits, hidden, choices = self._run(spans, wanted, taps)
        if len(spans) == 1:
            return [TargetOutput(logits, hidden, choices)]
        each = None if choices is None else iter(choices)
        told = [None if each is None else list(islice(each, number)) for number in num_logits]
        rows = logits.split(num_logits) if len(logits) else [logits] * len(spans)
        return [TargetOutput(*parts) for parts in zip(rows, hidden.split(sizes), told, strict=True)]

    def _run(
        self, spans: Sequence[Span], wanted: list[int] | None, taps: Taps
    ) -> tuple[Tensor, Tensor, list[int] | None]:
        """Logits of the wanted rows, hidden states and taps of all, choices where they cost nothing to tell."""
        if self._native is not None:
            output = self._native(spans, wanted, taps)
            hidden = output.hidden if self.dtype is torch.float32 else output.hidden.to(self.dtype)
            return output.logits, hidden, output.choices
        with torch.inference_mode():
            rows = None if wanted is None else sent(wanted, self.device)
            if self._lean is None:
                logits, hidden = self._stock_forward(spans, rows, taps, self.device)
            else:
                hidden = self._lean.hidden_of(spans, taps)
                scored = hidden[:, : self.spec.hidden_size] if taps else hidden
                logits = self._lean.logits(scored if rows is None else scored[rows])
        return logits, hidden, None if self.device.type == "cpu" else choices_of(logits).tolist()  # in one copy

    def _check_context(self, position: int) -> None:
        if position >= self.spec.max_positions:
            raise CapacityError(f"position {position} is beyond the context of {self.spec.context}")

    @torch.inference_mode()
    def hidden_states(self, token_ids: Tensor, taps: Taps = ()) -> Tensor:
        """Hidden states and taps [B, T, W] of right-padded rows [B, T] without a cache, for training.

        Padding needs no mask: causal rows never look to the right.
        """
        self._check_context(token_ids.shape[1] - 1)
        return (self._lean or self._stock_forward).hidden(token_ids, taps)

    @torch.inference_mode()
    def early_states(self, token_ids: Tensor, num_layers: int) -> Tensor:
        """Residuals behind each of the first layers, side by side [B, T, num_layers * D], of rows as above."""
        if self._lean is None:
            raise TargetError(f"{self.name} runs on the stock path, which lends no early layers: {self.why_stock}")
        return self._lean.hidden(token_ids, tuple(range(1, num_layers + 1)), num_layers)[..., self.spec.hidden_size :]

    def probe_rows(self, token_ids: Sequence[int], positions: Tensor, probes: Probes) -> Tensor:
        """Hidden states [Q, M, D] of a group of probes behind each of the rows `positions` [Q] of a text, for training:
        with a gradient for the probes where it is enabled."""
        lean = self._lean
        if isinstance(getattr(lean, "head", None), NativeLinear) and torch.is_grad_enabled():
            raise TargetError(
                f"no gradient passes through the {self.type_name} weights of {self.name}, which a drafter with probes "
                "is trained with: load it in bfloat16 or float32 (--dtype)"
            )
        cache = KVCache(self._num_caches)
        self.prefill(token_ids, cache)
        if lean is not None:
            lean.rotary.reserve(len(token_ids) + probes.num_rows)
        read, in_pairs = (self._stock_forward.read, 0) if lean is None else (lean.read, lean.num_paired)
        groups = Groups(probes, positions.to(self.device), self.spec.max_positions, in_pairs)
        return groups.states(read, cache)

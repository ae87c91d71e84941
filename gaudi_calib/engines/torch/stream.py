"""A Hugging Face model run layer by layer, with the weights of one layer in memory at a time.

    stream = Stream(plan, batches)
    for layer in stream.layers():
        for batch in batches:
            batch.hidden = layer.run(batch, batch.hidden)
    for batch in batches:
        stream.run_outer(batch, batch.hidden)

The model is built without weights. A first pass through it with empty layers records how
each layer is called; then each layer's weights are read, the caller runs what it likes
through it, as often as it likes, and the weights are dropped; a last pass ends at the input
of the output projection. Activations are the caller's. Nothing here looks at them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from gaudi_calib.checkpoints.plan import ModelPlan
from gaudi_calib.engines.torch.attention import PackedAttention, SdpaInterceptor, attach_attention
from gaudi_calib.engines.torch.skeleton import WeightLoader, build_skeleton

# A batch of several sequences has at most that many tokens.
MAX_BATCH_TOKENS = 4096


@dataclass
class Batch:
    """Sequences that run together, one behind the other.

    Attributes:
        tokens: token ids, shape (1, tokens).
        bounds: start of every sequence, and the end of the last.
        first: index of its first sequence among the prompts.
        hidden: activations that enter the first layer, shape (1, tokens, hidden size); the caller may replace them.
        calls: per layer, the other arguments the model passes it.
    """

    tokens: torch.Tensor
    bounds: list[int]
    first: int
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    @property
    def positions(self) -> torch.Tensor:
        """Position ids, shape (1, tokens): counted from each sequence's start."""
        return torch.cat([torch.arange(stop - start) for start, stop in pairwise(self.bounds)])[None]


def make_batches(prompts: Sequence[Sequence[int]], batch_size: int, max_tokens: int) -> list[Batch]:
    """Group prompts, in order, into batches of at most `batch_size` sequences and `max_tokens` tokens.

    A longer prompt is a batch of its own.
    """
    batches: list[list[int]] = []
    size = 0
    for index, prompt in enumerate(prompts):
        if not batches or len(batches[-1]) == batch_size or size + len(prompt) > max_tokens:
            batches.append([])
            size = 0
        batches[-1].append(index)
        size += len(prompt)
    return [
        Batch(
            torch.tensor([[token for index in group for token in prompts[index]]]),
            list(accumulate((len(prompts[index]) for index in group), initial=0)),
            group[0],
        )
        for group in batches
    ]


def can_pack(plan: ModelPlan) -> bool:
    """Whether sequences may lie one behind the other in a batch."""
    # Attention temperatures are counted from the batch's start; below this position they are 1.
    config = plan.checkpoint.config
    tuned = config.get("attn_temperature_tuning", True) and config.get("floor_scale")
    return plan.layout.packs and (not tuned or tuned > MAX_BATCH_TOKENS)


class Layer:
    """One decoder layer, with its weights (but not those of its experts) as long as it is the layer's turn.

    Attributes:
        index: of the layer, counted from 0.
        module: Hugging Face's.
        attention: of the layer, where it has any.
    """

    def __init__(self, plan: ModelPlan, index: int, module: nn.Module):
        self.index, self.module, self.returns_tuple = index, module, False
        self.attention: PackedAttention | None = None
        self._mode: Any = contextlib.nullcontext()
        if index in plan.attention_layers:
            self.attention = attach_attention(module.get_submodule(plan.layout.attention.module), index)
            if not plan.layout.uses_attention_interface:
                self._mode = SdpaInterceptor(self.attention)

    def run(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Return the activations behind the layer, of the shape of `hidden`, (1, tokens, hidden size)."""
        if self.attention is not None:
            self.attention.sequences.bounds = batch.bounds
        args, kwargs = batch.calls[self.index]
        with self._mode:
            out = self.module(hidden, *args, **kwargs)
        self.returns_tuple = isinstance(out, tuple)
        return out[0] if self.returns_tuple else out


class Stream:
    """A model on its way from the embedding to the output projection. To be used in inference mode.

    Attributes:
        model: Hugging Face's, without the weights of its layers and of the output projection.
        batches: as given, with their activations before the first layer.
    """

    def __init__(
        self,
        plan: ModelPlan,
        batches: Sequence[Batch],
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        """Build the model and run every batch up to the first layer.

        Args:
            dtype: what is computed in.
            device: torch's, where it is computed; only the CPU has been tried.

        Raises:
            ModelError: the checkpoint lacks a tensor.
        """
        self.plan, self.batches, self.dtype, self.device = plan, batches, dtype, torch.device(device)
        self.model = build_skeleton(plan, dtype, self.device)
        self._loader = WeightLoader(plan, dtype, self.device)
        self._loader.load_outer(self.model)
        layers = self.model.get_submodule(plan.layout.layers)
        assert isinstance(layers, nn.ModuleList)
        self._layers = list(layers)
        self._stand_ins = [_StandIn(index, layer) for index, layer in enumerate(layers)]
        self._returns_tuple = False
        for index, stand_in in enumerate(self._stand_ins):
            layers[index] = stand_in
        for batch in batches:
            self._record(batch)

    def layers(self) -> Iterator[Layer]:
        """Yield one layer after the other, each with its weights while it is its turn."""
        for index, module in enumerate(self._layers):
            layer = Layer(self.plan, index, module)
            with self._loader.loaded(module, self.plan.layers[index]):
                yield layer
            self._returns_tuple = layer.returns_tuple
            for batch in self.batches:
                batch.calls[index] = ((), {})  # masks and positions may be large

    def run_outer(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        """Run what lies outside the layers, with `hidden` behind the last of them.

        Returns:
            The input of the output projection, shape (1, tokens, channels).
        """
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        entered: list[torch.Tensor] = []

        def pass_on(index: int, before: torch.Tensor, args: tuple, kwargs: dict) -> Any:
            if index < len(self._layers) - 1:
                return (before,)
            return (hidden,) if self._returns_tuple else hidden

        def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            entered.append(args[0])
            raise _Stop

        handle = head.register_forward_pre_hook(stop)
        try:
            self._forward(batch, pass_on)
        finally:
            handle.remove()
        return entered[0]

    def _record(self, batch: Batch) -> None:
        """Note what enters the first layer, and the other arguments of all."""

        def note(index: int, hidden: torch.Tensor, args: tuple, kwargs: dict) -> tuple[torch.Tensor]:
            if index == 0:
                batch.hidden = hidden
            batch.calls.append((args, kwargs))
            if index == len(self._layers) - 1:
                raise _Stop
            return (hidden,)

        self._forward(batch, note)

    def _forward(self, batch: Batch, on_call: "_OnCall") -> None:
        for stand_in in self._stand_ins:
            stand_in.on_call = on_call
        arguments = {"position_ids": batch.positions.to(self.device)} if can_pack(self.plan) else {}
        with contextlib.suppress(_Stop):
            self.model(input_ids=batch.tokens.to(self.device), use_cache=False, **arguments)


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a pass through the model where nothing more is needed."""


# Gets the index of a layer, the activations and the other arguments it is called with; returns what it would.
_OnCall = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]


class _StandIn(nn.Module):
    """Stands in for a decoder layer: passes the call on, and has the layer's attributes.

    Attributes:
        on_call: what happens instead.
    """

    on_call: _OnCall

    def __init__(self, index: int, layer: nn.Module):
        super().__init__()
        self.index = index
        self.__dict__["layer"] = layer  # not a submodule: its parameters are elsewhere

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return self.on_call(self.index, hidden[0] if isinstance(hidden, tuple) else hidden, args, kwargs)

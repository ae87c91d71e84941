"""The torch engine: measure ranges with Hugging Face modules, one layer in memory at a time.

The model is built without weights. A first pass through it with empty layers records
how each layer is called; then each layer's weights are read, all batches run through
it, and the weights are dropped; a last pass ends at the output projection's input.
Compute is float32 by default, on weights upcast layer by layer.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gaudi_calib.checkpoints.plan import ModelPlan, WeightNames, plan_model
from gaudi_calib.engines.observe.attention import AttentionRanges, LatentCache, SdpaInterceptor
from gaudi_calib.engines.observe.nodes import attention_nodes, experts_node, linear_node
from gaudi_calib.engines.torch.experts import ColdPolicy, ObservedExperts, attach_experts
from gaudi_calib.engines.torch.linear import LinearRanges, Scratch, observe_input, observe_row_parallel
from gaudi_calib.engines.torch.skeleton import build_skeleton, loaded, outer_weights
from gaudi_calib.errors import RangeError
from gaudi_calib.models.modules import Split
from gaudi_calib.ranges.channels import ChannelNode, ChannelRanges
from gaudi_calib.ranges.topology import Topology

DEFAULT_WORLDS = (1, 2, 4, 8)
# Tokens that run through a layer together; bounds the memory of its activations.
_MAX_TOKENS = 1024
# Layers with experts get more, since each expert's weights are read once per batch, up to this
# many sums of (rank, token, channel).
_MAX_EXPERT_TOKENS = 4096
_MAX_EXPERT_SUMS = 2**28


@dataclass
class Batch:
    """Sequences that run together, one behind the other.

    Attributes:
        tokens: token ids, shape (1, tokens).
        bounds: start of every sequence, and the end of the last.
        first: index of its first sequence among the prompts.
        hidden: activations between layers, shape (1, tokens, hidden size).
        calls: per layer, the other arguments the model passes it.
    """

    tokens: torch.Tensor
    bounds: list[int]
    first: int
    hidden: torch.Tensor | None = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    @property
    def positions(self) -> torch.Tensor:
        """Position ids, shape (1, tokens): counted from each sequence's start."""
        lengths = np.diff(self.bounds)
        return torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]


def make_batches(prompts: Sequence[Sequence[int]], batch_size: int, max_tokens: int = _MAX_TOKENS) -> list[Batch]:
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
            np.cumsum([0] + [len(prompts[index]) for index in group]).tolist(),
            group[0],
        )
        for group in batches
    ]


def measure_channels(
    model_dir: Path,
    prompts: Sequence[Sequence[int]],
    *,
    worlds: Sequence[int] = DEFAULT_WORLDS,
    required: Sequence[Topology] = (),
    cold: ColdPolicy | None = None,
    dtype: str = "bfloat16",
    compute_dtype: str = "float32",
    batch_size: int = 32,
    on_progress: Callable[[float], None] = lambda tokens: None,
) -> ChannelRanges:
    """Measure a checkpoint's ranges per channel, as tensor parallelism 1 has them.

    Args:
        prompts: token ids of each sample.
        worlds: worlds for which the sums of ranks are measured (outputs of row-parallel
            layers, and of experts shared either way); those that do not divide the model
            are left out.
        required: topologies that must divide the model.
        cold: what to do with experts that few tokens reach.
        dtype: what the model is served in; weights are rounded to it first.
        compute_dtype: `float32`, or `bfloat16` to round as a bf16 model does (slow on
            a CPU that emulates bf16).
        batch_size: sequences that run together, at most.
        on_progress: called with the tokens finished, scaled so that they sum to the
            number of tokens in `prompts`; with 0 when the first layer starts.

    Raises:
        ModelError: the checkpoint is incomplete or of an unknown family.
        TopologyError: the model does not divide over the ranks of a required topology.
        RangeError: NaN or infinity in an activation; names node and sample.
    """
    plan = plan_model(model_dir, dtype)
    for topology in required:
        plan.require_topology(topology)
    wanted = sorted({world for world in (*worlds, *(one.world for one in required)) if plan.divides(world)})
    batches = make_batches(prompts, batch_size if can_pack(plan) else 1, _count_tokens(plan, wanted))
    measurement = _Measurement(plan, wanted, getattr(torch, compute_dtype), batches, on_progress, cold or ColdPolicy())
    with torch.inference_mode():
        return measurement.run(len(prompts))


def can_pack(plan: ModelPlan) -> bool:
    """Whether sequences may lie one behind the other in a batch."""
    # Attention temperatures are counted from the batch's start; below this position they are 1.
    config = plan.checkpoint.config
    tuned = config.get("attn_temperature_tuning", True) and config.get("floor_scale")
    return plan.layout.packs and (not tuned or tuned > _MAX_EXPERT_TOKENS)


def _count_tokens(plan: ModelPlan, worlds: Sequence[int]) -> int:
    if not plan.experts:
        return _MAX_TOKENS
    sums = int(plan.checkpoint.config["hidden_size"]) * (2 * max(worlds) + 1)
    return min(_MAX_EXPERT_TOKENS, max(_MAX_TOKENS, _MAX_EXPERT_SUMS // sums))


class _Stop(Exception):  # noqa: N818 - control flow, not an error
    """Ends a pass through the model where nothing more is needed."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes how it is called, passes the activations on."""

    def __init__(self, layer: nn.Module, on_call: Callable[[torch.Tensor, tuple, dict], Any]):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its parameters are elsewhere
        self.on_call = on_call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return self.on_call(hidden[0] if isinstance(hidden, tuple) else hidden, args, kwargs)


class _Measurement:
    """One run of the torch engine over all layers."""

    def __init__(
        self,
        plan: ModelPlan,
        worlds: Sequence[int],
        dtype: torch.dtype,
        batches: list[Batch],
        on_progress: Callable[[float], None],
        cold: ColdPolicy,
    ):
        self.plan, self.worlds, self.dtype, self.batches = plan, worlds, dtype, batches
        self.on_progress, self.cold = on_progress, cold
        self.names = WeightNames(plan.checkpoint, plan.layout)
        self.nodes: dict[str, ChannelNode] = {}
        self.interceptor = SdpaInterceptor()
        self.scratch = Scratch()
        self.returns_tuple = False

    def run(self, num_samples: int) -> ChannelRanges:
        model = build_skeleton(self.plan, self.dtype)
        layers = model.get_submodule(self.plan.layout.layers)
        assert isinstance(layers, nn.ModuleList)
        real = list(layers)
        with outer_weights(model, self.plan, self.names, self.dtype):
            self._record_calls(model, layers, real)
            self._observe_outer(model)
            self.on_progress(0.0)
            for index, layer in enumerate(real):
                self._measure_layer(self.plan.layers[index], layer, index)
            self._measure_lm_head(model, layers, real)
        ordered = {name: self.nodes[name] for name in self.plan.node_names if name in self.nodes}
        return ChannelRanges(ordered, self.plan.node_names, num_samples)

    def _record_calls(self, model: nn.Module, layers: nn.ModuleList, real: list[nn.Module]) -> None:
        current: list[Batch] = []

        def record(hidden: torch.Tensor, args: tuple, kwargs: dict) -> tuple[torch.Tensor]:
            batch = current[0]
            if not batch.calls:
                batch.hidden = hidden
            batch.calls.append((args, kwargs))
            if len(batch.calls) == len(real):
                raise _Stop
            return (hidden,)

        self._replace(layers, [_Recorder(layer, record) for layer in real])
        for batch in self.batches:
            current[:] = [batch]
            with contextlib.suppress(_Stop):
                self._forward(model, batch)

    def _measure_layer(self, name: str, layer: nn.Module, index: int) -> None:
        plan = self.plan
        with loaded(layer, name, self.names, self.dtype, plan), contextlib.ExitStack() as stack:
            attention = self._observe_attention(layer, index, stack)
            linears = self._observe_linears(layer, index)
            experts = self._observe_experts(layer, index, stack)
            for batch in self.batches:
                self._run_layer(layer, index, batch, attention, linears, experts)
            for node, ranges in linears.items():
                self.nodes[node] = linear_node(plan, plan.linears[node], ranges)
                ranges.detach()
            if attention is not None:
                self.nodes.update(attention_nodes(plan, index, attention))
            if experts is not None:
                router = layer.get_submodule(experts.weights.facts.router)
                experts.fill_cold(router.weight, self.cold)  # type: ignore[arg-type]
                self.nodes[experts.weights.node] = experts_node(experts)

    def _observe_attention(self, layer: nn.Module, index: int, stack: contextlib.ExitStack) -> AttentionRanges | None:
        if index not in self.plan.attention_layers:
            return None
        facts = self.plan.layout.attention
        attention = AttentionRanges()
        module: Any = layer.get_submodule(facts.module)
        kinds = getattr(module.config, "layer_types", None) or ()  # config.json may leave them out
        if index < len(kinds) and kinds[index] == "chunked_attention":
            attention.chunk = int(module.config.attention_chunk_size)
        if facts.latent:
            attention.latent = LatentCache(module.kv_b_proj, int(module.config.qk_nope_head_dim))
            stack.callback(attention.latent.detach)
        module.calibration = attention
        self.interceptor.ranges = attention
        return attention

    def _observe_linears(self, layer: nn.Module, index: int) -> dict[str, LinearRanges]:
        observed = {}
        for linear in self.plan.layout.linears:
            node = self.plan.node_name(index, linear.name)
            if node not in self.plan.linears:
                continue
            module = layer.get_submodule(linear.parts[0])  # fused ones share their input
            if linear.split is Split.ROW:
                observed[node] = observe_row_parallel(module, self.worlds, self.scratch, reduces=linear.reduces)
            else:
                observed[node] = observe_input(module)
        return observed

    def _observe_experts(self, layer: nn.Module, index: int, stack: contextlib.ExitStack) -> ObservedExperts | None:
        facts = self.plan.layout.experts
        weights = self.plan.experts.get(self.plan.node_name(index, facts.name)) if facts else None
        if facts is None or weights is None:
            return None
        topologies = [Topology(world, split) for world in self.worlds for split in (False, True)]
        topologies = [one for one in topologies if self.plan.divides_experts(one)]
        tokens = sum(batch.tokens.numel() for batch in self.batches)
        observed = ObservedExperts(weights, layer.get_submodule(facts.module), topologies, self.dtype, tokens)
        stack.callback(attach_experts(layer, facts, observed))
        return observed

    def _run_layer(
        self,
        layer: nn.Module,
        index: int,
        batch: Batch,
        attention: AttentionRanges | None,
        linears: dict[str, LinearRanges],
        experts: ObservedExperts | None,
    ) -> None:
        if attention is not None:
            attention.bounds = batch.bounds
        args, kwargs = batch.calls[index]
        mode = contextlib.nullcontext() if self.plan.layout.uses_attention_interface else self.interceptor
        with mode:
            out = layer(batch.hidden, *args, **kwargs)
        self.returns_tuple = isinstance(out, tuple)
        batch.hidden = out[0] if isinstance(out, tuple) else out
        batch.calls[index] = ((), {})  # masks and positions may be large
        self._check_finite(batch, {node: ranges.seen for node, ranges in linears.items()})
        if experts is not None:
            self._check_finite(batch, {experts.weights.node: experts.input, **experts.find_damaged()})
        self.on_progress(batch.tokens.numel() / len(self.plan.layers))

    def _check_finite(self, batch: Batch, inputs: dict[str, torch.Tensor | None]) -> None:
        for node, seen in inputs.items():
            if seen is None or bool(torch.isfinite(seen).all()):
                continue
            raise RangeError(
                f"{node} saw NaN or infinity in its input",
                where=f"sample {', '.join(map(str, self._find_samples(batch)))} of the prompts (counted from 0)",
                why="the model overflows on it, or its weights are damaged",
                fix="remove the sample, or check the weights",
            )

    @staticmethod
    def _find_samples(batch: Batch) -> list[int]:
        """Samples whose activations are not finite behind the layer, or all where none is."""
        assert batch.hidden is not None
        rows = torch.isfinite(batch.hidden[0]).all(-1)
        samples = range(batch.first, batch.first + len(batch.bounds) - 1)
        spans = pairwise(batch.bounds)
        found = [one for one, (start, stop) in zip(samples, spans, strict=True) if not rows[start:stop].all()]
        return found or list(samples)

    def _observe_outer(self, model: nn.Module) -> None:
        """Measure linear layers before the first decoder layer or behind the last (none in most families)."""
        self.outer = {
            linear.name: observe_input(model.get_submodule(linear.parts[0]))
            for linear in self.plan.layout.outer
            if linear.name in self.plan.linears
        }

    def _measure_lm_head(self, model: nn.Module, layers: nn.ModuleList, real: list[nn.Module]) -> None:
        last = len(real) - 1
        current: list[Batch] = []
        position = [0]

        def finish(hidden: torch.Tensor, args: tuple, kwargs: dict) -> Any:
            position[0] += 1
            if position[0] <= last:
                return (hidden,)
            return (current[0].hidden,) if self.returns_tuple else current[0].hidden

        self._replace(layers, [_Recorder(layer, finish) for layer in real])
        head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        ranges = LinearRanges()

        def stop(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            ranges.observe(args[0], per_channel=False)
            raise _Stop

        handle = head.register_forward_pre_hook(stop)
        for batch in self.batches:
            current[:], position[0] = [batch], 0
            with contextlib.suppress(_Stop):
                self._forward(model, batch)
            self._check_finite(batch, {"the output projection": ranges.seen})
        handle.remove()
        for node, seen in self.outer.items():
            self.nodes[node] = linear_node(self.plan, self.plan.linears[node], seen)
        lm_head = self.plan.layout.vllm_lm_head
        if lm_head is not None:
            self.nodes[lm_head] = linear_node(self.plan, self.plan.linears[lm_head], ranges)

    def _forward(self, model: nn.Module, batch: Batch) -> None:
        arguments = {"position_ids": batch.positions} if can_pack(self.plan) else {}
        model(input_ids=batch.tokens, use_cache=False, **arguments)

    @staticmethod
    def _replace(layers: nn.ModuleList, modules: Sequence[nn.Module]) -> None:
        for index, module in enumerate(modules):
            layers[index] = module

"""The torch engine's measurement: a model's ranges per channel, observed while it streams by.

Compute is float32 by default, on weights upcast layer by layer.
"""

import contextlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gaudi_calib.checkpoints.plan import ModelPlan, plan_model
from gaudi_calib.engines.observe.nodes import attention_nodes
from gaudi_calib.engines.torch.attention import LatentCache
from gaudi_calib.engines.torch.experts import ColdPolicy, ObservedExperts, attach_experts
from gaudi_calib.engines.torch.linear import (
    ObservedLinear,
    Scratch,
    measure_products,
    observe_fused,
    observe_row_parallel,
)
from gaudi_calib.engines.torch.sequences import Sequences
from gaudi_calib.engines.torch.stream import MAX_BATCH_TOKENS, Batch, Layer, Stream, can_pack, make_batches
from gaudi_calib.errors import RangeError
from gaudi_calib.models.modules import Split
from gaudi_calib.ranges.channels import ChannelNode, ChannelRanges
from gaudi_calib.ranges.topology import Topology

DEFAULT_WORLDS = (1, 2, 4, 8)
# Tokens that run through a layer together; bounds the memory of its activations.
_MAX_TOKENS = 1024
# Layers with experts get more, since each expert's weights are read once per batch, up to this
# many sums of (rank, token, channel).
_MAX_EXPERT_TOKENS = MAX_BATCH_TOKENS
_MAX_EXPERT_SUMS = 2**28


def measure_channels(
    model_dir: Path,
    prompts: Sequence[Sequence[int]],
    *,
    worlds: Sequence[int] = DEFAULT_WORLDS,
    required: Sequence[Topology] = (),
    cold: ColdPolicy | None = None,
    dtype: str = "bfloat16",
    vllm: str | None = None,
    compute_dtype: str = "float32",
    torch_device: str = "cpu",
    batch_size: int = 32,
    outputs: bool = False,
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
        vllm: version of the vLLM that serves; None for a current one.
        compute_dtype: `float32`, or `bfloat16` to round as a bf16 model does (slow on
            a CPU that emulates bf16).
        torch_device: where it is computed; only the CPU has been tried.
        batch_size: sequences that run together, at most.
        outputs: measure those of every node, not only those that INC computes scales from.
        on_progress: called with the tokens finished, scaled so that they sum to the
            number of tokens in `prompts`; with 0 when the first layer starts.

    Raises:
        ModelError: the checkpoint is incomplete or of an unknown family.
        TopologyError: the model does not divide over the ranks of a required topology.
        RangeError: NaN or infinity in an activation; names node and sample.
    """
    plan = plan_model(model_dir, dtype, vllm)
    for topology in required:
        plan.require_topology(topology)
    sizes = sorted({*worlds, *(topology.world for topology in required)})
    sizes = [world for world in sizes if plan.divides(world)]
    batches = make_batches(prompts, batch_size if can_pack(plan) else 1, _count_tokens(plan, sizes))
    with torch.inference_mode():
        stream = Stream(plan, batches, dtype=getattr(torch, compute_dtype), device=torch_device)
        nodes = _measure_stream(stream, sizes, cold or ColdPolicy(), on_progress, outputs=outputs)
    ordered = {name: nodes[name] for name in plan.node_names if name in nodes}
    return ChannelRanges(ordered, plan.node_names, len(prompts))


def _count_tokens(plan: ModelPlan, worlds: Sequence[int]) -> int:
    if not plan.experts:
        return _MAX_TOKENS
    sums = int(plan.checkpoint.config["hidden_size"]) * (2 * max(worlds) + 1)
    return min(_MAX_EXPERT_TOKENS, max(_MAX_TOKENS, _MAX_EXPERT_SUMS // sums))


def _measure_stream(
    stream: Stream, worlds: Sequence[int], cold: ColdPolicy, on_progress: Callable[[float], None], *, outputs: bool
) -> dict[str, ChannelNode]:
    plan, scratch = stream.plan, Scratch()
    nodes: dict[str, ChannelNode] = {}
    sequences = Sequences()
    outer = _observe_outer(stream, sequences, outputs=outputs)
    on_progress(0.0)
    for layer in stream.layers():
        with contextlib.ExitStack() as stack:
            observed = _ObservedLayer(stream, layer, worlds, scratch, sequences, stack, outputs=outputs)
            for batch in stream.batches:
                sequences.bounds = batch.bounds
                batch.hidden = layer.run(batch, batch.hidden)
                observed.require_finite(batch)
                on_progress(batch.tokens.numel() / len(plan.layers))
            nodes |= observed.to_nodes(cold)
    head = ObservedLinear()
    for batch in stream.batches:
        sequences.bounds = batch.bounds
        entering = stream.run_outer(batch, batch.hidden)
        head.input.take_samples(sequences.max_magnitudes(entering[0]))
        _require_finite(batch, [] if head.input.is_finite else ["the output projection"])
        batch.hidden = entering
    node = plan.layout.vllm_lm_head
    if node is not None:
        if outputs:
            head.outputs = measure_products(plan, plan.linears[node], [batch.hidden for batch in stream.batches])
        outer[node] = head
    return nodes | {node: linear.to_node(plan, plan.linears[node]) for node, linear in outer.items()}


def _observe_outer(stream: Stream, sequences: Sequences, *, outputs: bool) -> dict[str, ObservedLinear]:
    """Observe linear layers before the first decoder layer or behind the last (none in most families)."""
    return {
        linear.name: observe_fused(
            [stream.model.get_submodule(linear.parts[0])], linear.split, sequences, outputs=outputs
        )
        for linear in stream.plan.layout.outer
        if linear.name in stream.plan.linears
    }


class _ObservedLayer:
    """One decoder layer while it is observed."""

    def __init__(
        self,
        stream: Stream,
        layer: Layer,
        worlds: Sequence[int],
        scratch: Scratch,
        sequences: Sequences,
        stack: contextlib.ExitStack,
        *,
        outputs: bool,
    ):
        """Observe `layer`, which runs `sequences`, until `stack` is closed."""
        self.plan, self.layer, self._stack, self._outputs = stream.plan, layer, stack, outputs
        self._sequences = sequences
        if layer.attention is not None:
            layer.attention.outputs = outputs
        self._linears = self._observe_linears(worlds, scratch)
        self._experts = self._observe_experts(stream, worlds)
        self._observe_latent()

    def _observe_linears(self, worlds: Sequence[int], scratch: Scratch) -> dict[str, ObservedLinear]:
        observed = {}
        for facts in self.plan.layout.linears:
            node = self.plan.node_name(self.layer.index, facts.name)
            if node not in self.plan.linears:
                continue
            modules = [self.layer.module.get_submodule(part) for part in facts.parts]
            if facts.split is Split.ROW:
                observed[node] = observe_row_parallel(
                    modules[0], worlds, scratch, self._sequences, reduces=facts.reduces
                )
            else:
                observed[node] = observe_fused(modules, facts.split, self._sequences, outputs=self._outputs)
            self._stack.callback(observed[node].detach)
        return observed

    def _observe_experts(self, stream: Stream, worlds: Sequence[int]) -> ObservedExperts | None:
        facts = self.plan.layout.experts
        weights = self.plan.experts.get(self.plan.node_name(self.layer.index, facts.name)) if facts else None
        if facts is None or weights is None:
            return None
        topologies = [Topology(world, split) for world in worlds for split in (False, True)]
        topologies = [topology for topology in topologies if self.plan.divides_experts(topology)]
        module, tokens = self.layer.module, sum(batch.tokens.numel() for batch in stream.batches)
        observed = ObservedExperts(
            weights,
            module.get_submodule(facts.module),
            topologies,
            stream.dtype,
            stream.device,
            tokens,
            self._sequences,
        )
        self._stack.callback(attach_experts(module, facts, observed))
        return observed

    def _observe_latent(self) -> None:
        facts, attention = self.plan.layout.attention, self.layer.attention
        if attention is not None and facts.latent:
            module: Any = self.layer.module.get_submodule(facts.module)
            attention.latent = LatentCache(module.kv_b_proj, int(module.config.qk_nope_head_dim))
            self._stack.callback(attention.latent.detach)

    def require_finite(self, batch: Batch) -> None:
        """Raise RangeError where what a module of the layer has seen is not finite; `batch` was the last."""
        damaged = [node for node, linear in self._linears.items() if not linear.input.is_finite]
        _require_finite(batch, damaged + (self._experts.find_damaged() if self._experts else []))

    def to_nodes(self, cold: ColdPolicy) -> dict[str, ChannelNode]:
        """Return what was measured, after what is due to experts that saw few tokens."""
        plan, layer = self.plan, self.layer
        nodes = {node: linear.to_node(plan, plan.linears[node]) for node, linear in self._linears.items()}
        if layer.attention is not None:
            nodes |= attention_nodes(plan, layer.index, layer.attention.ranges)
        if self._experts is not None:
            weights = self._experts.weights
            router = layer.module.get_submodule(weights.facts.router)
            self._experts.fill_cold(router.weight, cold)  # type: ignore[arg-type]
            nodes[weights.node] = self._experts.to_node()
        return nodes


def _require_finite(batch: Batch, damaged: Sequence[str]) -> None:
    if damaged:
        raise RangeError(
            f"{damaged[0]} saw NaN or infinity in its input",
            where=f"sample {', '.join(map(str, _find_samples(batch)))} of the prompts (counted from 0)",
            why="the model overflows on it, or its weights are damaged",
            fix="remove the sample, or check the weights",
        )


def _find_samples(batch: Batch) -> list[int]:
    """Samples whose activations are not finite behind the layer, or all where none is."""
    rows = torch.isfinite(batch.hidden[0]).all(-1)
    samples = range(batch.first, batch.first + len(batch.bounds) - 1)
    spans = zip(samples, pairwise(batch.bounds), strict=True)
    found = [sample for sample, (start, stop) in spans if not rows[start:stop].all()]
    return found or list(samples)

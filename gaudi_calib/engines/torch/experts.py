"""Observing the routed experts of a layer, whose weights are read one expert at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gaudi_calib.checkpoints.expert_weights import ExpertWeights
from gaudi_calib.engines.observe.peak import Peak, max_magnitude
from gaudi_calib.engines.torch.linear import chain_worlds, require_finite_weight, sum_neighbours
from gaudi_calib.engines.torch.sequences import Sequences
from gaudi_calib.models.modules import Experts
from gaudi_calib.ranges.channels import ChannelNode, ChannelRange, ExpertChannels
from gaudi_calib.ranges.node import Op
from gaudi_calib.ranges.progress import Progress, follow_maximum
from gaudi_calib.ranges.topology import Topology

# Takes hidden states, and the experts of every token with their routing weights: see `ObservedExperts.__call__`.
RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Weights of a layer's experts that stay in memory between batches, in compute dtype.
_CACHE_BYTES = 2**30
# Tokens kept per layer for experts that turn out to be cold.
_SPARE_TOKENS = 512


@dataclass(frozen=True)
class ColdPolicy:
    """What to do with experts that see too few tokens.

    Attributes:
        min_tokens: fewer tokens than that make an expert cold.
        fill: send tokens of its layer through a cold expert alone, those the router likes best for it.
    """

    min_tokens: int = 1
    fill: bool = False


class ObservedExperts:
    """Runs and observes one layer's experts in place of Hugging Face's experts module.

    Attributes:
        input: of the fused op.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        module: nn.Module,
        topologies: Sequence[Topology],
        dtype: torch.dtype,
        device: torch.device,
        tokens: int,
        sequences: Sequences,
    ):
        """Prepare for `tokens` tokens, in batches of `sequences` of any size, computed in `dtype` on `device`."""
        self.sequences = sequences
        self.weights, self.module, self.dtype, self.device = weights, module, dtype, device
        self.input = Peak()
        count, channels = weights.count, weights.channels
        self._intermediate = torch.zeros(count, channels, device=device)
        self._gate_up, self._down = (np.zeros((count, channels), dtype=np.float32) for _ in range(2))
        # Per batch, what each sample sent through each expert, (experts, samples): -1 where it sent nothing.
        self._samples: list[torch.Tensor] = []
        self._owners = torch.empty(0)
        self._tokens = torch.zeros(count, dtype=torch.int64)
        self._filled = torch.zeros(count, dtype=torch.int64)
        self._routing, self._bias = 0.0, 0.0
        late = weights.facts.late_factor
        self._late_factor = float(weights.checkpoint.config.get(late) or 1.0) if late else 1.0
        self._slices = [_Sums(chain) for chain in _chain(topologies, dtype, by_expert=False)]
        self._wholes = [_Sums(chain) for chain in _chain(topologies, dtype, by_expert=True)]
        self._sums = [*self._slices, *self._wholes]
        self._cache: dict[int, _Expert] = {}
        self._spare: list[torch.Tensor] = []
        self._step, self._passed = -(-tokens // _SPARE_TOKENS), 0

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Route as the model does.

        Args:
            hidden: shape (tokens, hidden size).
            index, weights: the experts of every token and their routing weights, shape (tokens, top k).

        Returns:
            Weighted sum of the experts' outputs, shape (tokens, hidden size).
        """
        self.input.take_samples(self.sequences.max_magnitudes(hidden))
        self._owners = self.sequences.find_owners().to(hidden.device)
        self._samples.append(self._intermediate.new_full((self.weights.count, len(self.sequences.bounds) - 1), -1))
        self._routing = max(self._routing, float(weights.float().abs().sum(-1).max()))
        out = torch.zeros_like(hidden)
        for sums in self._sums:
            sums.start(hidden)
        for expert in index.unique().tolist():
            tokens, slot = torch.where(index == expert)
            self._run_expert(expert, hidden[tokens], tokens, weights[tokens, slot, None], out)
        for sums in self._sums:
            sums.finish(self.sequences)
        self._keep_spare(hidden)
        return out

    def _run_expert(
        self, expert: int, x: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, out: torch.Tensor
    ) -> None:
        loaded = self._load(expert)
        self._tokens[expert] += len(tokens)
        inner = self._observe_intermediate(expert, loaded, x, tokens)
        slices = [_multiply_slices(inner, loaded, sums.world) for sums in self._slices]
        # In float32 the product is formed as the sum of the slices' products, at no extra multiplications.
        whole = slices[0].sum(0) if slices and self.dtype is torch.float32 else loaded.project(inner)
        served = weights / self._late_factor
        for sums, parts in zip(self._slices, slices, strict=True):
            sums.add(slice(None), tokens, parts.mul_(served))
        for sums in self._wholes:
            rank = expert * sums.world // self.weights.count
            sums.add(slice(rank, rank + 1), tokens, (whole * served).unsqueeze(0))
        if self.weights.facts.scales_input:
            result = loaded.project(self._observe_intermediate(expert, loaded, x * weights, tokens))
        else:
            result = whole * weights
        _add_rows(out.unsqueeze(0), tokens, result.unsqueeze(0))

    def _observe_intermediate(
        self, expert: int, loaded: "_Expert", x: torch.Tensor, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return what enters the down projection; `tokens` of the batch that runs are `x`, None where it is of none."""
        inner = _gate(self.module, nn.functional.linear(x, loaded.gate_up, loaded.gate_up_bias))
        self._intermediate[expert] = torch.maximum(self._intermediate[expert], max_magnitude(inner, 0).float())
        if tokens is not None:
            largest = max_magnitude(inner, 1).float()
            self._samples[-1][expert].scatter_reduce_(0, self._owners[tokens], largest, "amax")
        return inner

    def find_damaged(self) -> list[str]:
        """Return the nodes whose input is not finite: the fused op, and the down projections of experts."""
        experts = (~torch.isfinite(self._intermediate).all(1)).nonzero().flatten().tolist()
        inner = [f"{self.weights.node}.w2_list.{expert}" for expert in experts]
        return inner if self.input.is_finite else [self.weights.node, *inner]

    def _load(self, expert: int) -> "_Expert":
        if expert in self._cache:
            return self._cache[expert]
        loaded = self._read(expert)
        if (len(self._cache) + 1) * loaded.size_bytes <= _CACHE_BYTES:
            self._cache[expert] = loaded
        return loaded

    def _read(self, expert: int) -> "_Expert":
        gate_up, down = self.weights.read_gate_up(expert), self.weights.read_down(expert)
        rows = max_magnitude(gate_up, 1).float()
        self._gate_up[expert] = self.weights.order_gate_up(rows).amax(0).numpy()
        self._down[expert] = max_magnitude(down, 0).float().numpy()
        for part, ranges in (("w13_list", self._gate_up), ("w2_list", self._down)):
            require_finite_weight(f"{self.weights.node}.{part}.{expert}", ranges[expert])
        biases = self.weights.read_biases(expert) or ()
        if biases:
            self._bias = max(self._bias, float(max_magnitude(biases[1])))
        return _Expert(*(tensor.to(self.device, self.dtype) for tensor in (gate_up, down, *biases)))

    def _keep_spare(self, hidden: torch.Tensor) -> None:
        # Every so many tokens one, wherever batches end.
        self._spare.append(hidden[-self._passed % self._step :: self._step].clone())
        self._passed += len(hidden)

    def fill_cold(self, router: torch.Tensor, policy: ColdPolicy) -> None:
        """Read the experts no token reached, and send tokens through the cold ones.

        Args:
            router: the router's weight, shape (experts, hidden size).
        """
        spare = torch.cat(self._spare)
        scores = spare.float() @ router.float().T
        for expert in range(self.weights.count):
            missing = policy.min_tokens - int(self._tokens[expert])
            if missing <= 0:
                continue
            loaded = self._load(expert)
            if policy.fill:
                chosen = scores[:, expert].topk(min(missing, len(spare))).indices
                self._observe_intermediate(expert, loaded, spare[chosen])
                self._filled[expert] = len(chosen)

    def to_node(self) -> ChannelNode:
        """Return the channel ranges of the fused op."""
        assert self.input.is_seen, self.weights.node
        for expert in range(self.weights.count):
            if not self._gate_up[expert].any():
                self._read(expert)
        channels = ExpertChannels(
            self._intermediate.cpu().numpy(),
            self._gate_up,
            self._down,
            self._tokens.numpy(),
            self._filled.numpy(),
            self._routing / self._late_factor,
            self._bias,
            {key: peak.to_array() for sums in self._sums for key, peak in sums.peaks.items()},
            self._follow_outputs(),
        )
        entering = ChannelRange(self.input.to_array(), progress=self.input.to_progress())
        return ChannelNode(Op.DYNAMIC_MOE, (entering,), experts=channels)

    def _follow_outputs(self) -> dict[int, Progress]:
        """Return how the ranges of the fused op's outputs at world 1 came about, by their numbers."""
        total = next(sums.peaks[Topology(1).key] for sums in self._wholes if Topology(1) in sums.topologies)
        experts = map(follow_maximum, torch.cat(self._samples, dim=1).cpu().numpy())
        found = enumerate((total.to_progress(), *experts))
        return {number: progress for number, progress in found if progress is not None}


@dataclass(frozen=True)
class _Expert:
    """One expert's weights: gate_up (2 * channels, hidden size), down (hidden size, channels), biases."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @property
    def size_bytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def project(self, inner: torch.Tensor) -> torch.Tensor:
        """Down projection of (tokens, channels), shape (tokens, hidden size)."""
        return nn.functional.linear(inner, self.down, self.down_bias)


def _multiply_slices(inner: torch.Tensor, loaded: _Expert, world: int) -> torch.Tensor:
    """Down projections of every rank's channels, shape (world, tokens, hidden size)."""
    width = inner.shape[1] // world
    slices = loaded.down.unflatten(1, (world, width)).permute(1, 2, 0)
    parts = torch.bmm(inner.unflatten(1, (world, width)).transpose(0, 1), slices)
    if loaded.down_bias is not None:
        parts[0] += loaded.down_bias  # vLLM keeps it on the first rank
    return parts


class _Sums:
    """The sums that each rank computes, over worlds of which each divides the one before.

    Attributes:
        peaks: by topology key, of shape (world,).
    """

    def __init__(self, topologies: list[Topology]):
        self.topologies, self.world = topologies, topologies[0].world
        self.peaks = {topology.key: Peak() for topology in topologies}
        self._sums = torch.empty(0)

    def start(self, hidden: torch.Tensor) -> None:
        self._sums = hidden.new_zeros(self.world, *hidden.shape)

    def add(self, ranks: slice, tokens: torch.Tensor, parts: torch.Tensor) -> None:
        """Add one expert's parts of some tokens, shape (ranks, tokens, hidden size), to the sums of some ranks."""
        _add_rows(self._sums[ranks], tokens, parts)

    def finish(self, sequences: Sequences) -> None:
        """Take in the sums of one batch of `sequences`, and those of coarser worlds."""
        sums = self._sums
        for topology in self.topologies:
            sums = sum_neighbours(sums, topology.world)
            if topology.world == 1:
                self.peaks[topology.key].take_samples(sequences.max_magnitudes(sums[0]))
            else:
                self.peaks[topology.key].observe(sums, (1, 2))
        self._sums = torch.empty(0)


def _add_rows(sums: torch.Tensor, rows: torch.Tensor, parts: torch.Tensor) -> None:
    """Add (n, rows, width) to some rows of (n, all rows, width), in place."""
    # Of matrices, `index_add_` sorts the rows and shares them out over threads, which takes many times longer.
    sums.index_add_(1, rows, parts.to(sums.dtype))


def _chain(topologies: Sequence[Topology], dtype: torch.dtype, *, by_expert: bool) -> list[list[Topology]]:
    """Group topologies so that the sums of each follow from those of the one before; one rank goes with the finest."""
    worlds = [topology.world for topology in topologies if topology.expert_parallel == by_expert]
    chains = [[Topology(world, by_expert) for world in chain] for chain in chain_worlds(worlds, dtype)]
    if by_expert and dtype is torch.float32 and chains:
        chains[0].append(Topology(1))
    elif by_expert:
        chains.append([Topology(1)])
    return chains


def _gate(module: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    """Return act(gate) * up in the way of the family, shape (tokens, channels)."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)  # type: ignore[operator]
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[operator]


def attach_experts(layer: nn.Module, facts: Experts, observed: RunExperts) -> Callable[[], None]:
    """Make `layer` call `observed` for its experts; return what undoes it."""
    experts = layer.get_submodule(facts.module)
    if not facts.scales_input:
        experts.forward = lambda hidden, index, weights: observed(hidden, index, weights)
        return lambda: experts.__dict__.pop("forward", None)
    block: Any = layer.get_submodule(facts.module.rpartition(".")[0])

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Hugging Face's own block sends a copy of all tokens to every expert.
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores, logits = block.router(flat)
        weights, index = scores.topk(block.top_k)
        return block.shared_expert(flat) + observed(flat, index, weights), logits

    block.forward = forward
    return lambda: block.__dict__.pop("forward", None)

"""One measurement, every topology: ranges per channel, as tensor parallelism 1 has them.

A rank's range is the maximum over the channels that rank holds, which is exact, because
slicing a tensor and taking its maximum commute (derive.py). Tensor parallelism gives every
rank a slice of the intermediate channels of every expert; expert parallelism gives it whole
experts, consecutive ones, which it counts from 0. Both follow from maxima per expert and
channel. Only sums over ranks are no slice of anything: outputs of row-parallel layers and of
fused expert ops are measured for the topologies asked for, and bounded for others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gaudi_calib.errors import RangeError, TopologyError
from gaudi_calib.ranges.bf16 import round_to_bf16
from gaudi_calib.ranges.node import OPTIONAL_OUTPUTS, Op
from gaudi_calib.ranges.progress import Progress
from gaudi_calib.ranges.topology import Axis, Topology


@dataclass(frozen=True)
class ExpertChannels:
    """Ranges of one layer's experts; every array has shape (experts, intermediate channels).

    Attributes:
        intermediate: float32; largest magnitude of what enters the down projection,
            act(gate) * up; 0 where the expert saw no token.
        gate_up: float32; weight ranges of a channel's gate and up rows, the larger.
        down: float32; weight ranges of the down projection's columns.
        tokens: int64, shape (experts,): how many the router sent to each.
        filled: int64, shape (experts,): how many more were sent to it because it was cold.
        routing: largest sum of one token's routing weights.
        bias: largest magnitude of the down projections' biases, 0 without any.
        outputs: topology key -> float32, shape (world,): largest magnitude of the sum that each rank computes.
        progress: by number of the fused op's output at world 1, 0 the sum and 1 + i expert i: how its range came
            about, where that was observed; without what was sent to experts because they were cold.
    """

    intermediate: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    tokens: np.ndarray
    filled: np.ndarray
    routing: float = 1.0
    bias: float = 0.0
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    progress: Mapping[int, Progress] | None = None

    @property
    def count(self) -> int:
        """Number of experts."""
        return int(self.intermediate.shape[0])

    def share(self, rank: int, topology: Topology) -> tuple[slice, slice]:
        """Return the experts and the intermediate channels of `rank`.

        Raises:
            TopologyError: the experts, or the channels, do not divide over the ranks.
        """
        total = self.intermediate.shape[0 if topology.expert_parallel else 1]
        if total % topology.world:
            what = "experts" if topology.expert_parallel else "intermediate channels of an expert"
            raise TopologyError(
                f"{total} {what} do not divide over {topology.world} ranks",
                fix="choose a number of ranks that divides them, or the other way of sharing experts "
                "(-u/--expert-parallel, --no-expert-parallel)",
            )
        size = total // topology.world
        part = slice(rank * size, (rank + 1) * size)
        return (part, slice(None)) if topology.expert_parallel else (slice(None), part)

    def output(self, rank: int, topology: Topology) -> float:
        """Return the range of the sum that `rank` computes: as measured, or an upper bound."""
        measured = self.outputs.get(topology.key)
        return self.bound_output(rank, topology) if measured is None else float(measured[rank])

    def bound_output(self, rank: int, topology: Topology) -> float:
        """Return an upper bound of the sum that `rank` computes, often much larger than the truth.

        No token gets more than `routing` times the largest single expert's output, which
        is at most the sum over channels of intermediate range times weight range.
        """
        share = self.share(rank, topology)
        # As they are stored, so that a bound does not depend on where it is computed.
        stored = (round_to_bf16(values[share]) for values in (self.intermediate, self.down))
        products = np.multiply(*stored, dtype=np.float64)
        rounding = 1 + 2**-7  # may have made both factors smaller
        return float(self.routing * (products.sum(1).max() * rounding + self.bias))

    def by_expert(self, rank: int, topology: Topology) -> Iterator[tuple[float, float, float]]:
        """Yield (intermediate range, gate and up weight range, down weight range) of every expert of `rank`."""
        share = self.share(rank, topology)
        maxima = (values[share].max(1).tolist() for values in (self.intermediate, self.gate_up, self.down))
        yield from zip(*maxima, strict=True)


@dataclass(frozen=True)
class ChannelRange:
    """Ranges of one tensor along the axis that ranks split.

    Attributes:
        values: float32, shape (channels,), not rounded to bf16.
        axis: how ranks split it.
        progress: how the largest of all channels came about, where that was observed.
    """

    values: np.ndarray
    axis: Axis = field(default_factory=Axis)
    progress: Progress | None = None

    def over_rank(self, rank: int, world: int) -> float:
        """The largest value among the channels of `rank`."""
        return float(max(self.values[part].max() for part in self.axis.slices(rank, world)))


@dataclass(frozen=True)
class ChannelNode:
    """One module's ranges at tensor parallelism 1, per channel.

    Attributes:
        op: what the module computes.
        inputs, outputs: as in `Node`; outputs None where not measured, and of a cache, whose
            largest value is the largest it was ever given.
        weight: per output row (column parallel) or per input column (row parallel).
        partial_products: row parallel only: world -> range of the partial products.
            One value for all ranks where they reduce at once: that of the elementwise
            maximum over ranks of the signed partial products (what INC records, as it
            reduces before it takes the absolute value); otherwise one per rank.
        softmax_sums: block-to-batch matmuls only: per head, the largest softmax
            denominator, which passes through the same op on Gaudi 2.
        experts: fused expert ops only.
    """

    op: Op
    inputs: tuple[ChannelRange, ...]
    outputs: tuple[ChannelRange, ...] | None = None
    weight: ChannelRange | None = None
    partial_products: Mapping[int, Sequence[float]] = field(default_factory=dict)
    softmax_sums: ChannelRange | None = None
    experts: ExpertChannels | None = None


@dataclass(frozen=True)
class ChannelRanges:
    """A whole model's measurement, independent of topology and device.

    Attributes:
        nodes: by vLLM module name, in module order.
        modules: all modules INC would patch, measured or not, in module order.
        num_samples: sequences measured.
    """

    nodes: Mapping[str, ChannelNode]
    modules: tuple[str, ...]
    num_samples: int

    @property
    def has_experts(self) -> bool:
        """Whether any layer has routed experts."""
        return any(node.experts is not None for node in self.nodes.values())

    @property
    def has_outputs(self) -> bool:
        """Whether the outputs that INC measures only when asked to were measured, in every node."""
        asked = (node for node in self.nodes.values() if node.op in OPTIONAL_OUTPUTS - {Op.KV_CACHE})
        return all(node.outputs is not None for node in asked)

    def require_outputs(self, anew: str | None = None) -> None:
        """Check that there are outputs.

        Args:
            anew: the command that measures again.

        Raises:
            RangeError: there are none.
        """
        if not self.has_outputs:
            raise RangeError(
                "the outputs of linear layers and matmuls were not measured",
                where="measure_exclude of the MEASURE config",
                why="it asks for them, and did not when the channel ranges were measured",
                fix=f"measure again{f': {anew}' if anew else ''}; or leave measure_exclude out",
            )

    def is_measured(self, topology: Topology) -> bool:
        """Whether the sums that ranks of `topology` compute were measured, in every node; otherwise they are bounds."""
        return all(
            topology.world in node.partial_products
            if node.op is Op.ROW_PARALLEL_LINEAR
            else node.experts is None or topology.key in node.experts.outputs
            for node in self.nodes.values()
        )

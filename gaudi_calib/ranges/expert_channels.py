"""The routed experts of one layer, per channel, and what each rank of any topology sees of them.

Tensor parallelism gives every rank a slice of the intermediate channels of every
expert; expert parallelism gives it whole experts, consecutive ones, which it counts
from 0. Both follow exactly from maxima per expert and intermediate channel. Only the
fused op's own output, a sum over the rank's share, is no slice of anything: it is
measured for the topologies asked for, and bounded for others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from gaudi_calib.errors import TopologyError
from gaudi_calib.ranges.bf16 import round_to_bf16


@dataclass(frozen=True)
class Topology:
    """How ranks share a model.

    Attributes:
        world: number of ranks.
        expert_parallel: ranks hold whole experts; otherwise a slice of each. With one
            rank both are the same.
    """

    world: int
    expert_parallel: bool = False

    @property
    def key(self) -> str:
        """Short name, `tp4` or `ep4`; `tp1` for one rank.

        >>> Topology(4, expert_parallel=True).key, Topology(1, expert_parallel=True).key
        ('ep4', 'tp1')
        """
        return f"{'ep' if self.expert_parallel and self.world > 1 else 'tp'}{self.world}"


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
    """

    intermediate: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray
    tokens: np.ndarray
    filled: np.ndarray
    routing: float = 1.0
    bias: float = 0.0
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)

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

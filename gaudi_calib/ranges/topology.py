"""How ranks share a model: how many, how they share its experts, and how they split a tensor's axis."""

from dataclasses import dataclass

from gaudi_calib.errors import TopologyError


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
class Segment:
    """A run of channels that ranks share out in whole units (heads, or single channels).

    Attributes:
        channels: how many.
        units: indivisible groups of channels, evenly sized.
        replicates: with more ranks than units, several ranks hold the same unit
            (KV heads); otherwise that is an error.
    """

    channels: int
    units: int
    replicates: bool = False

    def slice(self, rank: int, world: int) -> slice:
        """Channels of `rank`, counted from the segment's start.

        Raises:
            TopologyError: the units do not divide over the ranks.
        """
        size = self.channels // self.units
        if self.units % world == 0:
            count = self.units // world
            return slice(rank * count * size, (rank + 1) * count * size)
        if self.replicates and world % self.units == 0:
            unit = rank // (world // self.units)
            return slice(unit * size, (unit + 1) * size)
        raise TopologyError(
            f"{self.units} {'heads or channels' if size > 1 else 'channels'} do not divide over {world} ranks",
            fix="choose a tensor-parallel size that divides the attention heads, the KV heads "
            "(or is a multiple of them) and the intermediate size",
        )


@dataclass(frozen=True)
class Axis:
    """How one axis of a tensor is split; no segments: every rank holds all of it."""

    segments: tuple[Segment, ...] = ()

    def slices(self, rank: int, world: int) -> list[slice]:
        """Channels of `rank`, as slices of the whole axis.

        >>> Axis((Segment(8, 4), Segment(4, 2, replicates=True))).slices(3, 4)
        [slice(6, 8, None), slice(10, 12, None)]
        """
        if not self.segments:
            return [slice(None)]
        start, slices = 0, []
        for segment in self.segments:
            part = segment.slice(rank, world)
            slices.append(slice(start + part.start, start + part.stop))
            start += segment.channels
        return slices

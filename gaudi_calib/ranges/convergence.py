"""How the ranges of a measurement came about, sample by sample.

Samples are counted from 0, in the order they are measured in. That order decides which of them raise a maximum, but
neither the largest value nor the median.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gaudi_calib.ranges.channels import ChannelNode, ChannelRanges
from gaudi_calib.ranges.progress import Progress
from gaudi_calib.ranges.sources import find_sources, label_part


@dataclass(frozen=True)
class Convergence:
    """How all ranges of a measurement came about that scales of activations come from, at tensor parallelism 1.

    Attributes:
        samples: how many were measured.
        nodes: by node, in module order, and range, as `label_part` calls it.
        origins: where each sample comes from, as messages call it; empty where that is not known.
    """

    samples: int
    nodes: Mapping[str, Mapping[str, Progress]]
    origins: Sequence[str] = ()

    def describe_sample(self, sample: int) -> str:
        """Return what messages call a sample.

        >>> Convergence(2, {}, ["chat.jsonl, row 9", "chat.jsonl, row 4"]).describe_sample(1)
        'sample 1 (chat.jsonl, row 4)'
        """
        return f"sample {sample} ({self.origins[sample]})" if self.origins else f"sample {sample}"


def gather_convergence(channels: ChannelRanges, origins: Sequence[str] = ()) -> Convergence:
    """Return how the ranges of a measurement came about; of channel ranges that were read, none is known."""
    nodes = {name: dict(_list_progress(node)) for name, node in channels.nodes.items()}
    return Convergence(channels.num_samples, {name: parts for name, parts in nodes.items() if parts}, origins)


def _list_progress(node: ChannelNode) -> Iterator[tuple[str, Progress]]:
    inputs, output = find_sources(node.op, node)
    measured = {"inputs": node.inputs, "outputs": node.outputs or ()}
    for kind, index in [*inputs, output] if output else inputs:
        progress = measured[kind][index].progress if index < len(measured[kind]) else None
        if progress is not None:
            yield label_part((kind, index)), progress
    for number, progress in ((node.experts and node.experts.progress) or {}).items():
        yield label_part(("outputs", number)), progress

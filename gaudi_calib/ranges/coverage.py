"""How many tokens each routed expert saw, and what to say about those that saw too few.

An expert that no token reached has a range of 0, and with it a scale that destroys
whatever the router sends there when serving.
"""

from itertools import chain
from statistics import median

from gaudi_calib.manifest import CoverageFacts
from gaudi_calib.ranges.channels import ChannelRanges

# At least so much more data is suggested where an expert saw none.
_LEAST_FACTOR = 4
_SHOWN = 5


def count_coverage(channels: ChannelRanges, *, policy: str, min_tokens: int) -> CoverageFacts | None:
    """Return how tokens spread over the experts, or None for a model without experts.

    Args:
        policy: what was done with experts that saw fewer tokens than `min_tokens`.
    """
    layers = {name: node.experts for name, node in channels.nodes.items() if node.experts is not None}
    if not layers:
        return None
    tokens = {name: experts.tokens.tolist() for name, experts in layers.items()}
    cold = {name: [expert for expert, seen in enumerate(row) if seen < min_tokens] for name, row in tokens.items()}
    filled = {
        name: {expert: count for expert, count in enumerate(experts.filled.tolist()) if count}
        for name, experts in layers.items()
    }
    return CoverageFacts(
        policy=policy,
        min_tokens=min_tokens,
        tokens=tokens,
        cold={name: experts for name, experts in cold.items() if experts},
        filled={name: experts for name, experts in filled.items() if experts},
    )


def describe_coverage(coverage: CoverageFacts) -> str:
    """Return one line on how tokens spread over the experts."""
    counts = list(chain.from_iterable(coverage.tokens.values()))
    return (
        f"{len(coverage.tokens)} layers with experts: {len(counts)} experts in all, tokens per expert: "
        f"fewest {min(counts)}, median {int(median(counts))}, most {max(counts)}"
    )


def list_cold(coverage: CoverageFacts) -> str:
    """Return which experts are cold, the first few layers of them."""
    layers = [f"{name}: {', '.join(map(str, experts))}" for name, experts in coverage.cold.items()]
    more = f"; and in {len(layers) - _SHOWN} more layers (see the manifest)" if len(layers) > _SHOWN else ""
    return "; ".join(layers[:_SHOWN]) + more


def suggest_data(coverage: CoverageFacts, total_tokens: int) -> str:
    """Return how much data would warm the coldest expert, as far as its share of `total_tokens` tells."""
    fewest = min(map(min, coverage.tokens.values()))
    if fewest == 0:
        return (
            f"an expert that {total_tokens} tokens do not reach may need data of another kind; "
            f"try at least {_LEAST_FACTOR} times as much (-l, another -d)"
        )
    factor = -(-coverage.min_tokens // fewest)
    return f"about {factor} times the data, {factor * total_tokens} tokens, would give each {coverage.min_tokens}"

"""How many tokens each routed expert saw, and what to say about those that saw too few.

An expert that no token reached has a range of 0, and with it a scale that destroys
whatever the router sends there when serving.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gaudi_calib.ranges.channels import ChannelRanges

# At least so much more data is suggested where an expert saw none.
_LEAST_FACTOR = 4
_SHOWN = 5


@dataclass(frozen=True)
class LayerCoverage:
    """One layer's experts.

    Attributes:
        node: name of the fused op.
        tokens: how many the router sent to each expert.
        filled: how many more were sent to it because it was cold.
        cold: numbers of the experts with fewer tokens than wanted.
    """

    node: str
    tokens: tuple[int, ...]
    filled: tuple[int, ...]
    cold: tuple[int, ...]


@dataclass(frozen=True)
class Coverage:
    """All layers with experts.

    Attributes:
        layers: in module order.
        min_tokens: fewer tokens than that make an expert cold.
        total_tokens: tokens of the data.
    """

    layers: Sequence[LayerCoverage]
    min_tokens: int
    total_tokens: int

    @property
    def cold_count(self) -> int:
        """Number of cold experts."""
        return sum(len(layer.cold) for layer in self.layers)

    @property
    def fewest(self) -> int:
        """Tokens of the expert that saw fewest."""
        return min(min(layer.tokens) for layer in self.layers)

    def describe(self) -> str:
        """Return one line on how tokens spread over the experts."""
        tokens = np.concatenate([layer.tokens for layer in self.layers])
        return (
            f"{len(self.layers)} layers with experts: {len(tokens)} experts in all, tokens per expert: "
            f"fewest {tokens.min()}, median {int(np.median(tokens))}, most {tokens.max()}"
        )

    def list_cold(self) -> str:
        """Return which experts are cold, the first few layers of them."""
        layers = [layer for layer in self.layers if layer.cold]
        shown = [f"{layer.node}: {', '.join(map(str, layer.cold))}" for layer in layers[:_SHOWN]]
        more = f"; and in {len(layers) - _SHOWN} more layers (see the manifest)" if len(layers) > _SHOWN else ""
        return "; ".join(shown) + more

    def suggest_data(self) -> str:
        """Return how much data would warm the coldest expert, as far as its share of tokens tells."""
        if self.fewest == 0:
            return (
                f"an expert that {self.total_tokens} tokens do not reach may need data of another kind; "
                f"try at least {_LEAST_FACTOR} times as much (-l, another -d)"
            )
        factor = -(-self.min_tokens // self.fewest)
        return f"about {factor} times the data, {factor * self.total_tokens} tokens, would give each {self.min_tokens}"

    def to_facts(self, policy: str) -> dict[str, Any]:
        """Return what the manifest keeps: per fused op the tokens, and the cold and filled experts."""
        return {
            "policy": policy,
            "min_tokens": self.min_tokens,
            "tokens": {layer.node: list(layer.tokens) for layer in self.layers},
            "cold": {layer.node: list(layer.cold) for layer in self.layers if layer.cold},
            "filled": {
                layer.node: {str(expert): count for expert, count in enumerate(layer.filled) if count}
                for layer in self.layers
                if any(layer.filled)
            },
        }


def count_coverage(channels: ChannelRanges, min_tokens: int, total_tokens: int) -> Coverage | None:
    """Return how tokens spread over the experts, or None for a model without experts."""
    layers = []
    for name, node in channels.nodes.items():
        if node.experts is not None:
            tokens = tuple(node.experts.tokens.tolist())
            cold = tuple(expert for expert, seen in enumerate(tokens) if seen < min_tokens)
            layers.append(LayerCoverage(name, tokens, tuple(node.experts.filled.tolist()), cold))
    return Coverage(layers, min_tokens, total_tokens) if layers else None

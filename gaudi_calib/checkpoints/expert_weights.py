"""The weights of one layer's routed experts, read from the checkpoint one expert at a time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gaudi_calib.checkpoints.checkpoint import FOREIGN_CONFIG, Checkpoint
from gaudi_calib.checkpoints.fit import wrong_shape
from gaudi_calib.errors import ModelError
from gaudi_calib.models.modules import Experts

if TYPE_CHECKING:
    import torch


def cast(tensor: "torch.Tensor", dtype: str) -> "torch.Tensor":
    """Return `tensor` in the type of that name, such as `bfloat16`."""
    import torch

    return tensor.to(getattr(torch, dtype))


@dataclass(frozen=True)
class ExpertWeights:
    """Where a layer's expert weights are.

    Attributes:
        checkpoint: which holds them.
        node: name of the fused op's node.
        facts: how the family stores them.
        layer: prefix of the layer's tensors in the checkpoint.
        is_stacked: whether the checkpoint holds one tensor for all experts.
        count: number of experts.
        channels: intermediate channels of each.
        dtype: what the model is served in.
    """

    checkpoint: Checkpoint
    node: str
    facts: Experts
    layer: str
    is_stacked: bool
    count: int
    channels: int
    dtype: str

    def read_gate_up(self, expert: int) -> "torch.Tensor":
        """Return gate and up rows in the order they are stored, shape (2 * channels, hidden size), served dtype."""
        if self.is_stacked:
            return self._read_stacked(self.facts.stacked[0], expert)
        import torch

        gate, up, _ = self.facts.each
        return torch.cat([self._read_each(gate, expert), self._read_each(up, expert)])

    def read_down(self, expert: int) -> "torch.Tensor":
        """Return the down projection, shape (hidden size, channels), served dtype."""
        if self.is_stacked:
            return self._read_stacked(self.facts.stacked[1], expert)
        return self._read_each(self.facts.each[2], expert)

    def read_biases(self, expert: int) -> "tuple[torch.Tensor, torch.Tensor] | None":
        """Return the biases of gate and up, shape (2 * channels,), and of down, (hidden size,), or None."""
        if not self.facts.biased:
            return None
        names = [f"{self.layer}.{name}_bias" for name in self.facts.stacked]
        gate_up, down = (cast(self.checkpoint.read_part(name, expert), self.dtype) for name in names)
        return gate_up, down

    def order_gate_up(self, gate_up: "torch.Tensor") -> "torch.Tensor":
        """Return stored rows (or row maxima) with those of gate and up apart, shape (2, channels, ...)."""
        if self.facts.interleaved:
            return gate_up.unflatten(0, (self.channels, 2)).transpose(0, 1)
        return gate_up.unflatten(0, (2, self.channels))

    def _read_stacked(self, name: str, expert: int) -> "torch.Tensor":
        weight = cast(self.checkpoint.read_part(f"{self.layer}.{name}", expert), self.dtype)
        return weight.T if self.facts.transposed else weight

    def _read_each(self, name: str, expert: int) -> "torch.Tensor":
        name = f"{self.layer}.{name.format(expert)}"
        return cast(self.checkpoint.read([name])[name], self.dtype)


def find_expert_weights(
    checkpoint: Checkpoint, facts: Experts, node: str, layer: str, router: str, dtype: str
) -> ExpertWeights:
    """Return where the experts of `layer` (its prefix in the checkpoint) are.

    Args:
        router: the checkpoint's name of their router's weight.

    Raises:
        ModelError: experts are missing, or not as many as config.json says.
    """
    count = checkpoint.source.expert_count
    if count is None:
        raise ModelError(
            "config.json does not say how many experts there are",
            where=checkpoint.directory,
            why=f"the checkpoint has a router, {router!r}",
            fix=FOREIGN_CONFIG,
        )
    is_stacked = not facts.each or any(f"{layer}.{name}" in checkpoint.weights for name in facts.stacked)
    each = [part.format(expert) for expert in range(count) for part in facts.each]
    names = [f"{layer}.{name}" for name in (facts.stacked if is_stacked else each)]
    for name in [*names, *(f"{name}_bias" for name in names if facts.biased)]:
        checkpoint.require(name, f"config.json calls for {count} experts")
    for name in [router, names[0]] if is_stacked else [router]:
        found = checkpoint.shapes[name][0]
        if found != count:
            raise ModelError(
                f"{name!r} is of {found} experts",
                where=checkpoint.directory,
                why=f"config.json calls for {count}",
                fix=FOREIGN_CONFIG,
            )
    channels = _require_shapes(checkpoint, facts, names, is_stacked=is_stacked)
    return ExpertWeights(checkpoint, node, facts, layer, is_stacked, count, channels, dtype)


def _require_shapes(checkpoint: Checkpoint, facts: Experts, names: list[str], *, is_stacked: bool) -> int:
    """Return the intermediate channels of an expert, after checking that all weights have them.

    Args:
        names: of gate and up stacked and down stacked, or of gate, up and down of one expert after the other.

    Raises:
        ModelError: a weight is of another shape.
    """
    hidden, shape = checkpoint.source.require_count("hidden_size"), checkpoint.shapes[names[0]]
    if len(shape) != 2 + is_stacked:
        raise wrong_shape(checkpoint, names[0], (*shape[:1], hidden))
    if is_stacked:
        channels = shape[2 if facts.transposed else 1] // 2
        pairs = [(2 * channels, hidden), (hidden, channels)]
        expected: list[tuple[int, ...]] = [(shape[0], *(pair[::-1] if facts.transposed else pair)) for pair in pairs]
    else:
        channels = shape[0]
        expected = [(channels, hidden), (channels, hidden), (hidden, channels)] * (len(names) // 3)
    for name, wanted in zip(names, expected, strict=True):
        if checkpoint.shapes[name] != wanted:
            raise wrong_shape(checkpoint, name, wanted)
    return channels

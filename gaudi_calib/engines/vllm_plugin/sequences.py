"""Which tokens and keys belong to which sequence of a pass, and the keys themselves.

Keys are kept beside vLLM's cache, because its layout depends on the kernel. With them,
prefill, chunks of it and decode are all alike: a query sees the keys of its sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch

from gaudi_calib.errors import ConfigError


@dataclass(frozen=True)
class Sequences:
    """How the tokens of a pass belong to sequences, in order; from the metadata of vLLM's attention.

    Attributes:
        starts: start of each sequence's queries among the tokens, and the end of the last.
        lengths: keys of each sequence, those of this pass included.
        blocks: numbers of each sequence's cache blocks, shape (sequences, most blocks), or None
            where the attention backend does not tell.
        slots: cache slot of every token, shape (tokens,), or None.
    """

    starts: list[int]
    lengths: list[int]
    blocks: torch.Tensor | None
    slots: torch.Tensor | None

    @classmethod
    def from_metadata(cls, metadata: Any) -> "Sequences":
        """Read what most backends of vLLM have in common.

        Raises:
            ConfigError: this one says nothing about sequences.
        """
        if not (hasattr(metadata, "query_start_loc") and hasattr(metadata, "seq_lens")):
            raise ConfigError(
                "this attention backend is not supported by quantization gaudi_fp8",
                where=type(metadata).__name__,
                why="its metadata does not tell where sequences begin",
                fix="choose another, for example --attention-backend FLASH_ATTN or TRITON_ATTN",
            )
        return cls(
            metadata.query_start_loc.tolist(),
            metadata.seq_lens.tolist(),
            getattr(metadata, "block_table", None),
            getattr(metadata, "slot_mapping", None),
        )

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    def find_decodes(self) -> torch.Tensor:
        """Tell which tokens are decoded: the only one of a sequence that is longer; bool, shape (tokens,)."""
        counts = torch.tensor(self.starts[1:]) - torch.tensor(self.starts[:-1])
        is_decode = (counts == 1) & (torch.tensor(self.lengths[: len(counts)]) > 1)
        return is_decode.repeat_interleave(counts)

    def find_slots(self, index: int, block_size: int) -> torch.Tensor | None:
        """Return the slots of all keys of sequence `index`, shape (keys,), or None where that cannot be told."""
        if self.blocks is None or self.slots is None:
            return None
        positions = torch.arange(self.lengths[index], device=self.blocks.device)
        slots = self.blocks[index][positions // block_size].long() * block_size + positions % block_size
        last = self.slots[self.starts[index + 1] - 1]
        return slots if int(slots[-1]) == int(last) else None


class KeyHistory:
    """The keys of one attention layer by cache slot."""

    def __init__(self) -> None:
        self._keys = torch.empty(0)

    def store(self, key: torch.Tensor, slots: torch.Tensor) -> None:
        """Keep keys of shape (tokens, KV heads, dim)."""
        needed = int(slots.max()) + 1
        if needed > len(self._keys):
            grown = key.new_zeros(max(needed, 2 * len(self._keys)), *key.shape[1:])
            if len(self._keys):
                grown[: len(self._keys)] = self._keys
            self._keys = grown
        self._keys[slots] = key

    def fetch(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the keys of some slots, shape (KV heads, keys, dim)."""
        return self._keys[slots].transpose(0, 1)

"""Which tensor of a checkpoint vLLM projects to the vocabulary with: its output projection, or the embedding."""

from dataclasses import dataclass

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.checkpoints.fit import wrong_shape
from gaudi_calib.checkpoints.weight_names import WeightNames
from gaudi_calib.errors import ModelError
from gaudi_calib.models.modules import Layout

# First vLLM that serves an output projection of this name although config.json ties it to the embedding; older ones
# pass it over. Source: vLLM `ModelConfig.maybe_untie_word_embeddings`, config/model.py.
STORED_HEAD_SINCE, _STORED_HEAD = (0, 29), "lm_head.weight"


@dataclass(frozen=True)
class Head:
    """The weight of the output projection.

    Attributes:
        weight: name of the tensor that is taken.
        other: name of the one that is not, where config.json ties two that the checkpoint both has.
    """

    weight: str
    other: str | None = None

    def describe(self, checkpoint: Checkpoint) -> str | None:
        """Say which of two different tensors is taken, None where there is but one; reads both."""
        if self.other is None:
            return None
        import torch

        tensors = checkpoint.read([self.weight, self.other])
        if torch.equal(tensors[self.weight], tensors[self.other]):
            return None
        since = f"{'since' if self.is_stored else 'before'} {'.'.join(map(str, STORED_HEAD_SINCE))}"
        return (
            f"config.json ties the output projection to the embedding, and the checkpoint has both {self.weight} and "
            f"{self.other}, which differ. {self.weight} is taken, as vLLM does {since} "
            "(--vllm says which one serves); tie_word_embeddings false in config.json settles it for all"
        )

    @property
    def is_stored(self) -> bool:
        """Whether it is the output projection of the checkpoint."""
        return self.weight == _STORED_HEAD


def find_head(checkpoint: Checkpoint, layout: Layout, names: WeightNames, vllm: tuple[int, ...]) -> Head | None:
    """Return the output projection, None where vLLM has no module for it.

    Args:
        vllm: (major, minor) of the vLLM that serves.

    Raises:
        ModelError: there is none, or it has another shape than the embedding.
    """
    if layout.vllm_lm_head is None:
        return None
    ties = checkpoint.config.get("tie_word_embeddings")
    is_tied = layout.ties_head if ties is None else bool(ties)
    stored = next((name for part in layout.lm_head if (name := f"{part}.weight") in checkpoint.weights), None)
    if stored is None and not is_tied:
        raise ModelError(
            "the checkpoint has no output projection",
            where=checkpoint.directory,
            why=f"there is no {layout.lm_head[0]}.weight, and config.json does not tie it to the embedding",
            fix='set "tie_word_embeddings": true in config.json if they are one; else get the whole checkpoint',
        )
    embedding = names.find(f"{layout.embedding}.weight")
    if stored is None:
        return Head(embedding)
    if checkpoint.shapes[stored] != checkpoint.shapes[embedding]:
        raise wrong_shape(checkpoint, stored, checkpoint.shapes[embedding])
    if not is_tied:
        return Head(stored)
    is_served = stored == _STORED_HEAD and vllm >= STORED_HEAD_SINCE
    return Head(stored, embedding) if is_served else Head(embedding, stored)

"""What a checkpoint calls a weight of the model: not all of them use today's names."""

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.models.modules import Layout


class WeightNames:
    """Finds tensors under the names that checkpoints of different ages give them."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout):
        self._checkpoint, self._renames = checkpoint, layout.renames
        paths = [name.split(".") for name in checkpoint.weights]
        self._modules = {".".join(path[:depth]) for path in paths for depth in range(len(path))}

    def has_module(self, name: str) -> bool:
        """Whether any tensor lies below the module path `name`."""
        return name in self._modules or name.partition(".")[2] in self._modules

    def has(self, name: str) -> bool:
        return self._translate(name) in self._checkpoint.weights

    def find(self, name: str) -> str:
        """Return the checkpoint's name of the module tensor `name`.

        Raises:
            ModelError: no such tensor.
        """
        found = self._translate(name)
        self._checkpoint.require(found)
        return found

    def _translate(self, name: str) -> str:
        """Return the checkpoint's name of a tensor, `name` itself where it has none."""
        renamed = name
        for ours, theirs in self._renames:
            renamed = renamed.replace(ours, theirs)
        # A checkpoint of the bare decoder lacks the first component ("model.", "transformer.").
        candidates = (name, renamed, name.partition(".")[2], renamed.partition(".")[2])
        return next((candidate for candidate in candidates if candidate in self._checkpoint.weights), name)

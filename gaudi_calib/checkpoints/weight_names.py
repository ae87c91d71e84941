"""What a checkpoint calls a weight of the model: not all of them use today's names."""

from gaudi_calib.checkpoints.checkpoint import Checkpoint
from gaudi_calib.errors import ModelError
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
        return self._find(name) is not None

    def find(self, name: str) -> str:
        """Return the checkpoint's name of the module tensor `name`.

        Raises:
            ModelError: no such tensor.
        """
        found = self._find(name)
        if found is None:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}",
                where=self._checkpoint.directory,
                why="config.json calls for it",
                fix="check that config.json belongs to these weights and that all shards are there",
            )
        return found

    def _find(self, name: str) -> str | None:
        # A checkpoint of the bare decoder lacks the first component ("model.", "transformer.").
        renamed = name
        for ours, theirs in self._renames:
            renamed = renamed.replace(ours, theirs)
        for candidate in (name, renamed, name.partition(".")[2], renamed.partition(".")[2]):
            if candidate in self._checkpoint.weights:
                return candidate
        return None

"""Whether a checkpoint holds what its config.json calls for, as far as names and shapes tell."""

import re
from collections.abc import Iterable

from gaudi_calib.checkpoints.checkpoint import FOREIGN_CONFIG, Checkpoint
from gaudi_calib.errors import ModelError
from gaudi_calib.models.families import find_kv_heads_key
from gaudi_calib.models.modules import Layout


def list_layers(checkpoint: Checkpoint, layout: Layout) -> tuple[str, ...]:
    """Return Hugging Face's names of the decoder layers, after checking that the checkpoint has those and no others.

    Raises:
        ModelError: it has not.
    """
    count, path = checkpoint.source.require_count("num_hidden_layers"), layout.layers
    bare = path.partition(".")[2]  # as checkpoints of the bare decoder call it
    pattern = re.compile(rf"(?:{re.escape(path)}|{re.escape(bare)})\.([0-9]{{1,9}})\.")
    stored = {int(found[1]) for name in checkpoint.weights if (found := pattern.match(name))}
    missing = next((index for index in range(count) if index not in stored), None)
    last = max(stored, default=0)
    if missing is not None or last >= count + checkpoint.source.draft_layers:
        raise ModelError(
            f"the checkpoint does not have the {count} decoder layers that config.json calls for",
            where=checkpoint.directory,
            why=f"there is no layer {missing}" if missing is not None else f"there is a layer {last}, counted from 0",
            fix=FOREIGN_CONFIG,
        )
    return tuple(f"{path}.{index}" for index in range(count))


def read_heads(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Return the numbers of attention heads and of key/value heads, and the channels of each.

    Raises:
        ModelError: config.json does not say them, or they do not go together.
    """
    source, kv_key = checkpoint.source, find_kv_heads_key(checkpoint.config)
    heads = source.require_count("num_attention_heads")
    kv_heads = 1 if kv_key is None else source.require_count(kv_key)
    if heads % kv_heads:
        raise ModelError(
            f"{heads} attention heads cannot share {kv_heads} KV heads",
            where=checkpoint.directory,
            why=f"num_attention_heads in config.json is no multiple of {kv_key}",
            fix=FOREIGN_CONFIG,
        )
    return heads, kv_heads, source.require_count("head_dim", default=source.require_count("hidden_size") // heads)


def require_matrices(checkpoint: Checkpoint, names: Iterable[str]) -> list[tuple[int, ...]]:
    """Return the shapes of weights that lie one below the other.

    Raises:
        ModelError: one is no matrix, or has other columns than the first.
    """
    shapes = {name: checkpoint.shapes[name] for name in names}
    columns = next(iter(shapes.values()))[1:]
    for name, shape in shapes.items():
        if len(shape) != 2 or shape[1:] != columns:
            raise wrong_shape(checkpoint, name, (shape[0] if shape else 1, *(columns or (1,))))
    return list(shapes.values())


def wrong_shape(checkpoint: Checkpoint, name: str, expected: tuple[int, ...]) -> ModelError:
    """Return the error for a weight of another shape than `expected`."""
    return ModelError(
        f"{name!r} has the shape {list(checkpoint.shapes[name])}, and is to have {list(expected)}",
        where=checkpoint.directory,
        why="config.json and the other weights call for it",
        fix=FOREIGN_CONFIG,
    )

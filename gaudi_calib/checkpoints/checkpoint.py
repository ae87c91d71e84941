"""Reading a Hugging Face checkpoint tensor by tensor, never as a whole.

Weights that are stored as FP8 or MXFP4 are read as the bf16 values they stand for
(`dequantize.py`), so that nobody else needs to know how a weight is stored.
"""

from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gaudi_calib.checkpoints.dequantize import (
    SCALE_TYPES,
    ScaleGrid,
    StoredWeight,
    align_scale,
    dequantize,
    dequantize_packed,
    find_block,
    find_foreign,
    find_weights,
    packed_shape,
    plan_grid,
)
from gaudi_calib.errors import FileError, ModelError
from gaudi_calib.files import read_json
from gaudi_calib.models.headers import Header, read_header
from gaudi_calib.models.source import open_model

if TYPE_CHECKING:
    import torch

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
FOREIGN_CONFIG = "check that config.json belongs to these weights and that all shards are there"
_PLAIN_TYPES = ("BF16", "F16", "F32", "F64")
_DAMAGED = "the file is damaged or incomplete; download it again"


class Checkpoint:
    """A directory with config.json and safetensors files (single or sharded).

    Attributes:
        directory: where it is.
        source: what its config.json says.
        config: config.json; of a larger model, what describes its language model.
        tensors: file name of every tensor.
        weights: the tensors that hold each weight, by its logical name; scales are no weights.
    """

    def __init__(self, directory: Path):
        """Read the index.

        Raises:
            ModelError: config.json, the safetensors files or a shard is missing or damaged, or
                the weights are quantized in a way that cannot be read.
        """
        self.directory = directory
        self.source = open_model(directory)
        self.config = self.source.text_config
        self.tensors = self._find_tensors()
        self._block = find_block(self.source.quantization or {})
        foreign = find_foreign(self.tensors)
        if foreign is not None:
            raise self._cannot_read(foreign, "belongs to a format other than FP8 and MXFP4")
        self.weights: dict[str, StoredWeight] = find_weights(self.tensors)

    def narrow(self, prefix: str) -> None:
        """Leave the tensors of the language model of a larger one: those below `prefix`, called without it."""
        self.weights = {
            name.removeprefix(prefix): weight for name, weight in self.weights.items() if name.startswith(prefix)
        }

    def _find_tensors(self) -> dict[str, str]:
        index = self.directory / _INDEX_NAME
        if index.is_file():
            files = self._read_index(index)
            missing = sorted({name for name in files.values() if not (self.directory / name).is_file()})
            if missing:
                raise ModelError(
                    f"{len(missing)} of the checkpoint's files are missing, the first is {missing[0]}",
                    where=self.directory,
                    why=f"{_INDEX_NAME} lists them",
                    fix="download the checkpoint again",
                )
            return files
        single = self.directory / _SINGLE_NAME
        if not single.is_file():
            others = sorted(path.name for path in self.directory.glob("*.bin"))
            raise ModelError(
                "no safetensors in the model directory",
                where=self.directory,
                why=f"found {others[0]}, which is a pickle" if others else "neither model.safetensors nor its index",
                fix="convert it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
            )
        return dict.fromkeys(sorted(span.name for span in self._read_header(_SINGLE_NAME).spans), _SINGLE_NAME)

    def _read_index(self, path: Path) -> dict[str, str]:
        content = read_json(path)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not (isinstance(files, dict) and files and all(isinstance(name, str) for name in files.values())):
            raise ModelError(
                f"{path.name} does not say which file holds which tensor",
                where=path,
                why='it is to be an object whose "weight_map" has the name of a file for each tensor',
                fix="download the checkpoint again",
            )
        outside = next((name for name in files.values() if _leaves(name)), None)
        if outside is not None:
            raise ModelError(
                f"{path.name} names a file outside the model directory",
                where=path,
                why=f"it is {outside!r}; the files of a checkpoint are beside its index",
                fix="get the checkpoint from a source you trust",
            )
        return files

    def _read_header(self, name: str) -> Header:
        try:
            header = read_header(self.directory / name)
        except FileError as error:
            raise ModelError(error.what, where=error.where, why=error.why, fix=_DAMAGED) from error
        self._open(name, "numpy")  # safetensors knows how many bytes each type takes
        return header

    def _open(self, name: str, framework: str = "pt") -> Any:
        try:
            return safe_open(self.directory / name, framework=framework)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot read {name}", where=self.directory / name, why=str(error), fix=_DAMAGED
            ) from error

    @cached_property
    def headers(self) -> dict[str, Header]:
        """Header of every weight file, by its name."""
        return {name: self._read_header(name) for name in sorted(set(self.tensors.values()))}

    @cached_property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type (safetensors' word for it) and shape of every tensor, from the headers alone."""
        return {span.name: (span.dtype, span.shape) for header in self.headers.values() for span in header.spans}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, as the model holds it, from the headers alone.

        Raises:
            ModelError: a weight is quantized and its scale is missing or of another shape,
                or it is quantized in a way that cannot be read.
        """
        shapes = {}
        for name, weight in self.weights.items():
            self._check(name, weight)
            shape = self.stored[weight.values][1]
            shapes[name] = packed_shape(shape) if weight.packed else shape
        return shapes

    def _check(self, name: str, weight: StoredWeight) -> None:
        missing = [part for part in weight.parts if part not in self.stored]
        if missing:
            raise ModelError(
                f"the checkpoint has no tensor {missing[0]!r}",
                where=self.directory / self.tensors[missing[0]],
                why=f"{_INDEX_NAME} says it is there",
                fix="download the checkpoint again",
            )
        kind, *scale_kinds = (self.stored[part][0] for part in weight.parts)
        if kind == "F8_E4M3" and weight.scale is None:
            raise ModelError(
                f"{name!r} is FP8 and has no scale",
                where=self.directory / self.tensors[weight.values],
                why=f"neither {name}_scale_inv nor {name}_scale is in the checkpoint",
                fix="get the checkpoint again from its source, or give the unquantized one",
            )
        if weight.packed:
            is_known = (kind, *scale_kinds) == ("U8", "U8")
        elif weight.scale is not None:
            is_known = kind == "F8_E4M3" and scale_kinds[0] in SCALE_TYPES
        else:
            is_known = kind in _PLAIN_TYPES or not (kind.startswith("F8") or name.endswith(".weight"))
        if not is_known:
            raise self._cannot_read(name, f"is stored as {' with a scale of '.join([kind, *scale_kinds])}")
        if weight.scale is not None and not weight.packed:
            self._grid(name)

    def _cannot_read(self, name: str, why: str) -> ModelError:
        method = (self.source.quantization or {}).get("quant_method")
        return ModelError(
            "the checkpoint is quantized in a way that cannot be read",
            where=self.directory,
            why=f"{name!r} {why}" + (f" (quant_method {method!r})" if method else ""),
            fix="give the unquantized checkpoint of this model, or one in FP8 (E4M3)",
        )

    def _grid(self, name: str) -> ScaleGrid:
        shape, scale_shape = (self.stored[part][1] for part in self.weights[name].parts)
        return plan_grid(shape, scale_shape, self._block, name=name)

    def read(self, names: Iterable[str]) -> "dict[str, torch.Tensor]":
        """Return the named weights: the quantized ones as bf16, others in the checkpoint's own dtypes.

        What is not quantized is backed by the mapped file; memory is used while it lives.

        Raises:
            ModelError: a weight is not in the checkpoint, or see `shapes`.
        """
        open_file = cache(self._open)
        return {name: self._read(name, open_file) for name in names}

    def read_part(self, name: str, index: int) -> "torch.Tensor":
        """Return `read([name])[name][index]`, reading and dequantizing no more than that.

        Args:
            name: of a weight, such as stacked experts (E, ...).
            index: on the first axis, from 0 up.

        Raises:
            ModelError: see `read`.
            IndexError: there is no such element.
        """
        self.require(name)
        size = self.shapes[name][0]
        if not 0 <= index < size:
            raise IndexError(f"{name} has {size} elements on its first axis, there is no {index}")
        return self._read(name, self._open, index)[0]

    def require(self, name: str, why: str = "config.json calls for it") -> StoredWeight:
        """Return how the weight `name` is stored.

        Raises:
            ModelError: there is no such weight.
        """
        if name not in self.weights:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}",
                where=self.directory,
                why=why,
                fix=FOREIGN_CONFIG,
            )
        return self.weights[name]

    def _read(self, name: str, open_file: Callable[[str], Any], index: int | None = None) -> "torch.Tensor":
        """Return a weight, or one element of its first axis, which is kept."""

        def load(tensor: str, first: int | None) -> "torch.Tensor":
            file = open_file(self.tensors[tensor])
            return file.get_tensor(tensor) if first is None else file.get_slice(tensor)[first : first + 1]

        weight = self.require(name)
        _ = self.shapes  # checks how every weight is stored
        values = load(weight.values, index)
        if weight.scale is None:
            return values
        if weight.packed:
            return dequantize_packed(values, load(weight.scale, index))
        grid, scale = self._grid(name), load(weight.scale, None)
        scale = scale.reshape(align_scale(tuple(values.shape), tuple(scale.shape)))
        if index is not None:
            first = index // grid.blocks[0]
            scale = scale[first : first + 1]
        return dequantize(values, scale, grid)


def _leaves(name: str) -> bool:
    """Whether the path `name` could lead out of the directory it counts from."""
    path = PurePath(name)
    return path.is_absolute() or ".." in path.parts

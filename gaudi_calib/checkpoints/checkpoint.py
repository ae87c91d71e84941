"""Reading a Hugging Face checkpoint tensor by tensor, never as a whole.

Weights that are stored as FP8 or MXFP4 are read as the bf16 values they stand for
(`dequantize.py`), so that nobody else needs to know how a weight is stored.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gaudi_calib.checkpoints.dequantize import (
    ScaleGrid,
    StoredWeight,
    dequantize,
    dequantize_packed,
    find_block,
    find_foreign,
    find_weights,
    packed_shape,
    plan_grid,
)
from gaudi_calib.errors import ModelError
from gaudi_calib.files import read_json

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")


def resolve_model(model: str) -> Path:
    """Return the local directory of `model`, downloading a hub name into the cache.

    Raises:
        ModelError: neither a directory nor a hub model that can be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(
            f"no model directory {model!r}",
            where=path.resolve(),
            fix="give the directory that holds config.json, or a hub name such as organisation/model",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_DOWNLOADED))
    except Exception as error:  # the hub client raises many unrelated types
        raise ModelError(
            f"cannot get model {model!r}",
            why=f"no such directory, and the hub said: {str(error).splitlines()[0]}",
            fix="check the name, log in with `hf auth login` if it is gated, or download it and give its directory",
        ) from error


class Checkpoint:
    """A directory with config.json and safetensors files (single or sharded).

    Attributes:
        directory: where it is.
        config: config.json as a dict.
        files: file name of every weight, by its logical name; scales are no weights.
        weights: the tensors that hold each of them.
        tensors: file name of every tensor, scales too.
        quantization: `quantization_config` of config.json, empty where there is none.
    """

    def __init__(self, directory: Path):
        """Read the index.

        Raises:
            ModelError: config.json, the safetensors files or a shard is missing, or the
                weights are quantized in a way that cannot be read.
        """
        self.directory = directory
        if not (directory / "config.json").is_file():
            raise ModelError(
                "no config.json in the model directory",
                where=directory,
                fix="give the directory of a Hugging Face checkpoint (config.json beside *.safetensors)",
            )
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self.tensors = self._find_tensors()
        self.quantization = _find_quantization(self.config)
        self._block = find_block(self.quantization)
        foreign = find_foreign(self.tensors)
        if foreign is not None:
            raise self._cannot_read(foreign, "belongs to a format other than FP8 and MXFP4")
        self.weights: dict[str, StoredWeight] = find_weights(self.tensors)
        self.files = {name: self.tensors[weight.values] for name, weight in self.weights.items()}

    def narrow(self, prefix: str) -> None:
        """Leave the language model of a larger one: tensors below `prefix`, without it, and `text_config`."""
        self.weights = {name.removeprefix(prefix): one for name, one in self.weights.items() if name.startswith(prefix)}
        self.files = {name: self.tensors[weight.values] for name, weight in self.weights.items()}
        kept = {name: self.config[name] for name in ("model_type", "quantization_config") if name in self.config}
        self.config = dict(self.config["text_config"]) | kept

    def _find_tensors(self) -> dict[str, str]:
        index = self.directory / _INDEX_NAME
        if index.is_file():
            files = dict(read_json(index).get("weight_map", {}))
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
        with self._open(_SINGLE_NAME) as file:
            return dict.fromkeys(file.keys(), _SINGLE_NAME)

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.directory / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot read {name}",
                where=self.directory / name,
                why=str(error),
                fix="the file is damaged or incomplete; download it again",
            ) from error

    @cached_property
    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type (safetensors' word for it) and shape of every tensor, from the headers alone."""
        stored = {}
        for name in sorted(set(self.tensors.values())):
            with self._open(name) as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    stored[key] = part.get_dtype(), tuple(part.get_shape())
        return stored

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
                where=self.directory / self.files[name],
                why=f"neither {name}_scale_inv nor {name}_scale is in the checkpoint",
                fix="get the checkpoint again from its source, or give the unquantized one",
            )
        if weight.packed:
            is_known = (kind, *scale_kinds) == ("U8", "U8")
        elif weight.scale is not None:
            is_known = kind == "F8_E4M3" and scale_kinds[0] in _SCALE_TYPES
        else:
            is_known = not (kind.startswith("F8") or (kind in ("U8", "I8", "I32") and name.endswith(".weight")))
        if not is_known:
            raise self._cannot_read(name, f"is stored as {' with a scale of '.join([kind, *scale_kinds])}")
        if weight.scale is not None and not weight.packed:
            self._grid(name)

    def _cannot_read(self, name: str, why: str) -> ModelError:
        method = self.quantization.get("quant_method")
        return ModelError(
            "the checkpoint is quantized in a way that cannot be read",
            where=self.directory,
            why=f"{name!r} {why}" + (f" (quant_method {method!r})" if method else ""),
            fix="give the unquantized checkpoint of this model, or one in FP8 (E4M3)",
        )

    def _grid(self, name: str) -> ScaleGrid:
        shape, scale_shape = (self.stored[part][1] for part in self.weights[name].parts)
        return plan_grid(shape, scale_shape, self._block, name=name)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named weights: the quantized ones as bf16, others in the checkpoint's own dtypes.

        What is not quantized is backed by the mapped file; memory is used while it lives.

        Raises:
            ModelError: a weight is not in the checkpoint, or see `shapes`.
        """
        open_file = cache(self._open)
        return {name: self._read(name, None, open_file) for name in names}

    def read_part(self, name: str, index: int | slice) -> torch.Tensor:
        """Return `read([name])[name][index]`, reading and dequantizing no more than that.

        Args:
            name: of a weight, such as stacked experts (E, ...).
            index: on the first axis; a slice is of every element from its start to its stop.

        Raises:
            ModelError: see `read`.
            IndexError: there is no such element.
        """
        self._find(name)
        size = self.shapes[name][0]
        if isinstance(index, slice):
            start, stop, _ = index.indices(size)
            return self._read(name, slice(start, max(start, stop)), self._open)
        if not -size <= index < size:
            raise IndexError(f"{name} has {size} elements on its first axis, there is no {index}")
        return self._read(name, slice(index % size, index % size + 1), self._open)[0]

    def _find(self, name: str) -> StoredWeight:
        if name not in self.weights:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}",
                where=self.directory,
                why="the configuration calls for it",
                fix="check that config.json belongs to these weights",
            )
        return self.weights[name]

    def _read(self, name: str, rows: slice | None, open_file: Callable[[str], Any]) -> torch.Tensor:
        """Return a weight, or its `rows` on the first axis."""

        def load(tensor: str, part: slice | None) -> torch.Tensor:
            file = open_file(self.tensors[tensor])
            return file.get_tensor(tensor) if part is None else file.get_slice(tensor)[part]

        weight = self._find(name)
        _ = self.shapes  # checks how every weight is stored
        values = load(weight.values, rows)
        if weight.scale is None:
            return values
        if weight.packed:
            return dequantize_packed(values, load(weight.scale, rows))
        return dequantize(values, load(weight.scale, None), self._grid(name), first=rows.start if rows else 0)

    def under(self, prefix: str) -> list[str]:
        """Names of the tensors below the module path `prefix`."""
        return [name for name in self.files if name.startswith(prefix + ".")]


def _find_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `quantization_config` of config.json, which multimodal models may keep in `text_config`."""
    for place in (config, config.get("text_config") or {}):
        if isinstance(place.get("quantization_config"), dict):
            return dict(place["quantization_config"])
    return {}

"""Reading a Hugging Face checkpoint tensor by tensor, never as a whole."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gaudi_calib.errors import ModelError
from gaudi_calib.files import read_json

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"


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
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
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
        files: file name of every tensor.
    """

    def __init__(self, directory: Path):
        """Read the index.

        Raises:
            ModelError: config.json, the safetensors files or a shard is missing.
        """
        self.directory = directory
        if not (directory / "config.json").is_file():
            raise ModelError(
                "no config.json in the model directory",
                where=directory,
                fix="give the directory of a Hugging Face checkpoint (config.json beside *.safetensors)",
            )
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self.files = self._find_tensors()

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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone."""
        shapes = {}
        for name in sorted(set(self.files.values())):
            with self._open(name) as file:
                shapes.update({key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})
        return shapes

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors, in the checkpoint's own dtypes.

        The tensors are backed by the mapped file; memory is used while they live.

        Raises:
            ModelError: a tensor is not in the checkpoint.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise ModelError(
                    f"the checkpoint has no tensor {name!r}",
                    where=self.directory,
                    why="the configuration calls for it",
                    fix="check that config.json belongs to these weights",
                )
            by_file.setdefault(self.files[name], []).append(name)
        tensors = {}
        for file_name, wanted in by_file.items():
            with self._open(file_name) as file:
                tensors.update({name: file.get_tensor(name) for name in wanted})
        return tensors

    def under(self, prefix: str) -> list[str]:
        """Names of the tensors below the module path `prefix`."""
        return [name for name in self.files if name.startswith(prefix + ".")]

"""What `-m` means, and what the model's config.json says: the one answer to both.

A model is a directory, or ORG/NAME on the Hugging Face hub. `find_model` asks the hub for no
more than config.json, `download_model` for all that serving needs, `open_model` is for what is
known to be a directory.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gaudi_calib.errors import FileError, ModelError
from gaudi_calib.files import expand_path, read_json
from gaudi_calib.models.families import Family, find_family

_log = logging.getLogger(__name__)

# What `convert-weights` leaves beside weights that it halved for Gaudi 2, and what keeps vllm-gaudi from halving again.
GAUDI2_RECORD = "gaudi2_conversion.json"
HALVED_ENV = {"VLLM_SCALE_ADJUSTMENT": "0"}

_CONFIG_NAME = "config.json"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
# Methods whose weights INC can quantize again: it dequantizes them first.
_FP8_METHODS = ("fp8",)
# Keys of the larger model that hold for its language model too.
_OF_THE_WHOLE = ("model_type", "quantization_config")
# config.json's names of the number of experts per layer, and of the most positions of a sequence.
_EXPERT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class ModelSource:
    """A model as given with -m.

    Attributes:
        name: directory or hub name, as given.
        directory: where it is, or None for a hub name whose weights are not downloaded.
        config: config.json, empty where it could not be downloaded.
    """

    name: str
    directory: Path | None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """The architecture's name.

        Raises:
            ModelError: config.json names none.
        """
        found = self.config.get("model_type")
        if not isinstance(found, str):
            raise ModelError(
                "config.json names no model_type",
                where=self._config_path,
                fix="use the checkpoint's original config.json",
            )
        return found

    @property
    def text_config(self) -> dict[str, Any]:
        """What describes the language model: config.json, with the values of `text_config` where a larger model has it.

        >>> ModelSource("m", None, {"model_type": "a", "text_config": {"model_type": "b", "vocab_size": 9}}).text_config
        {'model_type': 'a', 'vocab_size': 9}
        """
        config = dict(self.config)
        text = config.pop("text_config", None)
        if not isinstance(text, Mapping):
            return config
        return config | dict(text) | {name: config[name] for name in _OF_THE_WHOLE if name in config}

    @property
    def family(self) -> Family | None:
        """The family's facts, None where nobody described it."""
        try:
            return self.require_family()
        except ModelError:
            return None

    def require_family(self) -> Family:
        """Return the family's facts.

        Raises:
            ModelError: config.json names no model_type, or one that nobody described.
        """
        return find_family(self.model_type)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the weights are stored, None where they are plain BF16."""
        return next(iter(list_quantizations(self.config)), None)

    @property
    def method(self) -> str | None:
        """Quantization method that the checkpoint brings along (`awq`, `gptq`, `fp8`, ...), None for BF16.

        >>> ModelSource("m", None, {"quantization_config": {"quant_method": "awq"}}).method
        'awq'
        """
        found = self.quantization
        return None if found is None else str(found.get("quant_method", "compressed-tensors")).lower()

    @property
    def can_requantize(self) -> bool:
        """Whether a QUANT_CONFIG applies: the weights are BF16, or FP8 that is dequantized first."""
        return self.method is None or self.method in _FP8_METHODS

    @property
    def is_flavored(self) -> bool:
        """Whether config.json has room for the mark by which vllm-gaudi knows weights that fit Gaudi 2."""
        return self.method == "compressed-tensors"

    @property
    def required_env(self) -> dict[str, str]:
        """Environment without which a Gaudi serves other weights.

        vllm-gaudi halves FP8 weights on Gaudi 2 while loading; those that are halved already must stay.
        """
        is_halved = self.directory is not None and (self.directory / GAUDI2_RECORD).is_file()
        return HALVED_ENV if is_halved and not self.is_flavored else {}

    @property
    def expert_count(self) -> int | None:
        """Routed experts per layer, None where config.json states none."""
        return self._find_count(_EXPERT_KEYS)

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids, None where config.json states none."""
        return self._find_count(("vocab_size",))

    @property
    def context(self) -> int | None:
        """Most positions of a sequence, None where config.json states none."""
        return self._find_count(_CONTEXT_KEYS)

    @property
    def draft_layers(self) -> int:
        """Layers stored behind the decoder's, which predict further tokens; nobody runs them here."""
        return self._find_count(("num_nextn_predict_layers",)) or 0

    def require_count(self, key: str, default: int | None = None) -> int:
        """Return the whole number above 0 that config.json has under `key`; `default` where it is absent or null.

        Raises:
            ModelError: it is something else, or absent without a default.
        """
        found = self.text_config.get(key)
        if found is None and default is not None:
            return default
        if type(found) is not int or found < 1:
            raise ModelError(
                f"config.json has no usable {key}",
                where=self._config_path,
                why="it is missing" if found is None else f"it is {str(found)[:40]!r}, not a whole number above 0",
                fix="restore the checkpoint's original config.json",
            )
        return found

    @property
    def _config_path(self) -> Path | str:
        return self.name if self.directory is None else self.directory / _CONFIG_NAME

    def _find_count(self, keys: tuple[str, ...]) -> int | None:
        values = map(self.text_config.get, keys)
        return next((value for value in values if type(value) is int and value > 0), None)


def list_quantizations(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parts of a config.json that say how weights are stored, the one that decides first."""
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    places = (config.get("quantization_config"), config.get("compression_config"), nested)
    return [place for place in places if isinstance(place, dict) and place]


def locate_model(name: str) -> Path | None:
    """Return the directory that `name` is, None where it is a hub name.

    Raises:
        ModelError: neither.
    """
    path = expand_path(name)
    if path.is_dir():
        return path
    if path.exists() or not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"no model directory {name!r}",
            where=path.absolute(),
            why="it is a file" if path.exists() else None,
            fix="give the directory that holds config.json, or a hub name such as organisation/model",
        )
    return None


def find_config(directory: Path) -> Path:
    """Return the path of the config.json in `directory`.

    Raises:
        ModelError: there is none.
    """
    path = directory / _CONFIG_NAME
    if not path.is_file():
        raise ModelError(
            "no config.json in the model directory",
            where=directory,
            fix="give the directory of a Hugging Face checkpoint (config.json beside *.safetensors)",
        )
    return path


def open_model(directory: str | os.PathLike[str]) -> ModelSource:
    """Return what the checkpoint in `directory` is.

    Raises:
        ModelError: there is no config.json, or it is no JSON object.
    """
    path = expand_path(directory)
    return ModelSource(str(directory), path, _read_config(path))


def find_model(name: str, *, needs_config: bool = True) -> ModelSource:
    """Return what is known of `name`, asking the hub for no more than config.json.

    Args:
        name: directory or hub name.
        needs_config: False where a directory will do that has a tokenizer alone.

    Raises:
        ModelError: a path that is no checkpoint. A hub that does not answer is a warning.
    """
    directory = locate_model(name)
    if directory is None:
        return _find_on_hub(name)
    if not (needs_config or (directory / _CONFIG_NAME).is_file()):
        return ModelSource(name, directory)
    return ModelSource(name, directory, _read_config(directory))


def download_model(name: str) -> Path:
    """Return the directory of `name`, downloading a hub model into the cache.

    Raises:
        ModelError: neither a directory nor a hub model that can be reached.
    """
    directory = locate_model(name)
    if directory is not None:
        return directory.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_DOWNLOADED))
    except Exception as error:  # the hub client raises many unrelated types
        raise ModelError(
            f"model {name!r} could not be downloaded",
            why=f"there is no such directory, and the hub said: {_first_line(error)}",
            fix="check the name, log in with `hf auth login` if it is gated, or download it and give its directory",
        ) from error


def _find_on_hub(name: str) -> ModelSource:
    from huggingface_hub import hf_hub_download

    try:
        directory = Path(hf_hub_download(name, _CONFIG_NAME)).parent
    except Exception as error:  # the hub client raises many unrelated types
        _log.warning("config.json of %s could not be downloaded, nothing is known of it: %s", name, _first_line(error))
        return ModelSource(name, None)
    is_downloaded = any(directory.glob("*.safetensors"))
    return ModelSource(name, directory if is_downloaded else None, _read_config(directory))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _read_config(directory: Path) -> dict[str, Any]:
    path, fix = find_config(directory), "restore it, or download the checkpoint again"
    try:
        config = read_json(path)
    except FileError as error:
        raise ModelError(error.what, where=path, why=error.why, fix=fix) from error
    if not isinstance(config, dict):
        raise ModelError("config.json is not a JSON object", where=path, fix=fix)
    return config

"""What a checkpoint is, from its config.json alone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gaudi_calib.errors import ModelError
from gaudi_calib.files import read_json
from gaudi_calib.models.families import Family, find_family

_log = logging.getLogger(__name__)

# Methods whose weights INC can quantize again: it dequantizes them first.
_FP8_METHODS = ("fp8",)


@dataclass(frozen=True)
class ServedModel:
    """A model as given with -m.

    Attributes:
        name: directory or hub name, as given.
        directory: where it is, or None for a hub name whose weights are not downloaded yet.
        config: config.json, empty where the hub cannot be reached.
    """

    name: str
    directory: Path | None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the weights are stored, None where they are plain BF16."""
        text = self.config.get("text_config")
        nested = text.get("quantization_config") if isinstance(text, Mapping) else None
        found = self.config.get("quantization_config") or self.config.get("compression_config") or nested
        return found if isinstance(found, Mapping) else None

    @property
    def method(self) -> str | None:
        """Quantization method that the checkpoint brings along (`awq`, `gptq`, `fp8`, ...), None for BF16.

        >>> ServedModel("m", None, {"quantization_config": {"quant_method": "awq"}}).method
        'awq'
        """
        found = self.quantization
        return None if found is None else str(found.get("quant_method", "compressed-tensors")).lower()

    @property
    def can_requantize(self) -> bool:
        """Whether a QUANT_CONFIG applies: the weights are BF16, or FP8 that is dequantized first."""
        return self.method is None or self.method in _FP8_METHODS

    @property
    def family(self) -> Family | None:
        """The family's facts, None where nobody described it."""
        try:
            return find_family(str(self.config.get("model_type")))
        except ModelError:
            return None


def find_model(model: str) -> ServedModel:
    """Return what is known of `model`, asking the hub for no more than config.json.

    Raises:
        ModelError: a path that is no checkpoint.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelError(
                f"no model directory {model!r}",
                where=path.resolve(),
                fix="give the directory that holds config.json, or a hub name such as organisation/model",
            )
        return _find_on_hub(model)
    if not (path / "config.json").is_file():
        raise ModelError("no config.json in the model directory", where=path, fix="give a checkpoint's directory")
    return ServedModel(model, path, read_json(path / "config.json"))


def _find_on_hub(model: str) -> ServedModel:
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub client raises many unrelated types
        reason = str(error).splitlines()[0]
        _log.warning("config.json of %s cannot be had, so what it needs is not known: %s", model, reason)
        return ServedModel(model, None)
    is_downloaded = any(config.parent.glob("*.safetensors"))
    return ServedModel(model, config.parent if is_downloaded else None, read_json(config))

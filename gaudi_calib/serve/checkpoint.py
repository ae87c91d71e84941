"""What a checkpoint is, from its config.json alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gaudi_calib.errors import ModelError
from gaudi_calib.families import Family, find_family
from gaudi_calib.files import read_json

# Methods whose weights INC can quantize again: it dequantizes them first.
_FP8_METHODS = ("fp8",)


@dataclass(frozen=True)
class ServedModel:
    """A model as given with -m.

    Attributes:
        name: directory or hub name, as given.
        directory: where it is, or None for a hub name that is not downloaded yet.
        config: config.json, empty where there is no directory.
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
    """Return what is known of `model` without downloading anything.

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
        cached = _find_cached(model)
        if cached is None:
            return ServedModel(model, None)
        path = cached
    if not (path / "config.json").is_file():
        raise ModelError("no config.json in the model directory", where=path, fix="give a checkpoint's directory")
    return ServedModel(model, path, read_json(path / "config.json"))


def _find_cached(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    return Path(found).parent if isinstance(found, str) else None

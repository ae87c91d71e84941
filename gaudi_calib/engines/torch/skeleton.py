"""A Hugging Face model without weights, and giving parts of it theirs."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from gaudi_calib.checkpoints.fit import wrong_shape
from gaudi_calib.checkpoints.plan import ModelPlan
from gaudi_calib.checkpoints.weight_names import WeightNames
from gaudi_calib.engines.torch.attention import ATTENTION_NAME, register_attention
from gaudi_calib.errors import ModelError


def build_skeleton(plan: ModelPlan, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return the Hugging Face model with its buffers on `device` and its parameters on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet_torch()
    register_attention()
    with _explained(plan):
        config = AutoConfig.from_pretrained(plan.checkpoint.directory)
    if plan.layout.text_prefix:
        config = config.get_text_config()
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the checkpoint reader dequantizes
    _serve_long_rope(config)
    implementation = ATTENTION_NAME if plan.layout.uses_attention_interface else "sdpa"
    with _explained(plan), _without_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        # transformers keeps some in float32 whatever the model's dtype.
        is_kept = any(part in name for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        _owner_of(model, name)._buffers[name.rpartition(".")[2]] = buffer.to(
            device, torch.float32 if is_kept else buffer.dtype
        )
    return model.eval()


@contextlib.contextmanager
def _explained(plan: ModelPlan) -> Iterator[None]:
    """Raise ModelError for whatever transformers has against config.json."""
    try:
        yield
    except Exception as error:  # a malformed config can raise anything
        raise ModelError(
            "transformers cannot build the model that config.json describes",
            where=plan.checkpoint.directory / "config.json",
            why=" ".join(f"{type(error).__name__}: {error}".split()),
            fix="restore the checkpoint's original config.json",
        ) from error


def _quiet_torch() -> None:
    """Let torch log no more than this process wants to see of libraries: its own handlers do not ask the root logger.

    transformers imports torchao, where it is installed, and torch warns of that.
    """
    log = logging.getLogger("torch")
    log.setLevel(max(log.level, logging.getLogger().level))


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    """Put the parameters of the modules that are built in the block, but not their buffers, on the meta device."""

    def drop(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        # One that is there already is shared by two modules, and stays the same object.
        return parameter if parameter.is_meta else nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(drop)  # type: ignore[arg-type] # may return one
    try:
        yield
    finally:
        handle.remove()


def _serve_long_rope(config: Any) -> None:
    """Rotate by the long factors always, as vLLM does for a model served with its whole context.

    transformers chooses them by the longest position of a batch, vLLM by `max_model_len`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and config.max_position_embeddings > original:
        rope["short_factor"] = rope["long_factor"]


class WeightLoader:
    """Gives the modules of a skeleton their weights from the checkpoint, in the compute dtype, on the device."""

    def __init__(self, plan: ModelPlan, dtype: torch.dtype, device: torch.device):
        self.plan, self.dtype, self.device = plan, dtype, device
        self._names = WeightNames(plan.checkpoint, plan.layout)

    def load_outer(self, model: nn.Module) -> None:
        """Load what lies outside the decoder layers; the embedding stays in its source dtype, mapped."""
        layout = self.plan.layout
        embedding = f"{layout.embedding}.weight"
        self._require_shapes(model)
        for name in self._list_loaded(model):
            if name.startswith(layout.layers + "."):
                continue
            tensor = self.plan.served(self._read([name])[name]).to(self.device)
            _set_parameter(model, name, tensor if name == embedding else tensor.to(self.dtype))
        model.get_submodule(layout.embedding).register_forward_hook(lambda module, args, output: output.to(self.dtype))

    @contextlib.contextmanager
    def loaded(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Give `module`, called `prefix` in the model, its weights (not those of experts) while the block runs."""
        experts = self.plan.layout.experts
        skipped = experts.module + "." if experts else "/"
        empty = {name: weight for name, weight in module.named_parameters() if not name.startswith(skipped)}
        stored = module.state_dict().keys() - dict(module.named_parameters()).keys()  # buffers
        for name, tensor in self._read(stored, prefix).items():
            module.get_buffer(name).copy_(tensor)
        tensors = self._read(empty, prefix)
        for name in empty:
            _set_parameter(module, name, self.plan.served(tensors.pop(name)).to(self.device, self.dtype))
        try:
            yield
        finally:
            for name, parameter in empty.items():
                _set_parameter(module, name, parameter)

    def _require_shapes(self, model: nn.Module) -> None:
        """Raise ModelError where the checkpoint lacks a weight of the model, or has it in another shape."""
        experts, checkpoint = self.plan.layout.experts, self.plan.checkpoint
        skipped = f".{experts.module}." if experts else "/"
        for name in self._list_loaded(model):
            if skipped not in name:
                stored, expected = self._names.find(name), tuple(model.get_parameter(name).shape)
                if checkpoint.shapes[stored] != expected:
                    raise wrong_shape(checkpoint, stored, expected)

    def _list_loaded(self, model: nn.Module) -> list[str]:
        """Names of the parameters but for those of the output projection, which never runs."""
        head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}  # type: ignore[operator]
        embedding = f"{self.plan.layout.embedding}.weight"
        named = model.named_parameters(remove_duplicate=False)
        return [name for name, parameter in named if id(parameter) not in head or name == embedding]

    def _read(self, names: Iterable[str], prefix: str = "") -> dict[str, torch.Tensor]:
        sources = {name: self._names.find(f"{prefix}.{name}" if prefix else name) for name in names}
        tensors = self.plan.checkpoint.read(sources.values())
        return {name: tensors[source] for name, source in sources.items()}


def _owner_of(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    _owner_of(module, name)._parameters[name.rpartition(".")[2]] = nn.Parameter(tensor, requires_grad=False)

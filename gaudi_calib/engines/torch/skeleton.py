"""A Hugging Face model without weights, and giving parts of it theirs for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gaudi_calib.checkpoints.plan import ModelPlan, WeightNames
from gaudi_calib.engines.observe.attention import ATTENTION_NAME, register_attention


def build_skeleton(plan: ModelPlan, dtype: torch.dtype) -> nn.Module:
    """Return the Hugging Face model without weights (parameters on the meta device)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    register_attention()
    config = AutoConfig.from_pretrained(plan.checkpoint.directory)
    if plan.layout.text_prefix:
        config = config.get_text_config()
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the checkpoint reader dequantizes
    _serve_long_rope(config)
    implementation = ATTENTION_NAME if plan.layout.uses_attention_interface else "sdpa"
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    for name, buffer in model.named_buffers():  # transformers keeps them so whatever the model's dtype
        if any(part in name for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ()):
            buffer.data = buffer.data.float()
    return model.eval()


def _serve_long_rope(config: Any) -> None:
    """Rotate by the long factors always, as vLLM does for a model served with its whole context.

    transformers chooses them by the longest position of a batch, vLLM by `max_model_len`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and config.max_position_embeddings > original:
        rope["short_factor"] = rope["long_factor"]


@contextlib.contextmanager
def loaded(module: nn.Module, prefix: str, names: WeightNames, dtype: torch.dtype, plan: ModelPlan) -> Iterator[None]:
    """Give `module` its weights (not those of experts), in `dtype`, while the block runs."""
    experts = plan.layout.experts
    skipped = experts.module + "." if experts else "/"
    empty = {name: one for name, one in module.named_parameters() if not name.startswith(skipped)}
    wanted = {name: names.find(f"{prefix}.{name}") for name in empty}
    tensors = plan.checkpoint.read(wanted.values())
    for name in module.state_dict().keys() - dict(module.named_parameters()).keys():  # buffers that are stored
        source = names.find(f"{prefix}.{name}")
        module.get_buffer(name).copy_(plan.checkpoint.read([source])[source])
    for name, source in wanted.items():
        _set_parameter(module, name, plan.served(tensors.pop(source)).to(dtype))
    try:
        yield
    finally:
        for name, parameter in empty.items():
            _set_parameter(module, name, parameter)


@contextlib.contextmanager
def outer_weights(model: nn.Module, plan: ModelPlan, names: WeightNames, dtype: torch.dtype) -> Iterator[None]:
    """Load what lies outside the decoder layers; the embedding stays in its source dtype, mapped."""
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}  # type: ignore[operator]
    embedding = f"{plan.layout.embedding}.weight"
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name.startswith(plan.layout.layers + ".") or (id(parameter) in head and name != embedding):
            continue
        source = names.find(name)
        tensor = plan.served(plan.checkpoint.read([source])[source])
        _set_parameter(model, name, tensor if name == embedding else tensor.to(dtype))
    handle = model.get_submodule(plan.layout.embedding).register_forward_hook(
        lambda module, args, output: output.to(dtype)
    )
    yield
    handle.remove()


def _set_parameter(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

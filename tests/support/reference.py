"""A plain, unstreamed forward of a Hugging Face model that keeps every tensor the engine has to measure.

Independent of the engine: whole model in memory, one prompt at a time, transformers'
own eager attention, and sharding written out by hand.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import eager_mask


@dataclass
class Recording:
    """All tensors of one model over all prompts.

    Attributes:
        model: the Hugging Face model.
        inputs: Hugging Face linear name -> inputs, each of shape (tokens, in).
        attention: attention module name -> per prompt (q, k, v, out), each (heads, tokens, dim), and scale.
        probabilities: attention module name -> per prompt, (heads, tokens, tokens).
    """

    model: torch.nn.Module
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    attention: dict[str, list[tuple[torch.Tensor, ...]]] = field(default_factory=lambda: defaultdict(list))
    scale: dict[str, float] = field(default_factory=dict)
    probabilities: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))


def record_model(directory: Path, prompts: list[list[int]], dtype: torch.dtype) -> Recording:
    """Run every prompt through the whole model and keep what the linears and the attention see."""
    implementation = "sdpa" if "falcon" in (directory / "config.json").read_text() else "recording"
    AttentionInterface.register("recording", _record_attention)
    AttentionMaskInterface.register("recording", eager_mask)
    config = AutoConfig.from_pretrained(directory)
    if (
        getattr(config, "rope_parameters", None) and "long_factor" in config.rope_parameters
    ):  # vLLM takes them for every prompt
        config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation=implementation,
        experts_implementation="eager",
    ).eval()
    model.requires_grad_(False)
    recording = Recording(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(
                lambda module, args, name=name: recording.inputs[name].append(args[0].flatten(0, -2))
            )
        module.recorded_as, module.recording = name, [recording]
    original = torch.nn.functional.scaled_dot_product_attention

    def record_sdpa(query, key, value, attn_mask=None, **kwargs):
        out = _attend(query, key, value, attn_mask)
        layer = len(recording.attention) if not recording.attention else record_sdpa.layer
        name = f"layer{layer}"
        recording.attention[name].append((query[0], key[0], value[0], out[0]))
        recording.scale[name] = query.shape[-1] ** -0.5
        record_sdpa.layer = layer + 1
        return out

    with torch.no_grad():
        for prompt in prompts:
            record_sdpa.layer = 0
            if implementation == "sdpa":
                torch.nn.functional.scaled_dot_product_attention = record_sdpa
            try:
                model(torch.tensor([prompt]), use_cache=False)
            finally:
                torch.nn.functional.scaled_dot_product_attention = original
    return recording


def _record_attention(module, query, key, value, attention_mask, **kwargs):
    forward = sys.modules[type(module).__module__].eager_attention_forward
    out, weights = forward(module, query, key, value, attention_mask, **kwargs)
    recording, name = module.recording[0], module.recorded_as
    recording.attention[name].append((query[0], key[0], value[0], out[0].transpose(0, 1)))
    recording.scale[name] = kwargs.get("scaling") or query.shape[-1] ** -0.5
    recording.probabilities[name].append(weights[0])
    return out, weights


def _attend(query, key, value, mask):
    """Attention step by step, rounding where transformers' eager attention rounds."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores if mask is None or mask.dtype is torch.bool else scores + mask
    scores = scores.masked_fill(~causal, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value


def largest(tensors) -> float:
    """Largest magnitude over tensors, rounded to bfloat16."""
    return max(float(tensor.abs().max().to(torch.bfloat16)) for tensor in tensors)


def rank_heads(count: int, rank: int, world: int) -> slice:
    """Heads of one rank; with fewer heads than ranks, consecutive ranks share one."""
    if count >= world:
        return slice(rank * count // world, (rank + 1) * count // world)
    return slice(rank * count // world, rank * count // world + 1)


def rank_part(size: int, rank: int, world: int) -> slice:
    """An even, contiguous part."""
    return slice(rank * size // world, (rank + 1) * size // world)

"""What a Gaudi would compute, on a Hugging Face model: every tensor that passes through FP8 is rounded on its way.

A plain forward over whole sequences. Weights, inputs of linear layers and experts, queries, keys,
values and attention outputs are divided by their scale, rounded by the NumPy cast and
multiplied again; nothing is shared with the vLLM plugin but the scales.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.node import PerChannelWeight, ScaleNode
from gaudi_calib.scales.cast import cast_to_fp8

Scales = Mapping[str, ScaleNode]
Dynamic = Literal["channel", "tensor"] | None
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def compute_logprobs(
    model_dir: Path,
    sequences: Sequence[Sequence[int]],
    prompts: Sequence[int],
    scales: Scales | None,
    device: Device,
    *,
    dynamic: Dynamic = None,
) -> list[np.ndarray]:
    """Return the log-probabilities of the next token at every position, float32 of shape (tokens, vocabulary).

    Args:
        sequences: token ids.
        prompts: how many tokens of each are its prompt; later ones are decoded.
        scales: by vLLM's module names; nodes that are not there stay as they are. None: nothing is rounded.
        dynamic: scales of activations come from the values: one for every token that enters a linear layer, and so
            on, or one for all of a tensor. The only sequence of an engine is then meant.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register("fp8_reference", _attend)
    AttentionMaskInterface.register("fp8_reference", lambda *args, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="fp8_reference"
    ).eval()
    state: dict[str, Any] = {"decoded_from": 0, "dynamic": dynamic}
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.fp8 = (state, scales or {}, f"{name}.attn.impl.", device)
        elif name.endswith("mlp.experts"):
            _patch_experts(module, name, scales or {}, device)
        elif isinstance(module, nn.Linear):
            _patch_linear(module, name, scales or {}, device, state)
    found = []
    with torch.inference_mode():
        for tokens, state["decoded_from"] in zip(sequences, prompts, strict=True):
            logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
            found.append(torch.log_softmax(logits.float(), -1).numpy())
    return found


def round_fp8(x: torch.Tensor, scale: float | torch.Tensor | None, device: Device) -> torch.Tensor:
    """Divide by `scale`, round, multiply again; None: leave `x` alone."""
    if scale is None:
        return x
    rounded = torch.from_numpy(cast_to_fp8((x.detach().float() / scale).numpy(), device))
    return (rounded * scale).to(x.dtype)


def scale_values(
    x: torch.Tensor, device: Device, state: Mapping[str, Any], channels: tuple[int, ...], values: tuple[int, ...]
) -> torch.Tensor:
    """Return powers of two for `x`, whose tokens are in its last dimension but one; half of the range is used.

    Args:
        channels, values: dimensions that share a scale where there is one per channel, and one per tensor. A pass has
            all of a prompt's tokens, or one.
    """
    magnitudes = x.abs().clamp(min=torch.finfo(torch.bfloat16).tiny)
    if state["dynamic"] == "channel":
        largest = magnitudes.amax(channels, keepdim=True) if channels else magnitudes
    else:
        largest = magnitudes.amax(values, keepdim=True)
        prompt = largest.narrow(-2, 0, state["decoded_from"])
        prompt.copy_(prompt.max())
    reciprocal = torch.tensor(2 / device.fullscale).bfloat16()
    return torch.exp2(torch.log2(largest.bfloat16() * reciprocal).ceil()).float()


def _patch_linear(module: nn.Linear, name: str, scales: Scales, device: Device, state: Mapping[str, Any]) -> None:
    parent, _, last = name.rpartition(".")
    node = scales.get(f"{parent}.{FUSED.get(last, last)}" if parent else last)
    if node is None:
        return
    module.weight = nn.Parameter(
        round_fp8(module.weight, _weight_scale(node, module, last), device), requires_grad=False
    )

    def enter(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        scale = scale_values(args[0], device, state, (-1,), (-1,)) if state["dynamic"] else node.inputs[0]
        return (round_fp8(args[0], scale, device),)

    module.register_forward_pre_hook(enter)


def _weight_scale(node: ScaleNode, module: nn.Linear, last: str) -> float | torch.Tensor:
    if not isinstance(node.weight, PerChannelWeight):
        return float(np.asarray(node.weight).reshape(()))
    values = torch.from_numpy(node.weight.out_channels)
    rows = module.weight.shape[0]
    start = {"up_proj": len(values) - rows, "v_proj": len(values) - rows, "k_proj": len(values) - 2 * rows}.get(last, 0)
    return values[start : start + rows, None]


def _patch_experts(module: nn.Module, name: str, scales: Scales, device: Device) -> None:
    op = name.replace("mlp.experts", "block_sparse_moe.experts") + ".routed_experts.moe_op"
    if op not in scales:
        return
    for weights, child in ((module.gate_up_proj, "w13_list"), (module.down_proj, "w2_list")):
        for index, weight in enumerate(weights.data):
            weight.copy_(round_fp8(weight, float(scales[f"{op}.{child}.{index}"].weight), device))

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        hidden = round_fp8(hidden, scales[op].inputs[0], device)
        for expert in index.unique().tolist():
            tokens, slot = torch.where(index == expert)
            gate, up = (hidden[tokens] @ module.gate_up_proj[expert].T).chunk(2, -1)
            inner = round_fp8(module.act_fn(gate) * up, scales[op].inputs[1 + expert], device)
            out.index_add_(0, tokens, (inner @ module.down_proj[expert].T) * weights[tokens, slot, None].to(out.dtype))
        return out

    module.forward = forward


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    state, scales, prefix, device = module.fp8
    start = state["decoded_from"]

    def scale(op: str, kind: str = "inputs", index: int = 0) -> float | None:
        node = scales.get(prefix + op)
        return None if node is None else float(getattr(node, kind)[index])

    def rounding(x: torch.Tensor, stored: float | None, channels: tuple[int, ...] = (-1,)) -> torch.Tensor:
        if stored is None or not state["dynamic"]:
            return round_fp8(x, stored, device)
        return round_fp8(x, scale_values(x, device, state, channels, (1, -1)), device)

    fused = "fused_scaled_dot_product_attention"
    prefill = rounding(query, scale(fused))
    # A pass that decodes one sequence has one row, so that every column of it has a scale of its own.
    scaled = rounding(query * scaling, scale("batch2block_matmul", index=1), ())
    decode = rounding(scaled, scale("matmul_qk")) / scaling
    query = torch.cat([prefill[:, :, :start], decode[:, :, start:]], dim=2)
    groups = query.shape[1] // key.shape[1]
    key = rounding(key, scale("k_cache")).repeat_interleave(groups, 1)
    value = rounding(value, scale("v_cache")).repeat_interleave(groups, 1)
    scores = query.float() @ key.float().transpose(-1, -2) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = (torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ value.float()).to(value.dtype)
    first = rounding(out[:, :, :start], scale(fused, "outputs"))
    later = rounding(out, scale("block2batch_matmul", index=1), ())[:, :, start:]
    return torch.cat([first, later], dim=2).transpose(1, 2), None

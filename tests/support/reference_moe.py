"""Experts and latent attention of a whole Hugging Face model, written out by hand.

Independent of the engine: whole model in memory, one prompt at a time, transformers'
eager attention and experts; gate and up, activation, biases and router weights are
spelled out per family, and a rank's part of the experts is a plain slice.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import linear, silu
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from tests.support.reference import rank_part

Tensor = torch.Tensor


@dataclass(frozen=True)
class Share:
    """What one rank holds of the experts of a layer.

    Attributes:
        experts: their numbers.
        columns: intermediate channels.
        has_down_bias: whether the rank adds the bias of the down projection.
    """

    experts: range
    columns: slice
    has_down_bias: bool = True


@dataclass
class ExpertsRecord:
    """One layer's experts: what they hold, and what they saw over all prompts.

    Attributes:
        gate, up: (experts, intermediate, hidden). down: (experts, hidden, intermediate).
        biases: of gate, up (experts, intermediate) and down (experts, hidden), or None.
        activate: gate and up of some tokens to what the down projection gets.
        scales_input: the router's weight multiplies the input (of the expert), not the output.
        output_scale: part of `weights` that vLLM applies only behind the fused op.
        renormalizes: vllm-gaudi makes each token's weights sum to 1, whatever the model says.
        hidden: (tokens, hidden), the block's input.
        indices, weights: (tokens, top k), the router's choice and weights as in transformers.
        output: (tokens, hidden), what transformers' experts gave, all experts together.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    activate: Callable[[Tensor, Tensor], Tensor]
    scales_input: bool
    output_scale: float
    renormalizes: bool
    hidden: Tensor
    indices: Tensor
    weights: Tensor
    output: Tensor

    def tensor_share(self, rank: int, world: int) -> Share:
        """Return what `rank` of `world` tensor-parallel ranks holds."""
        return Share(range(len(self.gate)), rank_part(self.gate.shape[1], rank, world), rank == 0)

    def expert_share(self, rank: int, world: int) -> Share:
        """Return what `rank` of `world` expert-parallel ranks holds."""
        part = rank_part(len(self.gate), rank, world)
        return Share(range(part.start, part.stop), slice(None))

    def count_tokens(self, expert: int) -> int:
        """Return how many tokens the router sent to an expert."""
        return int((self.indices == expert).sum())

    def serve_weights(self) -> Tensor:
        """Return the router's weights as vllm-gaudi hands them to the fused op, (tokens, top k)."""
        if self.renormalizes:
            return self.weights / self.weights.sum(-1, keepdim=True)
        return self.weights / self.output_scale

    def compute_intermediate(self, expert: int, columns: slice = slice(None), *, scaled: bool) -> Tensor:
        """Return activated gate times up of an expert's tokens, (its tokens, columns).

        Args:
            scaled: let the router's weights scale the input where the family does (vllm-gaudi never does).
        """
        tokens, choice = torch.where(self.indices == expert)
        hidden = self.hidden[tokens]
        if scaled and self.scales_input:
            hidden = hidden * self.weights[tokens, choice, None]
        gate_bias, up_bias, _ = self.biases or (None, None, None)
        gate = linear(hidden, self.gate[expert, columns], None if gate_bias is None else gate_bias[expert, columns])
        up = linear(hidden, self.up[expert, columns], None if up_bias is None else up_bias[expert, columns])
        return self.activate(gate, up)

    def find_maxima(self, share: Share, *, scaled: bool = False) -> list[float]:
        """Return the largest intermediate magnitude of each expert of a share; 0 where no token went."""
        values = [self.compute_intermediate(expert, share.columns, scaled=scaled) for expert in share.experts]
        return [float(value.abs().max()) if value.numel() else 0.0 for value in values]

    def compute_output(self, share: Share, weights: Tensor | None = None, *, scaled: bool = True) -> Tensor:
        """Return the output of a share before any reduction over ranks, (tokens, hidden).

        Args:
            weights: of the router, instead of transformers'.
            scaled: as in `compute_intermediate`; if not, the weights multiply the output.
        """
        weights = self.weights if weights is None else weights
        output = torch.zeros_like(self.hidden)
        for expert in share.experts:
            tokens, choice = torch.where(self.indices == expert)
            part = linear(
                self.compute_intermediate(expert, share.columns, scaled=scaled), self.down[expert][:, share.columns]
            )
            if self.biases is not None and share.has_down_bias:
                part = part + self.biases[2][expert]
            if not (scaled and self.scales_input):
                part = part * weights[tokens, choice, None]
            output.index_add_(0, tokens, part.to(output.dtype))
        return output

    def fuse_weights(self, expert: int, share: Share) -> tuple[Tensor, Tensor]:
        """Return w13, gate rows above up rows, and w2 of an expert as a rank holds them."""
        w13 = torch.cat([self.gate[expert, share.columns], self.up[expert, share.columns]])
        return w13, self.down[expert][:, share.columns]


@dataclass
class LatentRecord:
    """One layer's latent attention, per prompt.

    Attributes:
        query, key, value, out: (heads, tokens, width); queries and keys with their rotated part.
        probabilities: (heads, tokens, tokens).
        latent: (tokens, rank + rotary), what is cached: the normed latent, then the rotated key part.
        key_up, value_up: (heads, width, rank): what expands latents to keys (without rotary) and values.
        scale: of the scores.
    """

    key_up: Tensor
    value_up: Tensor
    scale: float
    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    latent: list[Tensor] = field(default_factory=list)

    def absorb_queries(self, prompt: int) -> Tensor:
        """Return queries that meet latents instead of keys, unscaled, (heads, tokens, rank + rotary)."""
        query, width = self.query[prompt], self.key_up.shape[1]
        return torch.cat([query[..., :width] @ self.key_up, query[..., width:]], dim=-1)

    def attend_latents(self, prompt: int) -> Tensor:
        """Return probabilities times latents, (heads, tokens, rank)."""
        return self.probabilities[prompt] @ self.latent[prompt][:, : self.key_up.shape[2]]


@dataclass
class MoeRecording:
    """All experts and latent attention of a model; keys are Hugging Face's module names."""

    model: torch.nn.Module
    experts: dict[str, ExpertsRecord]
    latent: dict[str, LatentRecord]


def record_moe_model(directory: Path, prompts: list[list[int]], dtype: torch.dtype) -> MoeRecording:
    """Run every prompt through the whole model and keep what experts and latent attention see."""
    AttentionInterface.register("recording_moe", _record_attention)
    AttentionMaskInterface.register("recording_moe", eager_mask)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="recording_moe", experts_implementation="eager"
    ).eval()
    model.requires_grad_(False)
    seen: dict[str, list[tuple[Tensor, ...]]] = {}
    latent: dict[str, LatentRecord] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            seen[name] = []
            block = model.get_submodule(name.removesuffix(".experts"))
            _watch_experts(model.config.model_type, block, module, seen[name])
        elif hasattr(module, "kv_b_proj"):
            latent[name] = module.latent_record = _describe_latent(module)
            module.kv_a_layernorm.register_forward_hook(
                lambda norm, args, out, record=latent[name]: record.latent.append(out[0])
            )
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt]), use_cache=False)
    for record in latent.values():  # the rotary part is the same in every head's keys
        pairs = zip(record.latent, record.key, strict=True)
        record.latent = [torch.cat([kv, key[0, :, record.key_up.shape[1] :]], dim=-1) for kv, key in pairs]
    experts = {name: _describe_experts(model, model.get_submodule(name), rows) for name, rows in seen.items()}
    return MoeRecording(model, experts, latent)


def _watch_experts(
    model_type: str, block: torch.nn.Module, experts: torch.nn.Module, rows: list[tuple[Tensor, ...]]
) -> None:
    """Append (hidden, indices, weights, output) to `rows` at every call."""
    if model_type != "llama4_text":
        experts.register_forward_hook(lambda module, args, out: rows.append((*args, out)))
        return

    def see_router(router: torch.nn.Module, args: tuple[Tensor], out: tuple[Tensor, Tensor]) -> None:
        weights, indices = out[0].topk(router.top_k, dim=1)
        rows.append((args[0], indices, weights))

    def see_output(module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        rows[-1] += (out.unflatten(0, (module.num_experts, -1)).sum(0),)

    block.router.register_forward_hook(see_router)
    experts.register_forward_hook(see_output)


def _describe_experts(
    model: torch.nn.Module, experts: torch.nn.Module, rows: list[tuple[Tensor, ...]]
) -> ExpertsRecord:
    """Take apart the stacked weights by family, and join what was seen."""
    config = model.config
    gate_up, down = experts.gate_up_proj, experts.down_proj
    biases, activate = None, lambda gate, up: silu(gate) * up
    if config.model_type in ("llama4_text", "gpt_oss"):  # stored (experts, in, out)
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    if config.model_type == "gpt_oss":
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
        bias = experts.gate_up_proj_bias
        biases = bias[:, ::2], bias[:, 1::2], experts.down_proj_bias
        alpha, limit = config.swiglu_alpha, config.swiglu_limit

        def activate(gate: Tensor, up: Tensor) -> Tensor:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    return ExpertsRecord(
        gate,
        up,
        down,
        biases,
        activate,
        scales_input=config.model_type == "llama4_text",
        output_scale=getattr(config, "routed_scaling_factor", 1.0),
        renormalizes=config.model_type in ("qwen2_moe", "qwen3_moe"),
        **dict(zip(("hidden", "indices", "weights", "output"), map(torch.cat, zip(*rows, strict=True)), strict=True)),
    )


def _describe_latent(attention: torch.nn.Module) -> LatentRecord:
    """Take apart what expands a latent to keys and values."""
    weight = attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, -1))
    key_up, value_up = weight.split([attention.qk_nope_head_dim, attention.v_head_dim], dim=1)
    return LatentRecord(key_up, value_up, attention.scaling)


def _record_attention(module, query, key, value, attention_mask, **kwargs):
    forward = sys.modules[type(module).__module__].eager_attention_forward
    out, weights = forward(module, query, key, value, attention_mask, **kwargs)
    record = getattr(module, "latent_record", None)
    if record is not None:
        for name, tensor in zip(("query", "key", "value", "probabilities"), (query, key, value, weights), strict=True):
            getattr(record, name).append(tensor[0])
        record.out.append(out[0].transpose(0, 1))
    return out, weights

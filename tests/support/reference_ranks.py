"""Every range that one rank of vLLM would record, from tensors that are really sliced.

Independent of the engine and of the families' rows: vLLM's names and tensor-parallel
rules are written out below, the tensors are those of a whole Hugging Face model
(`reference.py`, `reference_moe.py`), and a rank's part of each is a plain slice.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from gaudi_calib.fp8 import GAUDI2, Device
from gaudi_calib.ranges.topology import Topology
from tests.support.reference import Recording, largest, rank_heads, rank_part, record_model
from tests.support.reference_moe import ExpertsRecord, LatentRecord, MoeRecording, Share, record_moe_model

Tensor = torch.Tensor

# Hugging Face's linear layers inside a decoder layer, vLLM's path, and how ranks split the weight: `heads` by
# query and KV heads, `rows` and `columns` evenly, `pairs` gate and up each, `none` not at all.
_GATED = ("mlp", "mlp.shared_experts", "mlp.shared_expert", "feed_forward", "feed_forward.shared_expert")
_MLPS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    *(((f"{path}.gate_proj", f"{path}.up_proj"), f"{path}.gate_up_proj", "pairs") for path in _GATED),
    *(((f"{path}.down_proj",), f"{path}.down_proj", "columns") for path in _GATED),
    (("shared_mlp.input_linear",), "shared_mlp.input_linear", "pairs"),
    (("shared_mlp.output_linear",), "shared_mlp.output_linear", "columns"),
    (("mlp.gate",), "mlp.gate", "none"),
    (("mlp.router",), "mlp.router", "none"),
    (("mlp.shared_expert_gate",), "mlp.shared_expert_gate", "none"),
    (("feed_forward.router",), "feed_forward.router", "none"),
    (("block_sparse_moe.router",), "block_sparse_moe.gate", "none"),
)
_LINEARS = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.qkv_proj", "heads"),
    (("self_attn.o_proj",), "self_attn.o_proj", "columns"),
    *_MLPS,
)
_LATENT_LINEARS = (
    (("self_attn.kv_a_proj_with_mqa",), "self_attn.mla_attn.kv_a_proj_with_mqa", "none"),
    (("self_attn.q_proj",), "self_attn.mla_attn.q_proj", "rows"),
    (("self_attn.q_b_proj",), "self_attn.mla_attn.q_b_proj", "rows"),
    (("self_attn.o_proj",), "self_attn.mla_attn.o_proj", "columns"),
    (("self_attn.kv_b_proj",), "self_attn.mla_attn.mla_attn.impl.kv_b_proj", "rows"),
    *_MLPS,
)
_RENAMED = {"mixtral": ("mlp.", "block_sparse_moe."), "gpt_oss": ("self_attn.", "attn.")}
# Fused with the layer that compresses queries, it is of a class INC does not know.
_UNPATCHED_BESIDE_COMPRESSED_QUERIES = "kv_a_proj_with_mqa"
# vLLM's shared experts leave the sum over ranks to the block they are part of.
_SUMMED_LATER = ("shared_expert.down_proj", "shared_experts.down_proj")
_VOCABULARY_PADDING = 64


@dataclass(frozen=True)
class Seen:
    """Ranges of one node, each the largest magnitude rounded to bfloat16."""

    inputs: list[float]
    outputs: list[float] | None = None
    weight: float | None = None


@dataclass
class WholeModel:
    """What a whole Hugging Face model saw over all prompts, and what any rank would have seen of it."""

    linears: Recording
    fused: MoeRecording

    @property
    def experts(self) -> dict[str, ExpertsRecord]:
        """The routed experts by the name of their fused op."""
        return {f"{self._rename(name)}.routed_experts.moe_op": record for name, record in self.fused.experts.items()}

    def slice_rank(self, rank: int, topology: Topology, device: Device) -> dict[str, Seen]:
        """Return the ranges of every node of a rank, by vLLM's names."""
        world, nodes = topology.world, {"lm_head": self._see_head(rank, topology.world)}
        for index in range(len(self.linears.model.model.layers)):
            layer = f"model.layers.{index}"
            attention = f"{layer}.self_attn"
            nodes |= self._see_linears(layer, rank, world)
            if attention in self.fused.latent:
                ops = _see_latent(self.fused.latent[attention], rank, world, device)
                nodes |= {f"{attention}.mla_attn.mla_attn.impl.{op}": seen for op, seen in ops.items()}
            elif attention in self.linears.attention:
                ops = self._see_attention(attention, rank, world, device)
                nodes |= {self._rename(f"{attention}.attn.impl.{op}"): seen for op, seen in ops.items()}
        for node, record in self.experts.items():
            share = record.expert_share if topology.expert_parallel else record.tensor_share
            nodes |= _see_experts(node, record, share(rank, world))
        return nodes

    def _rename(self, path: str) -> str:
        return path.replace(*_RENAMED.get(self.linears.model.config.model_type, ("", "")))

    def _see_linears(self, layer: str, rank: int, world: int) -> dict[str, Seen]:
        nodes = {}
        for parts, name, split in _LATENT_LINEARS if self.fused.latent else _LINEARS:
            names = [f"{layer}.{part}" for part in parts]
            has_compressed_queries = f"{layer}.self_attn.q_b_proj" in self.linears.inputs
            if not all(linear in self.linears.inputs for linear in names) or (
                has_compressed_queries and name.endswith(_UNPATCHED_BESIDE_COMPRESSED_QUERIES)
            ):
                continue
            node = f"{layer}.{self._rename(name)}"
            if split == "columns":
                nodes[node] = self._see_columns(names[0], rank, world, reduces=not name.endswith(_SUMMED_LATER))
            else:
                weights = self._split_rows([self._weight(linear) for linear in names], split, rank, world)
                nodes[node] = Seen([largest(self.linears.inputs[names[0]])], weight=largest(weights))
        return nodes

    def _weight(self, name: str) -> Tensor:
        return self.linears.model.get_submodule(name).weight

    def _split_rows(self, weights: list[Tensor], split: str, rank: int, world: int) -> list[Tensor]:
        if split == "none":
            return weights
        if split == "heads":
            config = self.linears.model.config
            counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            pairs = zip(weights, counts, strict=True)
            return [weight.unflatten(0, (count, -1))[rank_heads(count, rank, world)] for weight, count in pairs]
        halves = weights[0].chunk(2) if split == "pairs" and len(weights) == 1 else weights
        return [half[rank_part(len(half), rank, world)] for half in halves]

    def _see_columns(self, name: str, rank: int, world: int, *, reduces: bool) -> Seen:
        inputs, weight = self.linears.inputs[name], self._weight(name)
        parts = [rank_part(weight.shape[1], index, world) for index in range(world)]
        mine = parts[rank]
        if reduces:  # INC takes the maximum over ranks before the magnitude
            products = [torch.stack([x[:, part] @ weight[:, part].T for part in parts]).amax(0) for x in inputs]
        else:
            products = [x[:, mine] @ weight[:, mine].T for x in inputs]
        total = largest(x @ weight.T for x in inputs)
        return Seen([largest(x[:, mine] for x in inputs)], [largest(products), total], largest([weight[:, mine]]))

    def _see_attention(self, name: str, rank: int, world: int, device: Device) -> dict[str, Seen]:
        config, scale = self.linears.model.config, self.linears.scale[name]
        mine = rank_heads(config.num_attention_heads, rank, world)
        shared = rank_heads(config.num_key_value_heads, rank, world)
        queries, keys, values, outs = zip(*self.linears.attention[name], strict=True)
        query, out = ([tensor[mine] for tensor in tensors] for tensors in (queries, outs))
        key, value = (largest(tensor[shared] for tensor in tensors) for tensors in (keys, values))
        weights = [probabilities[mine].float() for probabilities in self.linears.probabilities[name]]
        terms = [weight.amax(-1, keepdim=True) for weight in weights]
        if hasattr(self.linears.model.get_submodule(name), "sinks"):  # what the keys leave is the sink's
            sinks = [1 - weight.sum(-1, keepdim=True) for weight in weights]
            terms = [torch.maximum(*pair) for pair in zip(terms, sinks, strict=True)]
        relative = largest(weight / term for weight, term in zip(weights, terms, strict=True))
        return {
            "fused_scaled_dot_product_attention": Seen([largest(query), key, value], [largest(out), largest(weights)]),
            "k_cache": Seen([key]),
            "v_cache": Seen([value]),
            **_see_matmuls(query, scale, key, relative, value, out, terms, device),
        }

    def _see_head(self, rank: int, world: int) -> Seen:
        weight = self.linears.model.get_output_embeddings().weight
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % _VOCABULARY_PADDING))
        part = padded[rank_part(len(padded), rank, world)]
        return Seen([largest(self.linears.inputs["lm_head"])], weight=largest([part]))


def _see_latent(record: LatentRecord, rank: int, world: int, device: Device) -> dict[str, Seen]:
    prompts = range(len(record.query))
    mine = rank_heads(record.query[0].shape[0], rank, world)
    query, key, value, out, weights = (
        [tensor[mine].float() for tensor in tensors]
        for tensors in (record.query, record.key, record.value, record.out, record.probabilities)
    )
    width = record.key_up.shape[2]
    latent, normed = largest(record.latent), largest(tensor[:, :width] for tensor in record.latent)
    absorbed = [record.absorb_queries(prompt)[mine] for prompt in prompts]
    averaged = [record.attend_latents(prompt)[mine] for prompt in prompts]
    terms = [weight.amax(-1) for weight in weights]
    fused = Seen([largest(tensor) for tensor in (query, key, value)], [largest(out), largest(weights)])
    return {
        "fused_scaled_dot_product_attention": fused,
        "latent_cache_k": Seen([latent]),
        **_see_matmuls(absorbed, record.scale, latent, 1.0, normed, averaged, terms, device),
    }


def _see_matmuls(
    query: list[Tensor],
    scale: float,
    key: float,
    weight: float,
    value: float,
    out: list[Tensor],
    terms: list[Tensor],
    device: Device,
) -> dict[str, Seen]:
    """What decode runs; `terms` are the largest terms of every softmax, whose denominators are 1 / term."""
    scaled = largest(tensor.bfloat16() * scale for tensor in query)  # devices multiply in bfloat16
    sums = largest(1 / term for term in terms) if device is GAUDI2 else 0.0
    to_block, to_batch = max(scaled, sums), max(largest(out), sums)
    return {
        "matmul_qk": Seen([scaled, key]),
        "matmul_av": Seen([weight, value]),
        "batch2block_matmul": Seen([1.0, to_block], [to_block]),
        "block2batch_matmul": Seen([1.0, to_batch], [to_batch]),
    }


def _see_experts(node: str, record: ExpertsRecord, share: Share) -> dict[str, Seen]:
    """The fused op and its children; where the router's weight scales the input, the larger of both ways."""
    ways = (record.find_maxima(share, scaled=scaled) for scaled in (False, True))
    maxima = [largest([torch.tensor(pair)]) for pair in zip(*ways, strict=True)]
    output = record.compute_output(share, record.weights / record.output_scale, scaled=False)
    nodes = {node: Seen([largest([record.hidden])], [largest([output]), *maxima])}
    for index, expert in enumerate(share.experts):
        gate_up, down = record.fuse_weights(expert, share)
        nodes[f"{node}.w13_list.{index}"] = Seen([0.0], weight=largest([gate_up]))
        nodes[f"{node}.w2_list.{index}"] = Seen([0.0], weight=largest([down]))
    return nodes


def record_whole_model(directory: Path, prompts: list[list[int]], dtype: torch.dtype) -> WholeModel:
    """Run every prompt through the whole model and keep what its modules see."""
    return WholeModel(record_model(directory, prompts, dtype), record_moe_model(directory, prompts, dtype))

"""INC's observer `save` with the torch engine: tensors themselves, each in a file, in place of their ranges.

    <directory of dump_stats_path>/tensors/<node>_<input0, output0 or weight>_iter<n>.pt

A file holds one tensor as `torch.save` writes it, in the type that the model is served in, for INC
calls the observer of a tensor once per forward pass: `n` counts the prompts, which INC sees one by one where
one sequence runs at a time. Weights have `iter0` only. Of the nodes, linear layers, what enters fused expert
ops and the weights of experts are saved; the shapes of what attention sees are those of a device's paged kernels.

Source: INC `SaveObserver`, fp8_quant/observer.py.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from gaudi_calib.checkpoints.plan import LinearPlan, ModelPlan
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.engines.torch.experts import ObservedExperts, attach_experts
from gaudi_calib.engines.torch.linear import multiply
from gaudi_calib.engines.torch.sequences import Sequences
from gaudi_calib.engines.torch.stream import MAX_BATCH_TOKENS, Batch, Layer, Stream, can_pack, make_batches
from gaudi_calib.files import write_bytes
from gaudi_calib.models.modules import Linear
from gaudi_calib.ranges.derive import name_served
from gaudi_calib.ranges.layer_types import find_layer_type, is_expert_matmul
from gaudi_calib.ranges.node import OPTIONAL_OUTPUTS, Op
from gaudi_calib.ranges.topology import Topology

_FILE_BYTES = 2**11  # what torch.save adds to the values of a small tensor, and a file system to that


@dataclass(frozen=True)
class SavedNode:
    """What is saved of a node.

    Attributes:
        channels: by name, `input0` or `output0`, how many values each token has.
        weight: values of the weight, 0 without one.
    """

    channels: Mapping[str, int]
    weight: int = 0


def plan_tensors(plan: ModelPlan, config: QuantConfig) -> dict[str, SavedNode]:
    """Return what is saved, by node, of those that `config` does not block."""
    nodes = {name: _plan_linear(plan, linear, config) for name, linear in plan.linears.items()}
    for name, experts in plan.experts.items():
        hidden = int(plan.checkpoint.config["hidden_size"])
        nodes[name] = SavedNode({"input0": hidden})
        children = (child for child in plan.node_names if is_expert_matmul(child) and child.startswith(f"{name}."))
        sizes = {"w13_list": 2 * experts.channels * hidden, "w2_list": experts.channels * hidden}
        nodes |= {child: SavedNode({}, sizes[child.split(".")[-2]]) for child in children}
    ops = {name: plan.ops.get(name, Op.LINEAR) for name in nodes}
    return {name: nodes[name] for name, op in ops.items() if not config.is_blocked(name, find_layer_type(name, op))}


def _plan_linear(plan: ModelPlan, linear: LinearPlan, config: QuantConfig) -> SavedNode:
    shapes = [plan.checkpoint.shapes[weight] for weight in linear.weights]
    rows, columns = sum(shape[0] for shape in shapes) + linear.padding, shapes[0][1]
    has_output = config.measures_outputs or linear.op not in OPTIONAL_OUTPUTS
    return SavedNode({"input0": columns} | ({"output0": rows} if has_output else {}), rows * columns)


def estimate_bytes(nodes: Iterable[SavedNode], prompts: Sequence[Sequence[int]], dtype: str) -> int:
    """Return what the files take on the disk, in bytes."""
    nodes, tokens = list(nodes), sum(map(len, prompts))
    values = sum(node.weight + tokens * sum(node.channels.values()) for node in nodes)
    files = sum((node.weight > 0) + len(prompts) * len(node.channels) for node in nodes)
    return values * getattr(torch, dtype).itemsize + files * _FILE_BYTES


def save_tensors(
    plan: ModelPlan,
    nodes: Mapping[str, SavedNode],
    prompts: Sequence[Sequence[int]],
    directory: Path,
    *,
    vllm: str | None = None,
    compute_dtype: str = "float32",
    batch_size: int = 32,
    on_progress: Callable[[float], None] = lambda tokens: None,
) -> None:
    """Run the model on `prompts` and write the tensors of `nodes` to `directory`.

    Args:
        prompts: token ids of each.
        vllm, compute_dtype, batch_size, on_progress: as for `measure_channels`.

    Raises:
        FileError: the disk is full, or `directory` cannot be written.
    """
    batches = make_batches(prompts, batch_size if can_pack(plan) else 1, MAX_BATCH_TOKENS)
    with torch.inference_mode():
        stream = Stream(plan, batches, dtype=getattr(torch, compute_dtype))
        saver = _Saver(stream, nodes, directory, vllm)
        saver.save_weights()
        on_progress(0.0)
        with ExitStack() as outer:
            for facts in plan.layout.outer:
                saver.watch_linear(stream.model, facts, facts.name, outer)
            for layer in stream.layers():
                with ExitStack() as stack:
                    saver.watch_layer(layer, stack)
                    for batch in batches:
                        saver.batch = batch
                        batch.hidden = layer.run(batch, batch.hidden)
                        on_progress(batch.tokens.numel() / len(plan.layers))
            for batch in batches:
                saver.batch = batch
                batch.hidden = stream.run_outer(batch, batch.hidden)
        saver.save_head()


class _Saver:
    """Saves what modules see while the model streams by.

    Attributes:
        batch: that runs now.
    """

    batch: Batch

    def __init__(self, stream: Stream, nodes: Mapping[str, SavedNode], directory: Path, vllm: str | None):
        self._stream, self._plan, self._nodes = stream, stream.plan, nodes
        self._directory, self._vllm = directory, vllm

    def save(self, node: str, tensor: str, x: torch.Tensor) -> None:
        """Save a tensor of the batch, shape (..., tokens, channels), prompt by prompt."""
        for offset, (start, stop) in enumerate(pairwise(self.batch.bounds)):
            self._write(f"{node}_{tensor}_iter{self.batch.first + offset}", x[..., start:stop, :])

    def save_weights(self) -> None:
        """Save the weights of all nodes, whole."""
        for name, node in self._nodes.items():
            if name in self._plan.linears:
                self._write(f"{name}_weight_iter0", self._plan.read_weight(name))
            elif node.weight:
                expert = self._plan.read_rank_weight(name, 0, Topology(1))
                self._write(f"{name}_weight_iter0", torch.from_numpy(expert))

    def save_head(self) -> None:
        """Save what the output projection sees, of batches that have come to it."""
        node = self._plan.layout.vllm_lm_head
        if node is None or node not in self._nodes:
            return
        weight = self._plan.read_weight(node).to(self._stream.dtype)
        for batch in self._stream.batches:
            self.batch = batch
            self.save(node, "input0", batch.hidden)
            if "output0" in self._nodes[node].channels:
                self.save(node, "output0", batch.hidden @ weight.T)

    def _write(self, name: str, x: torch.Tensor) -> None:
        buffer = io.BytesIO()
        torch.save(self._plan.served(x).clone(), buffer)  # a part of a tensor would be saved with all of it
        write_bytes(self._directory / f"{name_served(name, self._vllm)}.pt", buffer.getvalue())

    def watch_layer(self, layer: Layer, stack: ExitStack) -> None:
        """Save what the linear layers and the experts of a decoder layer see, until `stack` is closed."""
        layout = self._plan.layout
        for facts in layout.linears:
            self.watch_linear(layer.module, facts, self._plan.node_name(layer.index, facts.name), stack)
        node = self._plan.node_name(layer.index, layout.experts.name) if layout.experts else None
        if layout.experts is None or node not in self._plan.experts:
            return
        tokens = sum(batch.tokens.numel() for batch in self._stream.batches)
        experts = layer.module.get_submodule(layout.experts.module)
        weights, dtype, device = self._plan.experts[node], self._stream.dtype, self._stream.device
        sequences = Sequences()
        observed = ObservedExperts(weights, experts, (), dtype, device, tokens, sequences)

        def run(hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
            sequences.bounds = self.batch.bounds
            if node in self._nodes:
                self.save(node, "input0", hidden)
            return observed(hidden, index, routing)

        stack.callback(attach_experts(layer.module, layout.experts, run))

    def watch_linear(self, parent: nn.Module, facts: Linear, node: str, stack: ExitStack) -> None:
        """Save what a linear layer sees, and what it gives where that is wanted."""
        if node in self._nodes:
            modules = [parent.get_submodule(part) for part in facts.parts]
            handle = modules[0].register_forward_pre_hook(partial(self._save_linear, node, modules))
            stack.callback(handle.remove)

    def _save_linear(self, node: str, modules: Sequence[nn.Module], _: nn.Module, args: tuple[torch.Tensor]) -> None:
        x, linear = args[0], self._plan.linears[node]
        self.save(node, "input0", x)
        if "output0" in self._nodes[node].channels:
            rows = torch.cat([multiply(part, x, linear.split) for part in modules], dim=-1)
            order = self._plan.canonical_rows(linear)
            self.save(node, "output0", rows if order is None else rows[..., order])

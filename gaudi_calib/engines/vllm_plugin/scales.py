"""Scales of one rank's nodes: from its scale file, else computed from its ranges, as INC does."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from gaudi_calib.config.model import get_scales_device
from gaudi_calib.engines.observe.fp8_cast import quantize
from gaudi_calib.engines.observe.peak import max_magnitude
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.errors import FileError, RangeError
from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.bf16 import TINY
from gaudi_calib.ranges.node import Node, PerChannelWeight, RankSet, ScaleNode
from gaudi_calib.rankfiles.store import read_ranges, read_scales
from gaudi_calib.scales.compute import compute_scales
from gaudi_calib.scales.precision import PRECISIONS
from gaudi_calib.scales.tensor import scale_ranges

_ANY = np.ones(1, dtype=np.float32)


class ScaleSource:
    """The scales of the rank that this process is.

    Attributes:
        table: scale method of every node.
        device: the device that serves; its FP8 range applies.
    """

    def __init__(self, session: Session):
        self.session, self.device = session, session.device
        self.table = session.config.method_table

    @cached_property
    def rank(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        return self.session.find_rank()

    @property
    def is_dynamic(self) -> bool:
        """Whether activations get their scales from their values."""
        return self.session.config.dynamic_quantization

    def choose_name(self, *names: str) -> str:
        """Return the name that the files have, or the first; releases of vLLM differ."""
        if not self.session.config.uses_stats_files:
            return names[0]
        return next((name for name in names if name in self._scales or name in self._ranges), names[0])

    def find(
        self, stand_ins: Mapping[str, Node], weights: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, ScaleNode]:
        """Return the scales of some nodes.

        Args:
            stand_ins: nodes with as many inputs and outputs as are wanted; their ranges count only
                where the method needs no measurement.
            weights: this rank's weights of the nodes that have one, shape (out, in).

        Returns:
            Without the nodes that have no measurement, where `ignore_modules_wo_measures` says so.

        Raises:
            FileError: this rank has neither ranges nor scales.
            RangeError: a node has neither.
        """
        if not self.session.config.uses_stats_files:
            return self._compute(stand_ins, weights)
        stored = {name: self._scales[name] for name in stand_ins if name in self._scales}
        measured = {name: self._ranges[name] for name in stand_ins if name not in stored and name in self._ranges}
        missing = [name for name in stand_ins if name not in stored and name not in measured]
        if missing and not self.session.config.ignore_modules_wo_measures:
            raise self._unmeasured(missing[0])
        return {**stored, **(self._compute(measured, weights) if measured else {})}

    def scale_input(
        self,
        x: torch.Tensor,
        stored: float,
        node: str,
        layer_type: str | None,
        *,
        dim: int = -1,
        among: torch.Tensor | None = None,
    ) -> float | torch.Tensor:
        """Return the scale of an input of `node`: the `stored` one, or where the method is dynamic that of the values.

        Args:
            x: the values.
            layer_type: class of the node's module.
            dim: the dimension of `x` whose values share a scale where there is one per channel.
            among: what shares a scale where there is one per tensor; None: `x`.

        Returns:
            A number, or float32: of the shape of `x` but for `dim`, which is 1, or ().

        Source: INC `MaxAbsDynamicPts`, `MaxAbsDynamicPcs`, fp8_quant/_core/scale_methods/scales_method.py.
        """
        if not self.is_dynamic:
            return stored
        rule = self.table.for_node(node, layer_type).activation
        if rule.is_per_channel:
            largest = max_magnitude(x, dim).unsqueeze(dim)
        else:
            largest = max_magnitude(x if among is None else among)
        precision = PRECISIONS[self.session.config.hp_dtype]
        scales = scale_ranges(largest.float().cpu().numpy(), rule, self.device, precision)
        return torch.as_tensor(np.maximum(scales, np.float32(TINY)), device=x.device)

    def _compute(self, nodes: Mapping[str, Node], weights: Mapping[str, torch.Tensor]) -> dict[str, ScaleNode]:
        def read(name: str) -> np.ndarray:
            return weights[name].detach().float().cpu().numpy()

        device = get_scales_device(self.session.config, self.device)
        ranges, hp_dtype = RankSet(*self.rank, nodes), self.session.config.hp_dtype
        return dict(compute_scales(ranges, self.table, device, weights=read, hp_dtype=hp_dtype).nodes)

    @cached_property
    def _ranges(self) -> Mapping[str, Node]:
        path = self._find_file(None)
        return {} if path is None else read_ranges(path).nodes

    @cached_property
    def _scales(self) -> Mapping[str, ScaleNode]:
        path = None if self.session.config.recalc_scales else self._find_file(self.table.file_tag)
        if path is None and self._find_file(None) is None:
            raise self._no_files()
        return {} if path is None else read_scales(path).nodes

    def _find_file(self, method: str | None) -> Path | None:
        path = self.session.placed.name_file(*self.rank, method=method, extension="json")
        return path if path in self.session.placed.files else None

    def _no_files(self) -> FileError:
        rank, world = self.rank
        worlds = self.session.placed.worlds
        made = self.session.placed.advise(config=self.session.path).derive(world)
        return FileError(
            f"no ranges and no scales of rank {rank} of {world}",
            where=self.session.placed.name_file(rank, world, extension="json"),
            why=f"the directory holds ranges of world size {', '.join(map(str, worlds)) or 'none'}",
            fix="serve with a world size that is there" + (f"; or make the files: {made}" if made else ""),
        )

    def _unmeasured(self, name: str) -> RangeError:
        return RangeError(
            f"node {name!r} is to be quantized and was not measured",
            where=self.session.placed.name_file(*self.rank, extension="json"),
            why=f"{self.session.path.name} does not block it, and neither ranges nor scales have it",
            fix="measure with the same lists, add it to the blocklist, or set ignore_modules_wo_measures",
        )


def stand_in(inputs: int, outputs: int | None = None, weight: torch.Tensor | None = None) -> Node:
    """Return a node of this shape; its ranges mean nothing, but for the weight's."""
    largest = None if weight is None else max_magnitude(weight).float().cpu().numpy().reshape(1)
    return Node((_ANY,) * inputs, None if outputs is None else (_ANY,) * outputs, largest)


def quantize_weight(weight: torch.Tensor, scales: ScaleNode, device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the FP8 values of a weight, in its dtype and shape (out, in), and its scale: float32, (out,) or ()."""
    stored = scales.weight.out_channels if isinstance(scales.weight, PerChannelWeight) else scales.weight
    scale = torch.tensor(stored, dtype=torch.float32, device=weight.device).squeeze()
    return quantize(weight, scale.unsqueeze(-1), device), scale

"""INC's own scale calculators, run on a CPU for Gaudi 2 and Gaudi 3.

Nothing of INC is replaced but what needs the device: the FP8 cast (torch's, clamped to
the device's range), the move of weights to "hpu", and the candidates INC derives from
the accelerator it finds.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from gaudi_calib.fp8 import Device
from gaudi_calib.ranges.node import Node, Op, find_op

CLASS_OF_OP = {
    Op.LINEAR: "QKVParallelLinear",
    Op.ROW_PARALLEL_LINEAR: "RowParallelLinear",
    Op.MATMUL: "Matmul",
    Op.B2B_MATMUL: "B2BMatmul",
    Op.KV_CACHE: "VLLMKVCache",
    Op.SOFTMAX: "Softmax",
    Op.FUSED_SDPA: "ModuleFusedSDPA",
    Op.DYNAMIC_MOE: "VllmMixtureOfExpertsOp",
}


class IncScales:
    """INC for one device.

    Args:
        device: the device INC shall believe it computes for.
    """

    def __init__(self, device: Device, hp_dtype: torch.dtype = torch.bfloat16):
        from neural_compressor.torch.algorithms.fp8_quant._core import common, fp_utils
        from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods import (
            ops_quantizer,
            round_scales_function,
            scale_method_config,
            scale_method_parser,
            scales_method,
        )
        from neural_compressor.torch.algorithms.fp8_quant._quant_common.quant_config import ScaleFormat
        from neural_compressor.torch.algorithms.fp8_quant.model_configs import ModuleConfig
        from neural_compressor.torch.utils.auto_accelerator import INCAcceleratorType

        self.device, self.hp_dtype = device, hp_dtype
        self.common, self.fp_utils, self.ops_quantizer = common, fp_utils, ops_quantizer
        self.config, self.parser, self.ModuleConfig = scale_method_config, scale_method_parser, ModuleConfig
        self.roundings, self.scales_method = round_scales_function, scales_method
        self.inc_device = INCAcceleratorType[device.inc_name]
        self.hqt_config = SimpleNamespace(
            cfg={
                "mod_dict": {name: op.value for op, name in CLASS_OF_OP.items()},
                "device_for_scales": self.inc_device,
                "dynamic_quantization": False,
                "row_parallel_linear_allreduce_quantization": False,
                "scale_format": ScaleFormat.CONST,
                "use_qdq": False,
                "fake_quant": False,
            }
        )

    def parse(self, method: str | dict) -> Mapping[Any, Any]:
        """Return INC's method table of a `scale_method`, complete with params."""
        with self._on_device():
            if isinstance(method, str):
                table = self.parser.parse_scale_method(self.config.ScaleMethodString[method.upper()])
            else:
                table = self.parser.parse_scale_method(
                    self.parser.convert_scale_method_strings_to_enum(deepcopy(method))
                )
            self.parser.validate_and_populate_scale_method(table)
            return deepcopy(table)

    def find_rules(self, table: Mapping[Any, Any], name: str, layer_type: str) -> Any:
        """Return INC's pair of rules for a node."""
        return self.config.find_node_scale_method_config(table, name, layer_type)

    def round(self, scales: np.ndarray, rounding: str) -> np.ndarray:
        """Return scales (as float32, values of `hp_dtype`) rounded by INC's `POW2` or `HW_ALIGNED`."""
        by_name = {
            "POW2": self.roundings.ScaleToPow2(),
            "HW_ALIGNED": self.roundings.ScaleToHwAligned(self.inc_device),
        }
        return by_name[rounding].calc(torch.from_numpy(scales).to(self.hp_dtype)).float().numpy()

    def compute(
        self,
        nodes: Mapping[str, Node],
        method: str | dict,
        weights: Mapping[str, np.ndarray],
        *,
        as_on_cpu: bool = True,
    ) -> dict[str, dict[str, Any]]:
        """Return the scales of all nodes as INC writes them to JSON.

        Args:
            weights: float32 holding values of `hp_dtype`, shape (out, in), by node name.
            as_on_cpu: False: replace INC's division of a maximum by what a Gaudi makes of it.
        """
        table = self.parse(method)
        divide = self.scales_method.calc_scale_from_maxabs if as_on_cpu else _multiply_by_reciprocal
        arithmetic = mock.patch.object(self.scales_method, "calc_scale_from_maxabs", divide)
        with self._on_device(), arithmetic, torch.no_grad():
            return {name: self._compute(name, node, table, weights.get(name)) for name, node in nodes.items()}

    def scale_dynamically(self, x: torch.Tensor, method: str, dim: int) -> torch.Tensor:
        """Return the scales of an input's values `x` under dynamic quantization; one per channel are along `dim`."""
        from neural_compressor.torch.algorithms.fp8_quant._core.scale_methods import scale_method_factory, scales_method

        module = SimpleNamespace(__hqt_config__=self.hqt_config)
        params = {"hp_dtype": self.hp_dtype, "lp_dtype": torch.float8_e4m3fn}
        rules = self.find_rules(self.parse(method), "", "")
        with mock.patch.object(scales_method, "is_calc_scale_with_cguid", lambda: False):
            factory = scale_method_factory.ScaleMethodFactory(rules, params, module, "linear")
            calculator = factory.get_scale_method(scale_method_factory.QuantTensorName.INPUT, True, dim)
            return calculator.calc_scales(x, self.common.QuantTensorType.DYNAMIC)

    def _compute(self, name: str, node: Node, table: Mapping[Any, Any], weight: np.ndarray | None) -> dict[str, Any]:
        op = find_op(name, node)
        layer_type = CLASS_OF_OP[op]
        module = SimpleNamespace(__hqt_config__=self.hqt_config)
        if weight is not None:
            module.weight = torch.from_numpy(weight).to(self.hp_dtype)
        if op is Op.DYNAMIC_MOE:
            module.local_num_experts = len(node.outputs or ()) - 1
        measurement = self.ModuleConfig(
            tuple(_to_matrix(x) for x in node.inputs),
            (None,) if node.outputs is None else tuple(_to_matrix(x) for x in node.outputs),
            {},
        )
        params = {"hp_dtype": self.hp_dtype, "lp_dtype": torch.float8_e4m3fn}
        rules = self.find_rules(table, name, layer_type)
        quantizer = self.ops_quantizer.get_op_quantizer(rules, module, measurement, params, layer_type)
        scales = quantizer.get_scales_module_config()
        fields = self.common.format_functions_rec((torch.Tensor, list))(scales.__dict__)
        return {"inputs": list(fields["inputs"]), "outputs": list(fields["outputs"]), "params": fields["params"]}

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        mapping = self.config.scale_method_config_mapping
        rule = mapping[self.config.ScaleMethodString.MAXABS_HW_OPT_WEIGHT][self.config.CfgStr.WEIGHT]
        cast = functools.partial(_cast_to_fp8, limit=self.device.fullscale)
        with (
            mock.patch.dict(rule.params, weight_scales=self.fp_utils.FP8_143_SCALES[self.inc_device]),
            mock.patch.object(self.fp_utils, "cast_to_fp8_fcn", cast),
            mock.patch.object(torch.Tensor, "to", _to_without_hpu(torch.Tensor.to)),
        ):
            yield


def _to_matrix(channel_ranges: np.ndarray) -> np.ndarray:
    return channel_ranges.reshape(-1, 1).astype(np.float32)


def _multiply_by_reciprocal(maximum: torch.Tensor, fullscale: float, backoff: float = 1) -> torch.Tensor:
    return maximum * (torch.ones((), dtype=maximum.dtype) / (fullscale * backoff))


def _cast_to_fp8(x: torch.Tensor, dtype: torch.dtype, scale_inv: Any = None, *, limit: float) -> torch.Tensor:
    assert scale_inv is None
    return x.clamp(-limit, limit).to(dtype)


def _to_without_hpu(to: Any) -> Any:
    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor if args == ("hpu",) else to(tensor, *args, **kwargs)

    return move

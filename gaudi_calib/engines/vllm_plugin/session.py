"""What the observed or quantized modules of one vLLM process have in common."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gaudi_calib.config.file import read_quant_config
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, FileError, TopologyError
from gaudi_calib.fp8 import Device
from gaudi_calib.layout import MANIFEST_NAME


@dataclass
class Session:
    """One QUANT_CONFIG in use. Travels to worker processes, so it holds only plain values until one asks.

    Attributes:
        config: what QUANT_CONFIG says.
        path: the file it was read from.
    """

    config: QuantConfig
    path: Path
    _is_live: bool = field(default=False, repr=False)

    @classmethod
    def from_environment(cls) -> "Session":
        """Read the file that QUANT_CONFIG names.

        Raises:
            ConfigError: QUANT_CONFIG is not set, unreadable or invalid, or asks for something only
                a Gaudi can do, or the device is not known.
            FileError: it quantizes, and there are neither ranges nor scales.
        """
        name = os.environ.get("QUANT_CONFIG")
        if not name:
            raise ConfigError(
                "QUANT_CONFIG is not set",
                where="environment",
                why="quantization gaudi_fp8 does what that file says",
                fix="set QUANT_CONFIG to maxabs_measure_<device>.json or maxabs_quant_<device>.json of a run",
            )
        path = Path(name).resolve()
        config = read_quant_config(path)
        _check_support(config, path)
        session = cls(config, path)
        placed = session.placed
        if placed.device is None:
            raise ConfigError(
                "it is not known which Gaudi will serve",
                where=path,
                why=f"{placed.path} is neither called g2 nor g3 and has no {MANIFEST_NAME}",
                fix="keep the layout OUT/<model>/<device>/, so that dump_stats_path names the device",
            )
        if not session.measures and config.uses_stats_files and not placed.files:
            raise FileError(
                "no ranges and no scales",
                where=placed.path,
                why=f"dump_stats_path of {path.name} points there",
                fix="calibrate the model, or correct dump_stats_path",
            )
        return session

    @property
    def measures(self) -> bool:
        return self.config.mode == "MEASURE"

    @cached_property
    def placed(self) -> CalibrationDir:
        """Where rank files are."""
        return CalibrationDir.named_by(self.config, self.path)

    @property
    def device(self) -> Device:
        """The Gaudi that will serve."""
        assert self.placed.device is not None
        return self.placed.device

    def is_live(self) -> bool:
        """Whether the pass now running is one of a request, not one of vLLM's own before it serves.

        vLLM runs made-up tokens to warm up, without metadata for attention. The output
        projection runs after a pass; it belongs to the pass before.
        """
        from vllm.forward_context import get_forward_context, is_forward_context_available

        if is_forward_context_available():
            self._is_live = get_forward_context().attn_metadata is not None
        return self._is_live

    def find_rank(self) -> tuple[int, int]:
        """Return this process's rank and the number of ranks.

        Raises:
            TopologyError: ranks share the model in another way than by tensor or expert parallelism.
        """
        from vllm.distributed import get_dp_group, get_pp_group, get_tp_group

        for group, flag in ((get_pp_group(), "--pipeline-parallel-size"), (get_dp_group(), "--data-parallel-size")):
            if group.world_size > 1:
                raise TopologyError(
                    f"{flag} {group.world_size} is not supported by quantization gaudi_fp8",
                    where=self.path,
                    why="rank files are those of tensor- or expert-parallel ranks",
                    fix=f"leave {flag} out and use --tensor-parallel-size",
                )
        return get_tp_group().rank_in_group, get_tp_group().world_size


def _check_support(config: QuantConfig, path: Path) -> None:
    if config.observer != "maxabs" or config.fp8_config != "E4M3":
        what = f"observer {config.observer}" if config.observer != "maxabs" else f"fp8_config {config.fp8_config}"
        raise ConfigError(
            f"{what} is not supported by quantization gaudi_fp8", where=path, fix="use observer maxabs and E4M3"
        )
    if config.mode == "MEASURE" and config.measures_outputs:
        raise ConfigError(
            f"measure_exclude {config.measure_exclude} is not supported by quantization gaudi_fp8",
            where=path,
            why="it measures only the outputs that scales are computed from",
            fix="leave measure_exclude out, or measure with --engine torch",
        )

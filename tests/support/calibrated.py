"""A calibration of a tiny model, to serve from."""

from dataclasses import dataclass, replace
from pathlib import Path

from gaudi_calib.engines.detect import Platform
from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.runs.calibrate import RunOptions, calibrate
from gaudi_calib.serve.command import ServeCommand, ServeOptions, plan_serve
from tests.support import paths
from tests.support.files import write_prompts

MODEL = paths.GOLDEN / "llama-tiny" / "model"
HPU2, HPU3, CPU = Platform("hpu", GAUDI2), Platform("hpu", GAUDI3), Platform("cpu")


@dataclass
class Calibrated:
    """A run of worlds 1 and 2 for both devices, which a test may damage."""

    root: Path
    model: Path

    def config(self, device: str) -> Path:
        """Return the QUANT_CONFIG that serves on `device`."""
        return self.root / f"maxabs_quant_{device}.json"

    def plan(self, files: str = "g3", platform: Platform = HPU3, **changes) -> ServeCommand:
        """Return how to serve with the files of device `files`."""
        return plan_serve(replace(ServeOptions(str(self.model), self.config(files)), **changes), platform)


def calibrate_by_torch(model: Path, out: Path, **changes) -> Calibrated:
    """Calibrate `model` into `out` with the torch engine.

    Args:
        changes: of `RunOptions`.
    """
    dataset = {"dataset": str(write_prompts(out))}
    result = calibrate(RunOptions(str(model), out, dataset, world=2, unified_world=1, engine="torch", **changes))
    return Calibrated(result.root, model)

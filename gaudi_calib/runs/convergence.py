"""What a run says about ranges that its data has not settled."""

import logging
from dataclasses import replace

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import Finding
from gaudi_calib.ranges.convergence import Convergence
from gaudi_calib.ranges.derive import name_served
from gaudi_calib.rankfiles.convergence_file import read_convergence
from gaudi_calib.runs.limits import describe_finding
from gaudi_calib.runs.recipe import Recipe
from gaudi_calib.runs.run import Run
from gaudi_calib.scales.convergence import find_unsettled

_log = logging.getLogger(__name__)


def find_unsettled_dir(placed: CalibrationDir) -> list[Finding]:
    """Return what is to be said of the ranges in a directory; see `find_unsettled`.

    Nothing where nobody knows: the vLLM engine and a merge do not record how ranges came about; without a manifest
    nothing tells whether a record is of these ranges, and without a device and a QUANTIZE config nothing tells what
    a move means for scales. A record of another measurement is passed over.

    Raises:
        FileError: the record is damaged. ConfigError: the config is invalid.
    """
    device, config = placed.device, placed.quant_config
    if not placed.convergence_file.is_file() or device is None or config is None or placed.manifest is None:
        return []
    convergence, measurement = read_convergence(placed.convergence_file)
    if measurement != placed.measurement:
        _log.warning("%s is of another measurement than %s, and is passed over", placed.convergence_file, placed.path)
        return []
    return _find(convergence, Recipe(config, device), placed.manifest.vllm)


def warn_of_convergence(run: Run) -> None:
    """Warn of ranges that the data has not settled; of each finding once, whatever the number of devices."""
    assert run.convergence is not None
    told: dict[str, None] = {}
    for target in run.targets:
        found = _find(run.convergence, target.recipe, target.record.manifest.vllm)
        told |= dict.fromkeys(map(describe_finding, found))
    for text in told:
        run.warn(text)


def _find(convergence: Convergence, recipe: Recipe, vllm: str | None) -> list[Finding]:
    nodes = {name_served(name, vllm): parts for name, parts in convergence.nodes.items()}
    return find_unsettled(replace(convergence, nodes=nodes), recipe.config, recipe.scales_device)

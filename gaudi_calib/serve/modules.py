"""Whether the lists of a QUANT_CONFIG, the modules of the model and the nodes in the files go together."""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gaudi_calib.config.model import find_idle_patterns
from gaudi_calib.errors import CalibrationError, FileError
from gaudi_calib.gaps import describe_gap, find_uncovered, read_names, refuse_uncovered, require_dynamic
from gaudi_calib.models.field import list_idle
from gaudi_calib.models.source import ModelSource
from gaudi_calib.ranges.layer_types import find_layer_type
from gaudi_calib.ranges.node import Op
from gaudi_calib.serve.calibration import Calibration, advise

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan

_log = logging.getLogger(__name__)


def inspect_modules(calibration: Calibration, model: ModelSource, world: int) -> tuple[str, ...]:
    """Check the config's lists against the modules of the model and those in the files, where they are known.

    Returns:
        A sentence for every pattern that matches no module, and for files of unknown origin one for
        modules that have no ranges or scales.

    Raises:
        ConfigError: a module that INC will quantize has no ranges, or cannot be scaled while serving.
        FileError: it has no scales.
    """
    plan = _plan_model(calibration, model)
    if plan is None:
        return ()
    require_dynamic(calibration.config, plan.ops, plan.layout, calibration.path)
    config, found = calibration.config, []
    nodes = [*plan.node_names, *calibration.list_modules(world)]
    made = calibration.placed.manifest
    for finding in find_idle_patterns(config, nodes, list_idle(made.preset.name if made else "")):
        found.append(f"{finding.what} ({finding.where} in {calibration.path})")
    if all(config.is_blocked(name, find_layer_type(name, op)) for name, op in plan.ops.items()):
        found.append(f"the lists in {calibration.path} leave no module to quantize: all is served in {config.dtype}")
    if config.uses_stats_files and not config.ignore_modules_wo_measures:
        found += _find_uncovered(calibration, model, world, plan.ops)
    return tuple(found)


def _plan_model(calibration: Calibration, model: ModelSource) -> "ModelPlan | None":
    if model.directory is None:
        return None
    from gaudi_calib.checkpoints.plan import plan_model

    try:
        return plan_model(model.directory, calibration.config.dtype)
    except CalibrationError as error:  # for example of a family that nobody described
        _log.warning("What the files should hold is not checked: %s", error.what)
        return None


def _find_uncovered(calibration: Calibration, model: ModelSource, world: int, ops: Mapping[str, Op]) -> Iterator[str]:
    placed, config, tag = calibration.placed, calibration.config, calibration.config.method_table.file_tag
    modules, measured_with = calibration.list_modules(world), placed.measured_with or placed.measure_config
    for method, what in ((None, "ranges"), (tag, "scales")):
        for rank in range(world):
            names = read_names(placed, rank, world, method)
            uncovered = find_uncovered(ops, config, names, modules=modules, measured_with=measured_with)
            if not uncovered:
                continue
            if placed.manifest is None:
                yield f"{len(uncovered)} modules have no {what} on rank {rank}, the first is {uncovered[0]}"
                break
            if method is None:
                raise refuse_uncovered(placed, uncovered, calibration.path, world)
            raise FileError(
                describe_gap(uncovered, what),
                where=placed.name_file(rank, world, method=method),
                why=f"{calibration.path.name} blocks less than the config that the scales were computed with",
                fix=advise(calibration, model).compute_scales(world) or "compute the scales again",
            )

"""`gaudi-calib quantize DIR`: the scales of any directory of ranges, a run's or one that INC wrote on a Gaudi."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.config.methods import DEFAULT_METHOD, get_scale_method
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import IdleExpertError, TopologyError, UsageError
from gaudi_calib.files import expand_path
from gaudi_calib.fp8 import DEVICES, Device
from gaudi_calib.moved import is_same_place, warn_of_move
from gaudi_calib.ranges.experts import list_idle_experts
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import tabulate_ranges
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.ranges.unify import gather_world
from gaudi_calib.runs.configs import require_quantizing
from gaudi_calib.runs.conversion import write_files
from gaudi_calib.runs.limits import describe_limits
from gaudi_calib.runs.recipe import OpenWeights, Recipe, open_weights
from gaudi_calib.runs.sharing import find_evidence, settle_expert_parallel

if TYPE_CHECKING:
    from gaudi_calib.checkpoints.plan import ModelPlan
    from gaudi_calib.config.model import QuantConfig

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scaling:
    """What is asked for; None where the directory tells, or nothing is asked for.

    Attributes:
        method: a published scale method, in any case; None: as the QUANTIZE config says, else maxabs_hw.
        quant_config: QUANT_CONFIG file in place of the run's own.
        device: name of the device that will serve.
        world: ranks whose scales are computed; None: of every world.
        model: directory or hub name of the checkpoint, where scales come from the weights.
        expert_parallel: whether ranks hold whole experts.
        dump: first part of the names of the measurement, where the directory holds several.
        allows_idle: see `compute_scales`.
    """

    method: str | None = None
    quant_config: Path | None = None
    device: str | None = None
    world: int | None = None
    model: str | None = None
    expert_parallel: bool | None = None
    dump: str | None = None
    allows_idle: bool = False


@dataclass(frozen=True)
class Quantized:
    """What `quantize_dir` left behind.

    Attributes:
        files: those written.
        method: in upper case, as in their names.
        device: name of the device they are for.
        ranks: ranks that have scales now, by world.
        quant_config: the run's QUANTIZE config, which names the directory; None where there is none.
    """

    files: tuple[Path, ...]
    method: str
    device: str
    ranks: Mapping[int, tuple[int, ...]]
    quant_config: Path | None


def quantize_dir(directory: Path, out: Path | None = None, scaling: Scaling | None = None) -> Quantized:
    """Compute scales of the ranges in `directory`, and write them.

    Ranks that are not there are warned of: those of the others do not depend on them.

    Args:
        out: where ranges and scales go; None or `directory` itself: scales go beside the ranges, with what the
            ranges lack of their `.npz` and `.json`.

    Raises:
        FileError: no ranges, or a file is malformed; UsageError: nothing tells the device, or scales come from the
            weights and no checkpoint is given; RangeError: a range gives no usable scale.
            Nothing is written in any of these cases.
    """
    directory, scaling = expand_path(directory), scaling or Scaling()
    source, out = CalibrationDir(directory, dump=scaling.dump), expand_path(out or directory)
    worlds = [scaling.world] if scaling.world else list(source.require_worlds())
    recipe = _choose_recipe(source, scaling)
    warn_of_move(source)
    ranges = {world: source.read_present(world) for world in worlds}
    for world, ranks in ranges.items():
        _warn_of_missing(world, ranks)
    chosen = {world: recipe.select(ranks) for world, ranks in ranges.items()}
    for text in describe_limits([rank_set for ranks in chosen.values() for rank_set in ranks], recipe):
        _log.warning("%s", text)
    plan = _plan_weights(source, scaling, recipe)
    scales = [(recipe, _compute(source, ranks, recipe, plan, scaling)) for ranks in chosen.values()]
    _warn_of_idle(chosen)
    whole = [rank_set for ranks in ranges.values() for rank_set in ranks]
    files = write_files(source, out, whole, scales, keeps_ranges=is_same_place(source.path, out))
    present = {world: tuple(rank_set.rank for rank_set in ranks) for world, ranks in ranges.items()}
    return Quantized(tuple(files), recipe.tag, recipe.device.name, present, CalibrationDir(out).quant_path)


def _choose_recipe(source: CalibrationDir, scaling: Scaling) -> Recipe:
    """Return how scales are computed: the config's method, backoffs and lists, unless another method is asked for."""
    device, config = _require_device(source, scaling.device), _choose_config(source, scaling)
    if config is None:
        recipe = Recipe.of_method(get_scale_method(scaling.method or DEFAULT_METHOD).name, source, device)
    else:
        recipe = Recipe(_change_method(config, scaling.method, source.quant_path), device)
    if not any(method.needs_measurement for method in recipe.table.methods) or not recipe.config.uses_stats_files:
        raise UsageError(
            f"{recipe.tag.lower()} has no scale files",
            where=source.path,
            why="INC knows such scales without a measurement, or computes them when serving",
            fix="name it as scale_method in the QUANT_CONFIG, which is all it needs; or choose another --scale-method",
        )
    recipe.require_possible()
    return recipe


def _require_device(source: CalibrationDir, asked: str | None) -> Device:
    device = source.settle_device(asked)
    if device is None:
        raise UsageError(
            "it is not known which device will serve",
            where=source.path,
            why="FP8 range and free scales differ between the devices; neither a manifest nor the directory's name "
            "tells which it is",
            fix=f"give --device {' or --device '.join(DEVICES)}",
        )
    return device


def _choose_config(source: CalibrationDir, scaling: Scaling) -> "QuantConfig | None":
    if scaling.method and scaling.quant_config:
        raise UsageError("--scale-method and --config-quant both name the scale method", fix="give one of them")
    if scaling.quant_config:
        from gaudi_calib.config.file import read_quant_config

        return require_quantizing(read_quant_config(scaling.quant_config), scaling.quant_config)
    return require_quantizing(source.quant_config, source.quant_path) if source.quant_config else None


def _change_method(config: "QuantConfig", method: str | None, path: Path | None) -> "QuantConfig":
    """Return `config`, of the file `path`, with another scale method, if one is given, and all else as it is."""
    from gaudi_calib.config.check import parse_quant_config
    from gaudi_calib.config.model import to_content

    own = config.method_table.file_tag
    tag = get_scale_method(method).name if method else own
    if tag == own:
        return config
    _log.warning(
        "%s serves with %s: to have INC use the scales of %s, make that its scale_method",
        path, own.lower(), tag.lower(),
    )  # fmt: skip
    content = {**to_content(config), "scale_method": tag, "dynamic_quantization": False}
    return parse_quant_config(content, where=f"--scale-method {method}")


def _warn_of_missing(world: int, ranks: Sequence[RankSet[Node]]) -> None:
    present = {rank_set.rank for rank_set in ranks}
    missing = [str(rank) for rank in range(world) if rank not in present]
    if missing:
        _log.warning(
            "no ranges of rank %s of %d: the others get scales, and %d cards cannot serve without all of them",
            ", ".join(missing), world, world,
        )  # fmt: skip


def _plan_weights(source: CalibrationDir, scaling: Scaling, recipe: Recipe) -> "ModelPlan | None":
    """Return where the weights are, if a checkpoint is given.

    Raises:
        UsageError: it is needed and not given. ModelError: it is not the one that was measured.
    """
    if scaling.model is None:
        if recipe.table.needs_weights:
            measured = source.advise().model
            raise UsageError(
                f"{recipe.tag.lower()} takes scales from the weights",
                where=source.path,
                why="the ranges of weights are not enough for a scale per channel, or for the best of several",
                fix=f"give the checkpoint that was measured: -m {measured}; or choose a method such as maxabs_hw",
            )
        return None
    from gaudi_calib.checkpoints.plan import plan_model
    from gaudi_calib.models.source import download_model
    from gaudi_calib.runs.facts import describe_model, require_same_model

    made = source.manifest
    plan = plan_model(download_model(scaling.model), recipe.config.dtype, made.vllm if made else None)
    require_same_model(source, describe_model(scaling.model, plan))
    return plan


def _compute(
    source: CalibrationDir,
    ranks: Sequence[RankSet[Node]],
    recipe: Recipe,
    plan: "ModelPlan | None",
    scaling: Scaling,
) -> list[RankSet[ScaleNode]]:
    weights = _open_weights(source, ranks, plan, scaling.expert_parallel) if plan else None
    try:
        return list(recipe.compute(ranks, weights, allows_idle=scaling.allows_idle))
    except IdleExpertError as error:
        raise error.with_fix(f"{error.fix}; or give --allow-idle-experts, which writes 0 as INC does") from error


def _open_weights(
    source: CalibrationDir, ranks: Sequence[RankSet[Node]], plan: "ModelPlan", expert_parallel: bool | None
) -> OpenWeights:
    """Return what reads the weights of a rank, sliced as the ranks share them."""
    world = gather_world(ranks)
    evidence = find_evidence(source, world, plan.checkpoint.directory)
    topology = Topology(ranks[0].world, ranks[0].world > 1 and settle_expert_parallel(world, expert_parallel, evidence))
    plan.require_topology(topology)
    return open_weights(plan, topology)


def _warn_of_idle(chosen: Mapping[int, Sequence[RankSet[Node]]]) -> None:
    """Warn of experts that have a scale and never saw what it is for."""
    for world, ranks in chosen.items():
        idle: list[tuple[int, str, int]] = []
        for rank_set in ranks:
            with suppress(TopologyError):  # scales do not depend on which experts belong together
                idle += [(rank_set.rank, *expert) for expert in list_idle_experts(tabulate_ranges(rank_set.nodes))]
        if idle:
            rank, op, expert = idle[0]
            _log.warning(
                "experts of %d ranks that saw no token: %d (expert %d of %s on rank %d): what the router sends to one "
                "when serving is lost; measure with more data",
                world, len(idle), expert, op, rank,
            )  # fmt: skip

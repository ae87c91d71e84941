"""Scales of a world that was made from another: computed anew from its ranges, by the source's method."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gaudi_calib.config.methods import SCALE_METHODS, MethodTable
from gaudi_calib.errors import FileError, UsageError
from gaudi_calib.files import read_json
from gaudi_calib.fp8 import DEVICES, Device, get_device
from gaudi_calib.layout import MANIFEST_NAME, RankFile, parse_rank_file
from gaudi_calib.ranges.node import Node, RankSet, ScaleNode
from gaudi_calib.ranges.table import Inventory, RangeTable, tabulate_ranges
from gaudi_calib.rankfiles.store import list_worlds
from gaudi_calib.scales.compute import compute_scales

_log = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """How the scale files of one method are made.

    Attributes:
        tag: the method in their names, upper case.
        table: the method of every node.
        device: the device whose scales these are.
        settings: as a manifest records them (`describe_scaling`).
    """

    tag: str
    table: MethodTable
    device: Device
    settings: dict[str, Any]


def find_methods(directory: Path, world: int) -> list[str]:
    """Return the methods, in upper case, that `directory` holds scale files of `world` for."""
    files = [parse_rank_file(path.name) for path in directory.iterdir()]
    return sorted({one.method for one in files if one and one.method and (one.world or 1) == world})


def find_recipe(directory: Path, tag: str, device: str | None = None) -> Recipe | None:
    """Tell how the scales of method `tag` in `directory` are computed, from its surroundings.

    The device is that of the manifest, else the directory's name, else `device`. Backoffs and
    overrides come from `../maxabs_quant_<device>.json` where its method is `tag`.

    Returns:
        None where that is not possible, after a warning that says what to run.

    Raises:
        UsageError: `device` contradicts the manifest or the directory.
        ConfigError: the config is invalid.
    """
    known = _find_device(directory, device)
    command = f"`gaudi-calib quantize -m MODEL -o OUT -t N --device {known or 'g2|g3'} --scale-method {tag.lower()}`"
    if known is None or tag not in SCALE_METHODS:
        why = "nothing says which device will serve (--device does)" if known is None else "the method is not known"
        _log.warning("No scales of %s: %s. Afterwards run %s.", tag, why, command)
        return None
    recipe = _read_recipe(directory.resolve().parent / f"maxabs_quant_{known}.json", tag, get_device(known))
    if any(method.weight.is_per_channel or method.weight.scale_value_type == "OPT" for method in recipe.table.methods):
        _log.warning("No scales of %s: they need the weights. Afterwards run %s.", tag, command)
        return None
    return recipe


def read_scaled_names(directory: Path, world: int, tag: str, ranks: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Return the names of the nodes that have scales on some `ranks`.

    Raises:
        FileError: a file of one of these ranks is malformed, or that of any rank is missing.
    """
    files = list_worlds(directory, tag).get(world, {})
    missing = [rank for rank in range(world) if rank not in files]
    if missing:
        raise FileError(
            f"no {tag} scales of rank {missing[0]} of {world}",
            where=directory / RankFile(method=tag, rank=missing[0], world=world).name,
            why="other ranks have scales of this method",
            fix="restore the file, delete the other ranks' scales, or leave scales out with --skip-scales",
        )
    named = {}
    for rank in ranks:
        content = read_json(files[rank])
        if not isinstance(content, dict) or not isinstance(content.get("Nodes"), dict):
            raise FileError(
                f"{files[rank].name} has no Nodes",
                where=files[rank],
                fix="restore the file, or leave scales out with --skip-scales",
            )
        named[rank] = tuple(content["Nodes"])
    return named


def recompute_scales(
    ranks: Sequence[RankSet[Node]], recipe: Recipe, names: Sequence[tuple[str, ...]]
) -> list[RankSet[ScaleNode]]:
    """Return the scales of `ranks`.

    Args:
        names: by rank, the nodes that get scales.

    Raises:
        RangeError: a range gives no usable scale, or there is none for a name.
    """
    solved: dict[tuple[int, tuple[str, ...]], RankSet[ScaleNode]] = {}
    scales = []
    for rank_set, chosen in zip(ranks, names, strict=True):
        table = tabulate_ranges(rank_set.nodes)
        key = (id(table.numbers), chosen)
        if key not in solved:
            picked = replace(rank_set, nodes=_pick_nodes(table, chosen))
            solved[key] = compute_scales(picked, recipe.table, recipe.device, weights=lambda _: None)
        scales.append(replace(solved[key], rank=rank_set.rank, dump=rank_set.dump))
    return scales


def _pick_nodes(table: RangeTable, names: tuple[str, ...]) -> RangeTable:
    inventory = table.inventory
    if names == inventory.names:
        return table
    chosen = set(names)
    places = np.array([place for place, name in enumerate(inventory.names) if name in chosen], dtype=np.int64)
    if len(places) < len(chosen):
        lost = next(name for name in names if name not in inventory.index)
        raise FileError(
            f"node {lost!r} has scales and no ranges",
            where=lost,
            why="the scale files are not of these ranges",
            fix="delete the scale files, or leave scales out with --skip-scales",
        )
    kept = np.zeros(len(inventory.names), dtype=bool)
    kept[places] = True
    smaller = Inventory([inventory.names[i] for i in places.tolist()], [inventory.shapes[i] for i in places.tolist()])
    return RangeTable(smaller, table.numbers[np.repeat(kept, inventory.sizes)])


def _find_device(directory: Path, device: str | None) -> str | None:
    known = directory.resolve().name if directory.resolve().name in DEVICES else None
    where: Path = directory
    if (directory / MANIFEST_NAME).is_file():
        from gaudi_calib.manifest import read_manifest

        manifest = read_manifest(directory / MANIFEST_NAME).good
        if manifest is not None and manifest.device is not None:
            known, where = manifest.device, directory / MANIFEST_NAME
    if known and device and device != known:
        raise UsageError(
            f"--device {device} contradicts the directory, which is of {known}",
            where=where,
            fix="leave --device out, or give the directory of that device",
        )
    return known or device


def _read_recipe(path: Path, tag: str, device: Device) -> Recipe:
    if path.is_file():
        from gaudi_calib.config.file import read_quant_config
        from gaudi_calib.config.model import describe_scaling, get_scales_device

        config = read_quant_config(path)
        table = config.method_table
        if table.file_tag == tag:
            return Recipe(tag, table, get_scales_device(config, device), describe_scaling(config, device))
    settings = {"device": device.name, "scale_method": tag.lower(), "fp8_config": "E4M3", "hp_dtype": "bf16"}
    return Recipe(tag, MethodTable(SCALE_METHODS[tag]), device, settings)

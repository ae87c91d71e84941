"""Modules that INC quantizes and cannot: those that the files lack, and those that cannot be scaled while serving."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError
from gaudi_calib.models.modules import Layout
from gaudi_calib.ranges.experts import name_old
from gaudi_calib.ranges.idle import find_idle
from gaudi_calib.ranges.layer_types import find_layer_type
from gaudi_calib.ranges.node import Op
from gaudi_calib.rankfiles.store import read_node_names, read_stored_names

if TYPE_CHECKING:
    from gaudi_calib.config.model import QuantConfig


def find_uncovered(
    ops: Mapping[str, Op],
    config: "QuantConfig",
    covered: Collection[str],
    *,
    modules: Collection[str],
    measured_with: "QuantConfig | None",
) -> list[str]:
    """Return the modules that INC quantizes with `config`, that run, and that a rank's file lacks.

    Args:
        ops: what each module of the model computes, by name.
        covered: names in the file.
        modules: those that INC patched when it measured.
        measured_with: the MEASURE config, where it is known: what it did not block, and INC did not patch
            then, INC never patches.
    """
    named = set(map(name_old, [*covered, *find_idle(modules, covered)]))
    patched = set(map(name_old, modules))

    def is_served(name: str, op: Op) -> bool:
        layer_type = find_layer_type(name, op)
        if config.is_blocked(name, layer_type):
            return False
        return measured_with is None or name_old(name) in patched or measured_with.is_blocked(name, layer_type)

    return [name for name, op in ops.items() if name_old(name) not in named and is_served(name, op)]


def read_names(placed: CalibrationDir, rank: int, world: int, method: str | None = None) -> tuple[str, ...]:
    """Return the names of the nodes in a rank's `.npz`: of ranges, or of scales of `method`.

    Raises:
        FileError: it is missing or malformed, or not the file that the run wrote.
    """
    npz = placed.name_file(rank, world, method=method)
    text = npz.with_suffix(".json")
    placed.require_recorded([npz, text])
    # Where both were recorded they hold the same, and the text is read faster.
    is_recorded = placed.manifest is not None and text.name in placed.manifest.files and text in placed.files
    return read_node_names(text) if is_recorded else read_stored_names(npz)


def describe_gap(names: Sequence[str], what: str) -> str:
    """Return the sentence about modules that lack `what`, ranges or scales."""
    more = f" (nor have {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]} is not blocked and has no {what}{more}"


def refuse_uncovered(
    placed: CalibrationDir, names: Sequence[str], config_path: Path, world: int, anew: str | None = None
) -> ConfigError:
    """Return the error about modules without ranges.

    Args:
        names: the modules.
        config_path: file of the config that quantizes them.
        anew: what measures them, too, where the run in place was made with other settings than are asked for.
    """
    path = placed.layout and placed.layout.measure_config
    measuring = path if path and path.is_file() else "the MEASURE config"
    again = placed.advise(config=config_path).derive(world) if placed.channel_file.is_file() else None
    return ConfigError(
        describe_gap(names, "ranges"),
        where=config_path,
        why="INC fails where a module runs that it should quantize and has no ranges for",
        fix=f"measure again: {anew}"
        if anew
        else f"block them in {config_path}; or unblock them in {measuring}, then "
        + (f"run: {again}" if again else "measure again"),
    )


def require_dynamic(config: "QuantConfig", ops: Mapping[str, Op], layout: Layout, path: Path) -> None:
    """Raise ConfigError where `config`, of the file `path`, has a module scaled while serving that cannot be.

    Args:
        ops: what each module of the model computes, by name.

    Source: vllm-gaudi `HPUMLAAttention.forward_impl`, `HPUModelRunner.initialize_kv_cache`; INC
    `PatchedVLLMKVCache.forward_quant_dynamic`, `QuantizedHpuDynamicMoeFusedWeightsBias`.
    """
    reasons = {}
    if config.dynamic_quantization and layout.attention.latent:
        reasons[Op.KV_CACHE] = "vllm-gaudi keeps no scales beside a latent cache: what is read from it comes unscaled"
    if config.dynamic_quantization and layout.experts and layout.experts.biased:
        reasons[Op.DYNAMIC_MOE] = "INC scales no experts with biases while serving, and stops"
    for name, op in ops.items():
        layer_type = find_layer_type(name, op)
        if op in reasons and not config.is_blocked(name, layer_type):
            raise ConfigError(
                f"{name} cannot be scaled while serving",
                where=f"dynamic_quantization in {path}",
                why=reasons[op],
                fix=f'add "{layer_type}" to blocklist.types, or choose a static method such as maxabs_hw',
            )

"""`gaudi-calib diff`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gaudi_calib.cli.options import PathType, device_option, dump_option, experts_option, json_option, world_option
from gaudi_calib.cli.pipeline import format_table
from gaudi_calib.cli.sections import command, option

if TYPE_CHECKING:
    from gaudi_calib.runs.diff import Difference
    from gaudi_calib.scales.compare import Change

_SHOWN = 10
_PATH = PathType(exists=True)


@command(epilog="Example: gaudi-calib diff yesterday/llama/g3 today/llama/g3")
@click.argument("left", type=_PATH, metavar="A")
@click.argument("right", type=_PATH, metavar="B")
@world_option("Ranks to compare at; others are unified.  [the largest number that both sides give]", default=None)
@experts_option(found="found out")
@device_option("Compare this device only; of directories that do not tell, their device.")
@option(
    "--fail-on",
    type=click.Choice(["scales", "ranges", "clipped", "nothing"]),
    default="scales",
    help="What makes the exit code 1: what is served differs (nodes, scales, config); or a range as well; or A's "
    "scales clip what B measured.",
)
@dump_option
@json_option
def diff(
    left: Path,
    right: Path,
    world: int | None,
    device: str | None,
    expert_parallel: bool | None,
    fail_on: str,
    dump: str | None,
    as_json: bool,
) -> int:
    """Tell what changed between two calibrations of one model.

    A and B are runs, device directories, any directories of ranges, or QUANT_CONFIG files. Of
    different numbers of ranks both are brought to one that each can be unified to.
    """
    from gaudi_calib.runs.conversion import Conversion
    from gaudi_calib.runs.diff import diff_paths

    options = Conversion(expert_parallel=expert_parallel, dump=dump)
    found = diff_paths(left, right, world=world, device=device, options=options)
    if as_json:
        click.echo(json.dumps([_to_json(difference) for difference in found], indent=2, default=str))
    else:
        click.echo("\n\n".join(map(_describe, found)))
    return int(fail_on != "nothing" and any(difference.has(fail_on) for difference in found))


def _describe(found: "Difference") -> str:
    nodes = [
        f"only in {side}: {', '.join(names[:_SHOWN])}" + (f", and {len(names) - _SHOWN} more" * (len(names) > _SHOWN))
        for side, names in zip("AB", found.nodes, strict=True)
        if names
    ]
    blocks = [
        "\n".join(
            f"{side}  {path}  ({world} ranks{f', unified to {found.world}' * (world != found.world)})"
            for side, path, world in zip("AB", (found.left, found.right), found.worlds, strict=True)
        ),
        "\n".join(["Nodes", *(f"  {line}" for line in nodes)]) if nodes else "",
        _describe_changes("Ranges, B / A", found.ranges),
    ]
    if found.scales is None:
        blocks.append(f"Scales: not compared; {found.uncompared}")
    else:
        blocks.append(_describe_changes(f"Scales, B / A ({' against '.join(found.methods)})", found.scales))
        blocks.append(_describe_clipped(found))
    for title, settings in (("Config that serves", found.settings), ("Measurement", found.origin)):
        rows = [[setting.name, _show(setting.left), _show(setting.right)] for setting in settings]
        blocks.append(f"{title}\n{_indent(format_table(['', 'A', 'B'], rows))}" if rows else "")
    return "\n\n".join(filter(None, blocks))


def _describe_changes(title: str, changes: "Sequence[Change]") -> str:
    total, differing = sum(change.numbers for change in changes), sum(change.differing for change in changes)
    head = f"{title}: {differing} of {total} differ"
    if not differing:
        return head
    header = ["node", "part", "numbers", "differ", "5 %", "median", "95 %", "least", "most", "0 in B", "0 in A"]
    rows = [
        [
            *(change.kind, change.part, str(change.numbers), str(change.differing)),
            *map(_show_ratio, (change.low, change.median, change.high, change.least, change.most)),
            *(str(change.lost), str(change.found)),
        ]
        for change in changes
        if change.differing
    ]
    return f"{head}\n{_indent(format_table(header, rows))}"


def _describe_clipped(found: "Difference") -> str:
    head = f"Ranges of B that A's scales clip: {len(found.clipped)}"
    rows = [[clip.name, clip.part, f"{clip.range:g}", f"{clip.limit:g}"] for clip in found.clipped[:_SHOWN]]
    return f"{head}\n{_indent(format_table(['node', 'part', 'range', 'limit'], rows))}" if rows else head


def _show_ratio(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def _show(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _to_json(found: "Difference") -> dict[str, Any]:
    return {
        **{name: str(getattr(found, name)) for name in ("left", "right")},
        **{name: getattr(found, name) for name in ("worlds", "world", "methods", "uncompared")},
        "nodes": found.nodes._asdict(),
        **{
            name: None if rows is None else [_without_nan(row._asdict()) for row in rows]
            for name in ("ranges", "scales", "clipped", "settings", "origin")
            for rows in [getattr(found, name)]
        },
    }


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}

"""`gaudi-calib config`: look at the QUANT_CONFIG that would be used, or check one."""

import json
from pathlib import Path
from typing import Any

import click

from gaudi_calib.cli.options import PathType, device_option, json_option, output_option, preset_option
from gaudi_calib.cli.pipeline import format_table
from gaudi_calib.cli.sections import Command
from gaudi_calib.fp8 import DEVICES


@click.group()
def config() -> None:
    """Show, check and describe QUANT_CONFIG files."""


@config.command(cls=Command, epilog="Example: gaudi-calib config show -m models/my-llama --device g3")
@click.option("-m", "--model", type=PathType(), help="Model directory; its config.json tells the family.")
@click.option("--family", "family_name", help="Model family instead of a model; `config presets` lists them.")
@output_option("As in calibrate.", default="out")
@device_option("To serve on.", takes_all=True)
@preset_option(found="reference")
@click.option("--scale-method", help="`config presets` lists them.  [that of the preset]")
def show(
    model: Path | None, family_name: str | None, out: Path, device: str, preset: str | None, scale_method: str | None
) -> None:
    """Print the config files a calibration would write, as JSON by path."""
    from gaudi_calib.config.model import to_content
    from gaudi_calib.config.presets import choose_preset, plan_configs
    from gaudi_calib.config.rules import find_warnings
    from gaudi_calib.layout import RunLayout

    chosen = choose_preset(preset or "reference", model, family_name)
    layout = RunLayout(out.absolute(), str(model.absolute() if model else chosen.family.name))
    configs = plan_configs(chosen.family, layout, [*DEVICES] if device == "all" else [device], scale_method)
    click.echo(json.dumps({str(path): to_content(content) for path, content in configs.items()}, indent=2))
    for warning in dict.fromkeys(finding for content in configs.values() for finding in find_warnings(content)):
        click.echo(f"Warning: {warning}", err=True)
    if chosen.env:
        click.echo(f"Served with {' '.join(f'{name}={value}' for name, value in chosen.env.items())}", err=True)


@config.command(cls=Command, epilog="Example: gaudi-calib config validate --device g3 my_quant.json")
@click.argument("files", nargs=-1, required=True, type=PathType())
@device_option("Check for serving on this device, too.")
@json_option
def validate(files: tuple[Path, ...], device: str | None, as_json: bool) -> int:
    """Check QUANT_CONFIG FILES: every error, and what INC would silently change or ignore.

    Exits with 1 if there is an error; warnings alone exit with 0.
    """
    from gaudi_calib.config.file import validate_file

    reports = {path: validate_file(path, device) for path in files}
    if as_json:
        rows = [{"file": str(path), **row} for path, report in reports.items() for row in report.to_rows()]
        click.echo(json.dumps(rows, indent=2))
    else:
        for path, report in reports.items():
            click.echo(f"{path}: {report}")
    return int(any(report.errors for report in reports.values()))


@config.command(cls=Command, epilog="Example: gaudi-calib config presets --json")
@json_option
def presets(as_json: bool) -> None:
    """List the model families with their rules, what the field sets per model, and the scale methods."""
    from gaudi_calib.config.presets import describe_presets

    described = describe_presets()
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    families = [_family_row(family) for family in described["families"]]
    rows = [_field_row(row) for row in described["field"]]
    methods = [_method_row(method) for method in described["scale_methods"]]
    click.echo(format_table(["family", "model types", "left in BF16", "scale format", "runs with"], families))
    click.echo()
    click.echo(
        format_table(["--preset field", "scale method", "left in BF16", "scale format", "runs with", "why"], rows)
    )
    click.echo()
    click.echo(format_table(["scale method", "weight", "activation", "ranges"], methods))


@config.command(cls=Command, epilog="Example: gaudi-calib config schema > quant_config.schema.json")
def schema() -> None:
    """Print the JSON schema of QUANT_CONFIG, for editors."""
    from gaudi_calib.config.model import describe_schema

    click.echo(json.dumps(describe_schema(), indent=2))


def _family_row(family: dict[str, Any]) -> list[str]:
    arguments = {**family["measure_args"], **family["quantize_args"]}
    runs_with = [f"{key}={value}" for key, value in {**family["env"], **arguments}.items()]
    return [
        family["name"],
        ", ".join(family["model_types"]),
        ", ".join(family["blocklist"]) or "-",
        family["scale_format"] or "-",
        " ".join([*runs_with, *(["expert-parallel"] if family["expert_parallel"] else [])]) or "-",
    ]


def _field_row(row: dict[str, Any]) -> list[str]:
    why = f"{row['failure']} ({', '.join(row['sources'])})" if row["failure"] else "-"
    return [
        row["models"],
        row["scale_method"],
        ", ".join([*row["blocked_types"], *row["blocklist"]]),
        row["scale_format"],
        " ".join(f"{name}={value}" for name, value in row["env"].items()) or "-",
        why,
    ]


def _method_row(method: dict[str, Any]) -> list[str]:
    def describe(part: dict[str, Any]) -> str:
        kind = f"{part['granularity']}/{part['scale_value_type']}/{part['rounding_method']}".lower()
        return kind if part["scale_value_type"] == "FIXED_VALUE" else f"{kind}, backoff {part['backoff']}"

    ranges = "measured" if method["needs_ranges"] else "computed while serving" if method["dynamic"] else "not needed"
    return [method["name"], describe(method["weight"]), describe(method["activation"]), ranges]

"""`gaudi-calib detect`: which accelerator this machine has."""

import json

import click

from gaudi_calib.cli.options import json_option
from gaudi_calib.cli.sections import command, option


@command(epilog="Example: gaudi-calib detect --json")
@option("--require-gaudi", is_flag=True, help="Fail when there is no Gaudi.")
@json_option
def detect(require_gaudi: bool, as_json: bool) -> None:
    """Print g2 or g3 on a Gaudi, else what calibration would run on: cuda or cpu."""
    from gaudi_calib.engines.detect import detect_platform
    from gaudi_calib.engines.detect import require_gaudi as check

    platform = detect_platform()
    device = check(platform) if require_gaudi else platform.device
    name = device.name if device else None
    click.echo(json.dumps({"platform": platform.name, "device": name}) if as_json else name or platform.name)

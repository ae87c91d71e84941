"""`gaudi-calib detect`: which accelerator this machine has."""

import json

import click


@click.command()
@click.option("--require-gaudi", is_flag=True, help="Fail when there is no Gaudi.")
@click.option("--json", "as_json", is_flag=True, help='Print {"platform": ..., "device": ...}.')
def detect(require_gaudi: bool, as_json: bool) -> None:
    """Print g2 or g3 on a Gaudi, else what calibration would run on: cuda or cpu.

    \b
    Example:
      gaudi-calib detect --json
    """
    from gaudi_calib.engines.detect import detect_platform
    from gaudi_calib.engines.detect import require_gaudi as check

    platform = detect_platform()
    device = check(platform) if require_gaudi else platform.device
    name = device.name if device else None
    click.echo(json.dumps({"platform": platform.name, "device": name}) if as_json else name or platform.name)

"""What a run says about ranges that make bad scales."""

from gaudi_calib.config.model import get_scales_device
from gaudi_calib.errors import Finding
from gaudi_calib.ranges.derive import select_nodes
from gaudi_calib.runs.run import Run
from gaudi_calib.scales.limits import find_limits


def warn_of_limits(run: Run) -> None:
    """Warn of ranges that are 0, and of those that saturate; each once, whatever the number of ranks and devices."""
    findings: dict[Finding, None] = {}
    for target in run.targets:
        config = target.quant_config
        ranks = [select_nodes(rank_set, config) for ranks in target.ranges.values() for rank_set in ranks]
        for finding in find_limits(ranks, config.method_table, get_scales_device(config, target.device)):
            findings[finding] = None
    for finding in findings:
        run.warn(f"{finding.what} ({finding.where}): {finding.why}. {str(finding.fix).capitalize()}")

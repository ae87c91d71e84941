#!/usr/bin/env python3
"""Step 5: ranges of many ranks to ranges of fewer.

The same as `gaudi-calib unify`. Ranges are merged and scales are not: a merged scale can be
wrong for both ranks, so they are computed anew from the merged ranges. Without -u it is found
out how experts were split; a wrong -u is refused. Options of `gaudi-calib unify` that the
reference does not have are taken as well.
"""

import argparse
import sys

from configured_run import MEASURING_FLAGS

from gaudi_calib.cli.main import main as run_command

# Our flags -> the step's.
FLAGS = {**MEASURING_FLAGS, "--output": "--out", "--expert-parallel": "-u", "--skip-scales": "-s"}


def main() -> int:
    """Unify, and return the exit code."""
    parser = argparse.ArgumentParser(description="Unify the measurements of several ranks.")
    parser.add_argument("-m", "--measurements", required=True, help="directory of the measurements")
    parser.add_argument("-r", "--rank", type=int, required=True, help="ranks that remain; divides the measured number")
    parser.add_argument("-o", "--out", default=".", help="directory of the results (default: the current one)")
    parser.add_argument("-u", "--use_expert_paral", action="store_true", help="each rank holds experts of its own")
    parser.add_argument("-s", "--skip_unify_scales", action="store_true", help="leave out the scales")
    parser.add_argument("--device", choices=["g2", "g3"], help="device of the scales (default: found out)")
    options, more = parser.parse_known_args()
    words = ["unify", "-m", options.measurements, "-r", str(options.rank), "-o", options.out]
    words += ["--expert-parallel"] * options.use_expert_paral + ["--skip-scales"] * options.skip_unify_scales
    words += ["--device", options.device] if options.device else []
    return run_command([*words, *more], flags=FLAGS)


if __name__ == "__main__":
    sys.exit(main())

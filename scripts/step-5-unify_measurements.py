#!/usr/bin/env python3
"""Step 5: ranges of many ranks to ranges of fewer.

The same as `gaudi-calib unify`. Ranges are merged and scales are not: a merged scale can be
wrong for both ranks, so step 4 computes them from the merged ranges.
"""

import argparse
import sys

from gaudi_calib.cli.main import main as run_command


def main() -> int:
    """Unify, say how to get the scales, and return the exit code."""
    parser = argparse.ArgumentParser(description="Unify the measurements of several ranks.")
    parser.add_argument("-m", "--measurements", required=True, help="directory of the measurements")
    parser.add_argument("-r", "--rank", type=int, required=True, help="ranks that remain; divides the measured number")
    parser.add_argument("-o", "--out", default=".", help="directory of the results (default: the current one)")
    parser.add_argument("-u", "--use_expert_paral", action="store_true", help="taken and not needed without experts")
    parser.add_argument("-s", "--skip_unify_scales", action="store_true", help="do not say how to get the scales")
    options = parser.parse_args()
    exit_code = run_command(["unify", "-m", options.measurements, "-r", str(options.rank), "-o", options.out])
    if exit_code == 0 and not options.skip_unify_scales:
        step = f"step-4-quantize-scales.py --tensor-parallel-size {options.rank}"
        print(f"Scales are computed, not merged. Next: {step}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())

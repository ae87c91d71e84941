#!/usr/bin/env python3
"""Step 6: ranges of one rank to every rank of a larger world.

The same as `gaudi-calib expand`. Scales are computed afterwards, by step 4.
"""

import argparse
import sys

from gaudi_calib.cli.main import main as run_command


def main() -> int:
    """Expand, and return the exit code."""
    parser = argparse.ArgumentParser(description="Expand unified measurements to more ranks.")
    parser.add_argument("-m", "--measurements", required=True, help="directory of the unified measurements")
    parser.add_argument("-o", "--out", default=".", help="directory of the results (default: the current one)")
    parser.add_argument("-w", "--target_world_size", type=int, required=True, help="ranks to expand to")
    options = parser.parse_args()
    words = ["expand", "-m", options.measurements, "-w", str(options.target_world_size), "-o", options.out]
    return run_command(words)


if __name__ == "__main__":
    sys.exit(main())

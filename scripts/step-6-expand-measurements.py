#!/usr/bin/env python3
"""Step 6: ranges of one rank to every rank of a larger world.

The same as `gaudi-calib expand`. Scales, where there are any, are computed anew. How experts
are split follows from the manifest; without one they are dealt out, as the reference always
does, unless --tensor-parallel is given. Options of `gaudi-calib expand` that the reference
does not have are taken as well.
"""

import argparse
import sys

from gaudi_calib.cli.main import main as run_command
from gaudi_calib.files import expand_path
from gaudi_calib.layout import MANIFEST_NAME


def main() -> int:
    """Expand, and return the exit code."""
    parser = argparse.ArgumentParser(description="Expand unified measurements to more ranks.")
    parser.add_argument("-m", "--measurements", required=True, help="directory of the unified measurements")
    parser.add_argument("-o", "--out", default=".", help="directory of the results (default: the current one)")
    parser.add_argument("-w", "--target_world_size", type=int, required=True, help="ranks to expand to")
    parser.add_argument("--tensor-parallel", action="store_true", help="each rank gets a slice of every expert")
    parser.add_argument("--device", choices=["g2", "g3"], help="device of the scales (default: found out)")
    options, more = parser.parse_known_args()
    words = ["expand", options.measurements, "-w", str(options.target_world_size), "-o", options.out]
    if options.tensor_parallel:
        words.append("--no-expert-parallel")
    elif not (expand_path(options.measurements) / MANIFEST_NAME).is_file():
        words.append("--expert-parallel")
    words += ["--device", options.device] if options.device else []
    return run_command([*words, *more], flags={"--no-expert-parallel": "--tensor-parallel"})


if __name__ == "__main__":
    sys.exit(main())

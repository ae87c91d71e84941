#!/usr/bin/env python3
"""Step 6: ranges of one rank to every rank of a larger world.

The same as `gaudi-calib expand`. Scales, where there are any, are computed anew. How experts
are split follows from the manifest; without one those of a single rank are dealt out, as the
reference always does, unless --tensor-parallel is given. Options of `gaudi-calib expand` that the
reference does not have are taken as well.
"""

import argparse
import sys

from configured_run import MEASURING_FLAGS

from gaudi_calib.cli.main import main as run_command
from gaudi_calib.files import expand_path
from gaudi_calib.layout import MANIFEST_NAME

# Our flags -> the step's.
FLAGS = {
    **MEASURING_FLAGS,
    "--output": "--out",
    "--world-size": "--target_world_size",
    "--expert-parallel": "-u",
    "--no-expert-parallel": "--tensor-parallel",
}


def main() -> int:
    """Expand, and return the exit code."""
    parser = argparse.ArgumentParser(description="Expand unified measurements to more ranks.")
    parser.add_argument("-m", "--measurements", required=True, help="directory of the unified measurements")
    parser.add_argument("-o", "--out", default=".", help="directory of the results (default: the current one)")
    parser.add_argument("-w", "--target_world_size", type=int, required=True, help="ranks to expand to")
    parser.add_argument("--from-world", type=int, default=1, help="ranks to expand (%(default)s)")
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("-u", "--expert-parallel", action="store_true", help="each rank gets experts of its own")
    shared.add_argument("--tensor-parallel", action="store_true", help="each rank gets a slice of every expert")
    parser.add_argument("--device", choices=["g2", "g3"], help="device of the scales (default: found out)")
    options, more = parser.parse_known_args()
    words = ["expand", "-m", options.measurements, "-w", str(options.target_world_size), "-o", options.out]
    words += ["--from-world", str(options.from_world)]
    is_told = options.from_world > 1 or (expand_path(options.measurements) / MANIFEST_NAME).is_file()
    if options.tensor_parallel:
        words.append("--no-expert-parallel")
    elif options.expert_parallel or not is_told:
        words.append("--expert-parallel")
    words += ["--device", options.device] if options.device else []
    return run_command([*words, *more], flags=FLAGS)


if __name__ == "__main__":
    sys.exit(main())

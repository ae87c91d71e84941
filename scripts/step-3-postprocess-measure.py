#!/usr/bin/env python3
"""Step 3: give the attention matmuls the ranges of the KV caches they read.

The same as `gaudi-calib postprocess`; -o may be the same directory as -m.
"""

import argparse
import sys

from gaudi_calib.cli.main import main as run_command


def main() -> int:
    """Postprocess, and return the exit code."""
    parser = argparse.ArgumentParser(description="Put the ranges of the KV caches into the attention matmuls.")
    parser.add_argument("-m", "--measurements", required=True, help="directory of the measurements")
    parser.add_argument("-o", "--out", default=".", help="directory of the results (default: the current one)")
    parser.add_argument(
        "-d", "--deepseek", action="store_true", help="taken and not needed: a latent cache is recognised"
    )
    options = parser.parse_args()
    return run_command(["postprocess", "-m", options.measurements, "-o", options.out], flags={"--output": "--out"})


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Step 4: compute the scales that QUANT_CONFIG (a QUANTIZE config) asks for.

Ranges are read from its dump_stats_path, scales are written beside them.
"""

import argparse
import sys

from configured_run import IdleFlag, find_configured_run, make_parser

from gaudi_calib.cli.main import report_errors


def main() -> int:
    """Compute scales, and return the exit code."""
    options = parse_options()
    run = find_configured_run(options.device)
    words = ["quantize", "-t", str(options.tensor_parallel_size), "--config-quant", str(run.config)]
    return run.execute(words, options.model, reads_ranges=True)


def parse_options() -> argparse.Namespace:
    """Return the reference's options."""
    parser = make_parser("Compute scales from measured ranges; QUANT_CONFIG says which and how.")
    idle = parser.add_argument_group("taken and without effect with the torch engine")
    for name in ("--block-quant", "--enforce-eager", "--expert-parallel"):
        idle.add_argument(name, action=IdleFlag, nargs=0)
    for name in ("--max-num-prefill-seqs", "--distributed-executor-backend", "--gpu-memory-utilization"):
        idle.add_argument(name, action=IdleFlag)
    idle.add_argument("--max-model-len", action=IdleFlag)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))

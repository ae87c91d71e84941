#!/usr/bin/env python3
"""Step 4: compute the scales that QUANT_CONFIG (a QUANTIZE config) asks for.

Ranges are read from its dump_stats_path, scales are written beside them. How experts are shared is
found out; -u is checked against it. Options of `gaudi-calib quantize` that the reference does not
have are taken as well.
"""

import argparse
import sys

from configured_run import IdleFlag, find_configured_run, make_parser

from gaudi_calib.cli.main import report_errors

# Our flags -> the step's.
FLAGS = {"-t": "--tensor-parallel-size", "-o": "dump_stats_path", "--config-quant": "QUANT_CONFIG"}


def main() -> int:
    """Compute scales, and return the exit code."""
    options, more = parse_options()
    run = find_configured_run(options.model, options.device)
    run.require_world(options.tensor_parallel_size, options.model)
    words = ["quantize", "-t", str(options.tensor_parallel_size), "--config-quant", str(run.config)]
    if options.expert_parallel is not None:
        words.append("-u" if options.expert_parallel else "--no-expert-parallel")
    return run.execute([*words, *more], options.model, reads_ranges=True, flags=FLAGS)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Return the reference's options, and the words that are none of them."""
    parser = make_parser("Compute scales from measured ranges; QUANT_CONFIG says which and how.")
    parser.add_argument(
        "-u", "--expert-parallel", action=argparse.BooleanOptionalAction, help="ranks hold whole experts"
    )
    idle = parser.add_argument_group("taken and without effect with the torch engine")
    for name in ("--block-quant", "--enforce-eager"):
        idle.add_argument(name, action=IdleFlag, nargs=0)
    for name in ("--max-num-prefill-seqs", "--distributed-executor-backend", "--gpu-memory-utilization"):
        idle.add_argument(name, action=IdleFlag)
    idle.add_argument("--max-model-len", action=IdleFlag)
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))

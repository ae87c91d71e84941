#!/usr/bin/env python3
"""Step 4: compute the scales that QUANT_CONFIG (a QUANTIZE config) asks for.

Ranges are read from its dump_stats_path, scales are written beside them.
"""

import argparse
import sys

from configured_run import add_device_option, find_configured_run, note_idle_flags

from gaudi_calib.cli.main import report_errors

IDLE = ("--max-num-prefill-seqs", "--block-quant", "--enforce-eager", "--expert-parallel", "--max-model-len")
IDLE += ("--distributed-executor-backend", "--gpu-memory-utilization")


def main() -> int:
    """Compute scales, and return the exit code."""
    parser = make_parser()
    options = parser.parse_args()
    run = find_configured_run(options.device)
    note_idle_flags(options, parser, IDLE)
    words = ["quantize", "-t", str(options.tensor_parallel_size), "--config-quant", str(run.config)]
    return run.execute(words, options.model, reads_ranges=True)


def make_parser() -> argparse.ArgumentParser:
    """Return a parser of the reference's options."""
    parser = argparse.ArgumentParser(
        description="Compute scales from measured ranges; QUANT_CONFIG says which and how."
    )
    parser.add_argument("-m", "--model", required=True, help="directory or Hugging Face name of the model")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks that will serve (%(default)s)")
    add_device_option(parser)
    vllm = parser.add_argument_group("taken and without effect with the torch engine")
    vllm.add_argument("--block-quant", action="store_true")
    vllm.add_argument("--enforce-eager", action="store_true")
    vllm.add_argument("--expert-parallel", action="store_true")
    vllm.add_argument("--max-num-prefill-seqs", type=int)
    vllm.add_argument("--distributed-executor-backend", choices=["mp", "ray"], default="mp")
    vllm.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    vllm.add_argument("--max-model-len", type=int, default=128)
    return parser


if __name__ == "__main__":
    sys.exit(report_errors(main))

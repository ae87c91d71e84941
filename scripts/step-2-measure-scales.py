#!/usr/bin/env python3
"""Step 2: measure the ranges that QUANT_CONFIG (a MEASURE config) asks for.

Files go to its dump_stats_path; its allowlist and blocklist hold. Options of `gaudi-calib measure`
that the reference does not have are taken as well.
"""

import argparse
import sys

from configured_run import MEASURING_FLAGS, IdleFlag, find_configured_run, make_parser

from gaudi_calib.cli.main import report_errors

# Our flags for vLLM -> the reference's.
ENGINE_FLAGS = {
    "--max-new-tokens": "--max-tokens",
    "--executor": "--distributed-executor-backend",
    "--gpu-memory-utilization": "--gpu-memory-utilization",
}
# Our other flags -> the reference's.
FLAGS = {
    **MEASURING_FLAGS,
    "-e": "--enforce-eager",
    "-l": "--max-dataset-samples",
    "--limit": "--max-dataset-samples",
    "-o": "dump_stats_path",
    "-u": "--expert-parallel",
}


def main() -> int:
    """Measure, and return the exit code."""
    options, more = parse_options()
    run = find_configured_run(options.model, options.device)
    words = ["measure", "-b", str(options.batch_size), "-t", str(options.tensor_parallel_size)]
    words += [word for dataset in options.dataset for word in ("-d", dataset)]
    if options.auto_process_dataset:
        words += ["--min-tokens", str(options.sample_len), "--max-tokens", str(options.sample_len)]
    else:
        words += ["--max-tokens", str(options.max_model_len)]
    if options.max_dataset_samples:
        words += ["-l", str(options.max_dataset_samples)]
    words += ["-u"] * options.expert_parallel + ["-e"] * options.enforce_eager
    for ours, flag in ENGINE_FLAGS.items():
        value = getattr(options, flag.lstrip("-").replace("-", "_"))
        if value is not None:
            words += [ours, str(value)]
    words = [*["-v"] * options.verbose, *words, "--config-measure", str(run.config), *more]
    length = "--sample-len" if options.auto_process_dataset else "--max-model-len"
    flags = {
        **FLAGS,
        **ENGINE_FLAGS,
        "--min-tokens": length,
        "--max-tokens": length,
        "--config-measure": "QUANT_CONFIG",
    }
    return run.execute(words, options.model, reads_ranges=False, flags=flags)


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Return the reference's options, and the words that are none of them."""
    parser = make_parser("Measure the ranges of a model; QUANT_CONFIG says where they go.")
    parser.add_argument(
        "-d", "--dataset", required=True, action="append", help="what step 1 wrote, or any dataset; repeatable"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="prompts that run together (%(default)s)")
    parser.add_argument("--max-dataset-samples", type=int, default=0, help="number of samples (0: all)")
    parser.add_argument("--expert-parallel", action="store_true", help="expert parallelism")
    parser.add_argument("--enforce-eager", action="store_true", help="eager execution")
    parser.add_argument("--auto-process-dataset", action="store_true", help="take samples of --sample-len tokens")
    parser.add_argument("--sample-len", type=int, default=1024, help="tokens of each such sample (%(default)s)")
    parser.add_argument("--max-model-len", type=int, default=2048, help="cut prompts to this many tokens (%(default)s)")
    parser.add_argument("-v", "--verbose", action="store_true", help="log details")
    vllm = parser.add_argument_group("for vLLM (on a Gaudi)")
    vllm.add_argument("--max-tokens", type=int, help="tokens to generate after each prompt (16)")
    vllm.add_argument("--distributed-executor-backend", choices=["mp", "ray"])
    vllm.add_argument("--gpu-memory-utilization", type=float)
    idle = parser.add_argument_group("taken and without effect")
    idle.add_argument("--max-num-prefill-seqs", action=IdleFlag)
    idle.add_argument("--block-quant", action=IdleFlag, nargs=0)
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))

"""Time and memory of `measure_channels` beside a plain transformers forward of the same tokens.

Makes a random Llama of 1.1 billion parameters (bf16, 2.2 GB), then runs, each in a child
process of its own: an idle interpreter, the measurement, a plain float32 forward and a
plain bfloat16 forward. Prints seconds (of the measurement including the reading of its
weights; of the forward without it), peak memory, and ratios.

    python benchmarks/measure.py [--rounds N] [--keep DIR] [--skip-bf16]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAMPLES, LENGTH, VOCABULARY = 32, 256, 32000
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def make_model(directory: Path) -> None:
    """Write the checkpoint, if it is not there."""
    if (directory / "model.safetensors").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, dtype="bfloat16")).to(torch.bfloat16).save_pretrained(directory)


def make_prompts() -> list[list[int]]:
    import random

    rng = random.Random(0)
    return [[rng.randrange(VOCABULARY) for _ in range(LENGTH)] for _ in range(SAMPLES)]


def run_idle(directory: Path) -> None:
    """Nothing at all."""


def run_measure(directory: Path) -> None:
    from gaudi_calib.engines.torch.measure import measure_channels

    measure_channels(directory, make_prompts())


def run_forward(directory: Path, dtype: str) -> float:
    """Return the seconds of the forward alone, four prompts at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    tokens = torch.tensor(make_prompts())
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in tokens.split(8):
            model(batch, use_cache=False)
    return time.perf_counter() - start


TASKS = {
    "idle": run_idle,
    "measure": run_measure,
    "float32 forward": lambda directory: run_forward(directory, "float32"),
    "bfloat16 forward": lambda directory: run_forward(directory, "bfloat16"),
}


def run_task(name: str, directory: Path) -> None:
    """Run one task in this process and print its figures as JSON."""
    if name == "measure":
        import transformers.models.llama.modeling_llama  # noqa: F401 - importing is not measuring

        import gaudi_calib.engines.torch.measure  # noqa: F401
    start = time.perf_counter()
    seconds = TASKS[name](directory)
    seconds = time.perf_counter() - start if seconds is None else seconds
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes}))


def run_child(name: str, directory: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", name, "--keep", str(directory)]
    output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    figures = json.loads(output.splitlines()[-1])
    print(f"{name:>18}: {figures['seconds']:8.1f} s   peak {figures['peak_bytes'] / 1e9:6.2f} GB", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="directory of the checkpoint, made where it is missing")
    parser.add_argument("--skip-bf16", action="store_true", help="leave out the slow bfloat16 forward")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        return run_task(arguments.task, arguments.keep)
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.keep or Path(temporary)
        make_model(directory)
        names = [name for name in TASKS if not (arguments.skip_bf16 and name.startswith("bf"))]
        best: dict[str, dict[str, float]] = {}
        for _ in range(arguments.rounds):
            for name in names:
                figures = run_child(name, directory)
                best[name] = min(best.get(name, figures), figures, key=lambda one: one["seconds"])
    above = best["measure"]["peak_bytes"] - best["idle"]["peak_bytes"]
    print(f"measure, memory above an idle interpreter: {above / 1e9:.2f} GB")
    for name in names:
        if name.endswith("forward"):
            print(f"measure / {name}: {best['measure']['seconds'] / best[name]['seconds']:.2f}")
    return None


if __name__ == "__main__":
    main()

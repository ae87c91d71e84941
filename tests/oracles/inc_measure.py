"""What INC itself measures of a Hugging Face model, on CPU.

Run as a child process, because INC keeps global state:

    python inc_measure_oracle.py JOBS.json

JOBS.json lists [checkpoint directory, data type, attention, prompts, output directory];
each job runs in a process forked after the imports, one sequence per forward call, and
leaves INC's own `inc_output_hooks_maxabs.npz` in its output directory, and in
`before_bias.json` the products of biased layers before the bias, which INC's patched
`Linear` does not see but its patched `RowParallelLinear` does.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

Prompts = Sequence[Sequence[int]]


Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Job:
    """A model to measure.

    Attributes:
        checkpoint: its directory.
        prompts: token ids; one sequence per forward call.
        dtype: in which it computes; INC keeps ranges in bfloat16 either way.
        attention: transformers' attention implementation.
    """

    checkpoint: Path
    prompts: Prompts
    dtype: str = "bfloat16"
    attention: str = "eager"


@dataclass(frozen=True)
class Measured:
    """Ranges of one linear layer, bf16 values.

    Attributes:
        input, output: of the activations; the output without bias.
        weight: of the weight.
    """

    input: float
    output: float
    weight: float


def measure_with_inc(jobs: Mapping[Key, Job]) -> dict[Key, dict[str, Measured]]:
    """Return INC's ranges of every linear layer: job -> Hugging Face module name -> ranges.

    Raises:
        RuntimeError: the child process failed; carries its stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        outputs = {key: Path(scratch) / str(index) for index, key in enumerate(jobs)}
        rows = [
            [str(job.checkpoint), job.dtype, job.attention, job.prompts, str(outputs[key])] for key, job in jobs.items()
        ]
        jobs_file = Path(scratch) / "jobs.json"
        jobs_file.write_text(json.dumps(rows))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "LOGLEVEL": "WARNING"}
        command = [sys.executable, __file__, str(jobs_file)]
        child = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if child.returncode != 0:
            raise RuntimeError(f"INC could not measure:\n{child.stderr[-4000:]}")
        return {key: _read_measured(output) for key, output in outputs.items()}


def fuse_measured(measured: Mapping[str, Measured], modules: Iterable[str]) -> Measured:
    """Return the ranges of the layer that vLLM fuses from `modules` (Hugging Face names)."""
    parts = [measured[module] for module in modules]
    return Measured(
        input=max(part.input for part in parts),
        output=max(part.output for part in parts),
        weight=max(part.weight for part in parts),
    )


def _read_measured(directory: Path) -> dict[str, Measured]:
    nodes = np.load(directory / "inc_output_hooks_maxabs.npz", allow_pickle=True)["arr_0"].item()["Nodes"]
    before_bias = json.loads((directory / "before_bias.json").read_text())
    return {
        name: Measured(
            input=node["inputs"][0].item(),
            output=before_bias.get(name, node["outputs"][0].item()),
            weight=node["params"]["weight"].item(),
        )
        for name, node in nodes.items()
    }


def _measure_job(job: tuple[str, str, str, Prompts, str]) -> None:
    """Measure one checkpoint in this process; call it in a fresh one."""
    import torch
    from neural_compressor.torch.algorithms.fp8_quant._core.patching_common import mod_default_dict
    from neural_compressor.torch.quantization import FP8Config, finalize_calibration, prepare
    from transformers import AutoModelForCausalLM

    # On a Gaudi, INC patches Falcon's own linear class as it patches torch's; on a CPU it leaves it out.
    mod_default_dict["FalconLinear"] = mod_default_dict["Linear"]
    checkpoint, dtype, attention, prompts, output = job
    Path(output).mkdir()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation=attention
    ).eval()
    before_bias: dict[str, float] = {}

    def watch(name: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        largest = torch.matmul(args[0], module.weight.T).abs().max().bfloat16().item()
        before_bias[name] = max(before_bias.get(name, 0.0), largest)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.register_forward_pre_hook(lambda module, args, name=name: watch(name, module, args))
    config = FP8Config(
        mode="MEASURE",
        observer="maxabs",
        measure_exclude="NONE",
        use_qdq=True,
        dump_stats_path=f"{output}/inc_output",
        allowlist={"types": [], "names": []},
    )
    model = prepare(model, config)
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt]), use_cache=False)
    finalize_calibration(model)
    (Path(output) / "before_bias.json").write_text(json.dumps(before_bias))


def _measure_jobs(jobs: Sequence[tuple[str, str, str, Prompts, str]]) -> None:
    # Imported once, for all forks; torchao is what INC's first call to prepare imports.
    import neural_compressor.torch.quantization  # noqa: F401
    import torchao.quantization.quant_primitives  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401

    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        pool.map(_measure_job, jobs, chunksize=1)


if __name__ == "__main__":
    _measure_jobs(json.loads(Path(sys.argv[1]).read_text()))

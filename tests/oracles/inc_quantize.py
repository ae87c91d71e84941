"""What INC does with rank files: it quantizes a Hugging Face model on CPU and runs it.

Run as a child process, because INC keeps global state:

    python inc_quantize_oracle.py JOB.json

JOB.json holds [checkpoint directory, QUANT_CONFIG file, token ids, result file].
torch.distributed has one gloo rank, so that INC reads `_0_1` files. INC writes its
scale files beside the ranges.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Quantized:
    """What became of the model.

    Attributes:
        patched: names of the modules INC replaced by quantizing ones.
        weight_dtypes: their weights' data types.
        plain, quantized: logits of the last token before and after.
    """

    patched: list[str]
    weight_dtypes: list[str]
    plain: list[float]
    quantized: list[float]


def quantize_with_inc(checkpoint: Path, quant_config: Path, tokens: Sequence[int]) -> Quantized:
    """Let INC quantize `checkpoint` as `quant_config` says, and run `tokens` through it.

    Raises:
        RuntimeError: the child process failed; carries its stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result, job = Path(scratch) / "result.json", Path(scratch) / "job.json"
        job.write_text(json.dumps([str(checkpoint), str(quant_config), list(tokens), str(result)]))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "LOGLEVEL": "WARNING"}
        command = [sys.executable, __file__, str(job)]
        child = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if child.returncode != 0:
            raise RuntimeError(f"INC could not quantize:\n{child.stderr[-4000:]}")
        return Quantized(**json.loads(result.read_text()))


def _quantize(checkpoint: str, quant_config: str, tokens: Sequence[int]) -> dict[str, list]:
    """Quantize in this process; call it in a fresh one."""
    import torch
    from neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules import PatchedLinear
    from neural_compressor.torch.quantization import FP8Config, convert
    from transformers import AutoModelForCausalLM

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tempfile.mkdtemp()}/rendezvous", rank=0, world_size=1
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    inputs = torch.tensor([tokens])
    with torch.no_grad():
        plain = model(inputs, use_cache=False).logits[0, -1]
        model = convert(model, FP8Config.from_json_file(quant_config))
        quantized = model(inputs, use_cache=False).logits[0, -1]
    patched = {name: module for name, module in model.named_modules() if isinstance(module, PatchedLinear)}
    return {
        "patched": list(patched),
        "weight_dtypes": [str(module.weight.dtype) for module in patched.values()],
        "plain": plain.tolist(),
        "quantized": quantized.tolist(),
    }


if __name__ == "__main__":
    *arguments, result_file = json.loads(Path(sys.argv[1]).read_text())
    Path(result_file).write_text(json.dumps(_quantize(*arguments)))

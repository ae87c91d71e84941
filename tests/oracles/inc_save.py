"""The tensors that INC's observer `save` leaves of a Hugging Face model, on CPU.

Run as a child process, because INC keeps global state:

    python inc_save.py CHECKPOINT PROMPTS OUT [mend]

Writes OUT/tensors/*.pt, one forward call per prompt. INC stops at the first module by
itself, in `save_module`; with `mend` that function, which saves a module's weights once more, does nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def save_with_inc(
    checkpoint: Path, prompts: Sequence[Sequence[int]], out: Path, *, mend: bool
) -> subprocess.CompletedProcess[str]:
    """Have INC write the tensors to `out`; `mend` as above."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "LOGLEVEL": "WARNING"}
    out.mkdir()
    words = [str(checkpoint), json.dumps(prompts), str(out), *(["mend"] if mend else [])]
    return subprocess.run([sys.executable, __file__, *words], env=environment, cwd=out, capture_output=True, text=True)


def _save(checkpoint: str, prompts: str, out: str, *mend: str) -> None:
    import torch
    from neural_compressor.torch.algorithms.fp8_quant._core import measure
    from neural_compressor.torch.quantization import FP8Config, finalize_calibration, prepare
    from transformers import AutoModelForCausalLM

    if mend:
        measure.save_module = lambda module: None
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="eager")
    config = {"mode": "MEASURE", "observer": "save", "measure_exclude": "NONE", "use_qdq": True}
    model = prepare(model.eval(), FP8Config(**config, dump_stats_path=f"{out}/inc_output"))
    with torch.no_grad():
        for prompt in json.loads(prompts):
            model(torch.tensor([prompt]), use_cache=False)
    finalize_calibration(model)


if __name__ == "__main__":
    _save(*sys.argv[1:])

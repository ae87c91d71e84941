"""A real vLLM engine with quantization `gaudi_fp8`, on CPU, in a child process.

    python vllm_engine_oracle.py SPEC.json ANSWER.json

SPEC: {"model", "quant_config" (null: bfloat16), "world", "prompts": [[token id]], "max_tokens",
"engine": {engine arguments}, "save": whether to write ranges}. ANSWER: for every prompt the tokens
generated and the log-probabilities of all tokens at each position that vLLM computed (of
the prompt from its second token on, then of the generated ones), and the files written.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Answer:
    """What an engine did.

    Attributes:
        generated: tokens generated for each prompt.
        logprobs: by prompt, float32 of shape (positions, vocabulary); NaN where vLLM gave none.
        files: files written by rank.
    """

    generated: list[list[int]]
    logprobs: list[np.ndarray]
    files: list[list[str]]


class EngineError(Exception):
    """The engine failed; holds its output."""


def run_engine(
    model: Path,
    quant_config: Path | None,
    prompts: Sequence[Sequence[int]],
    *,
    world: int = 1,
    max_tokens: int = 4,
    save: bool = False,
    **engine: Any,
) -> Answer:
    """Run one engine in a process of its own.

    Raises:
        EngineError: it failed.
    """
    spec = {
        "model": str(model),
        "quant_config": quant_config and str(quant_config),
        "world": world,
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "engine": engine,
        "save": save,
    }
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(world))),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    environment.pop("QUANT_CONFIG", None)
    if quant_config:
        environment["QUANT_CONFIG"] = str(quant_config)
    with tempfile.TemporaryDirectory() as scratch:
        task, answer = Path(scratch) / "spec.json", Path(scratch) / "answer.json"
        task.write_text(json.dumps(spec))
        command = [sys.executable, __file__, str(task), str(answer)]
        child = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if child.returncode != 0:
            raise EngineError(child.stdout[-12000:] + child.stderr[-12000:])
        found = json.loads(answer.read_text())
    return Answer(found["generated"], [np.array(one, dtype=np.float32) for one in found["logprobs"]], found["files"])


def main(task: str, answer: str) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    from gaudi_calib.engines.vllm_plugin import QUANTIZATION, WORKER_EXTENSION

    spec = json.loads(Path(task).read_text())
    arguments: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 256, "max_logprobs": -1}
    if spec["quant_config"]:
        arguments |= {"quantization": QUANTIZATION, "worker_extension_cls": WORKER_EXTENSION}
    llm = LLM(spec["model"], tensor_parallel_size=spec["world"], **arguments, **spec["engine"])
    sampling = SamplingParams(
        temperature=0.0, max_tokens=spec["max_tokens"], ignore_eos=True, logprobs=-1, prompt_logprobs=-1
    )
    outputs = llm.generate([TokensPrompt(prompt_token_ids=one) for one in spec["prompts"]], sampling, use_tqdm=False)
    size = llm.llm_engine.model_config.get_vocab_size()
    found = {
        "generated": [list(one.outputs[0].token_ids) for one in outputs],
        "logprobs": [
            [_to_row(row, size) for row in [*one.prompt_logprobs[1:], *one.outputs[0].logprobs]] for one in outputs
        ],
        "files": llm.collective_rpc("save_ranges") if spec["save"] else [],
    }
    Path(answer).write_text(json.dumps(found))


def _to_row(logprobs: dict[int, Any], size: int) -> list[float]:
    row = [float("nan")] * size
    for token, one in logprobs.items():
        row[token] = one.logprob
    return row


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Real vLLM engines with quantization `gaudi_fp8`, on CPU, in a child process.

    python vllm_engine_oracle.py TASKS.json ANSWERS.json

runs one engine after the other (`EngineTask`) and writes what each did (`Answer`). With one rank,
everything is in that process; more ranks are processes of their own, as when serving.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class EngineTask:
    """What an engine is to do.

    Attributes:
        model: directory of the checkpoint.
        quant_config: QUANT_CONFIG; None for an engine without quantization.
        prompts: token ids.
        world: ranks.
        max_tokens: how many tokens to generate for each prompt, greedily.
        saves: whether to write ranges at the end; then another prompt runs before, and is to be forgotten.
        engine: further engine arguments.
    """

    model: str
    quant_config: str | None
    prompts: list[list[int]]
    world: int = 1
    max_tokens: int = 4
    saves: bool = False
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What an engine did.

    Attributes:
        generated: tokens generated for each prompt.
        logprobs: by prompt, float32 of shape (positions, vocabulary): of what follows the
            prompt's first token, second token, ... and each generated one but the last.
        files: files written, by rank.
    """

    generated: list[list[int]]
    logprobs: list[np.ndarray]
    files: list[list[str]]


class EngineError(Exception):
    """An engine failed; holds the process's output."""


def run_engines(tasks: Sequence[EngineTask]) -> list[Answer]:
    """Run engines of equal world in one process.

    Raises:
        EngineError: one failed.
    """
    world = tasks[0].world
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(world))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(world > 1)),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    environment.pop("QUANT_CONFIG", None)
    with tempfile.TemporaryDirectory() as scratch:
        given, answers = Path(scratch) / "tasks.json", Path(scratch) / "answers.json"
        given.write_text(json.dumps([asdict(task) for task in tasks]))
        command = [sys.executable, __file__, str(given), str(answers)]
        child = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if child.returncode != 0:
            raise EngineError(child.stdout[-8000:] + child.stderr[-20000:])
        found = json.loads(answers.read_text())
    return [Answer(answer[0], [np.array(rows, dtype=np.float32) for rows in answer[1]], answer[2]) for answer in found]


def _run_task(task: EngineTask) -> list[Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    from gaudi_calib.engines import QUANTIZATION, WORKER_EXTENSION

    arguments: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 256, "max_logprobs": -1}
    os.environ.pop("QUANT_CONFIG", None)
    if task.quant_config:
        os.environ["QUANT_CONFIG"] = task.quant_config
        arguments |= {"quantization": QUANTIZATION, "worker_extension_cls": WORKER_EXTENSION}
    if task.world == 1:
        arguments["distributed_executor_backend"] = "uni"
    llm = LLM(task.model, tensor_parallel_size=task.world, **(arguments | task.engine))
    sampling = SamplingParams(
        temperature=0.0, max_tokens=task.max_tokens, ignore_eos=True, logprobs=-1, prompt_logprobs=-1
    )
    if task.saves:
        llm.generate(TokensPrompt(prompt_token_ids=[9] * 100), sampling, use_tqdm=False)
        llm.collective_rpc("reset_ranges")
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in task.prompts], sampling, use_tqdm=False)
    size = llm.llm_engine.model_config.get_vocab_size()
    rows = [
        [_to_row(row, size) for row in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]] for output in outputs
    ]
    files = llm.collective_rpc("save_ranges") if task.saves else []
    generated = [list(output.outputs[0].token_ids) for output in outputs]
    llm.llm_engine.model_executor.shutdown() if task.world == 1 else None
    del llm
    if task.world == 1:
        cleanup_dist_env_and_memory()
    return [generated, rows, files]


def _to_row(logprobs: dict[int, Any], size: int) -> list[float]:
    row = [float("nan")] * size
    for token, logprob in logprobs.items():
        row[token] = logprob.logprob
    return row


def main(given: str, answers: str) -> None:
    tasks = [EngineTask(**task) for task in json.loads(Path(given).read_text())]
    Path(answers).write_text(json.dumps([_run_task(task) for task in tasks]))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""One phase in its own process: `python -m gaudi_calib.engines.vllm_runner.child SPEC RESULT`.

SPEC is JSON: {"model", "args": engine arguments, "prompts": [[token id]], "max_new_tokens":
[one per prompt], "batch_size", "saving"}. RESULT is written at the end: {"prompts",
"new_tokens", "files": [[path] per rank]}, or {"error": "..."}.

Ends with its parent: when that closes standard input, by dying as well, this process and
all it has started are killed.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def main(spec_path: str, result_path: str) -> int:
    """Run the phase and return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = json.loads(Path(spec_path).read_bytes())
    try:
        result = run(spec)
    except Exception as error:
        Path(result_path).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}), encoding="utf-8")
        raise
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")
    return 0


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Start the engine, run all prompts greedily, have the ranks write what they measured."""
    with open_engine(spec["model"], spec["args"]) as llm:
        new_tokens = _generate(llm, spec)
        files: list[list[str]] = []
        if spec["saving"] == "ask":
            files = llm.collective_rpc("save_ranges")
        elif spec["saving"] == "shutdown":
            # INC writes when a worker shuts down. Asked now, the answer is waited for.
            llm.collective_rpc("shutdown")
    return {"prompts": len(spec["prompts"]), "new_tokens": new_tokens, "files": files}


@contextmanager
def open_engine(model: str, args: Mapping[str, Any]) -> Any:
    """Yield vLLM's `LLM`, and shut it down whatever happens."""
    from vllm import LLM

    llm = LLM(model, **args)
    try:
        yield llm
    finally:
        # Without `model_executor`, the engine runs in another process.
        engine = getattr(llm.llm_engine, "model_executor", None) or llm.llm_engine.engine_core
        engine.shutdown()


def _generate(llm: Any, spec: Mapping[str, Any]) -> int:
    """Run the prompts batch by batch and return how many tokens were generated."""
    from vllm import SamplingParams, TokensPrompt

    prompts, limits, size = spec["prompts"], spec["max_new_tokens"], spec["batch_size"]
    start, new_tokens = time.monotonic(), 0
    for first in range(0, len(prompts), size):
        batch = [TokensPrompt(prompt_token_ids=ids) for ids in prompts[first : first + size]]
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True, detokenize=False)
            for limit in limits[first : first + size]
        ]
        outputs = llm.generate(batch, sampling, use_tqdm=False)
        new_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        done = first + len(batch)
        left_s = (time.monotonic() - start) / done * (len(prompts) - done)
        print(f"{done} of {len(prompts)} prompts, {left_s:.0f} s left", flush=True)
    return new_tokens


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

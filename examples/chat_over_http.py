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
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

START_S = 300


def main() -> int:
    """Print what the model answers and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("quant_config")
    parser.add_argument("--port", type=int, default=0, help="where the server listens  [a free one]")
    parser.add_argument("--say", default="What is a list?", help="what to ask  [%(default)s]")
    options = parser.parse_args()
    port = options.port or find_free_port()
    with run_server(options.model, options.quant_config, port) as address:
        request = {
            "model": "demo",
            "messages": [{"role": "user", "content": options.say}],
            "max_tokens": 48,
            "temperature": 0,
        }
        answer = post(f"{address}/v1/chat/completions", request)
    print(f"\nPOST {address}/v1/chat/completions")
    print(f"user:      {options.say}")
    print(f"assistant: {answer['choices'][0]['message']['content']!r}")
    print(f"({answer['usage']['completion_tokens']} tokens, quantization as {options.quant_config} says)")
    return 0


@contextlib.contextmanager
def run_server(model: str, quant_config: str, port: int) -> Iterator[str]:
    """Yield the address of a server that answers; it is stopped afterwards."""
    words = ["serve", "-m", model, "--quant-config", quant_config, "--port", str(port)]
    words += ["--", "--host", "127.0.0.1", "--served-model-name", "demo", "--max-model-len", "256"]
    server = subprocess.Popen([sys.executable, "-m", "gaudi_calib", *words])
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(server, f"{address}/health")
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_ready(server: subprocess.Popen, url: str) -> None:
    """Return when `url` answers.

    Raises:
        SystemExit: the server ended, or did not answer within `START_S` seconds.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
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

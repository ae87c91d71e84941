"""Whether a Ray cluster can hold the ranks, asked before anything is started.

    python -m gaudi_calib.engines.vllm_runner.cluster RESOURCE    prints {"available": N} or {"error": "..."}

Asked in a process of its own: connecting starts threads and changes the process's logging.
"""

import json
import logging
import os
import socket
import subprocess
import sys
from importlib.util import find_spec

from gaudi_calib.errors import CalibrationError

# Ray's name of an accelerator, by platform.
_RESOURCES = {"hpu": "HPU", "cuda": "GPU"}
_TIMEOUT_S = 120
_CONNECT_S = 10


def require_cluster(platform: str, world: int) -> None:
    """Check that a running Ray cluster has `world` free accelerators.

    Args:
        platform: one that `choose_executor` lets use Ray.

    Raises:
        CalibrationError: no Ray, no cluster, or too few of them.
    """
    resource = _RESOURCES[platform]
    if find_spec("ray") is None:
        raise CalibrationError("Ray is not installed", fix="pip install ray, on every node")
    available = _ask_cluster(resource)
    if available < world:
        raise CalibrationError(
            f"the Ray cluster has {available} free {resource}, and {world} ranks need one each",
            where=f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', 'auto')}",
            fix="add nodes with `ray start --address=HEAD:6379`; `ray status` shows what is free",
        )


def _ask_cluster(resource: str) -> int:
    command = [sys.executable, "-m", __name__, resource]
    try:
        child = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S)
        answer = json.loads(child.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        answer = {"error": f"{type(error).__name__}: no answer from the cluster"}
    if "error" in answer:
        raise CalibrationError(
            "no Ray cluster can be reached",
            where=f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', 'auto')}",
            why=answer["error"],
            fix="start it: `ray start --head --port=6379` on this node, `ray start --address=HEAD:6379` on the others",
        )
    return int(answer["available"])


def main(resource: str) -> int:
    """Print how much of `resource` is free."""
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        host, colon, port = address.rpartition(":")
        if colon and port.isdecimal() and "//" not in host:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        answer: dict[str, object] = {"available": int(ray.available_resources().get(resource, 0))}
    except Exception as error:  # Ray raises many unrelated types
        answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

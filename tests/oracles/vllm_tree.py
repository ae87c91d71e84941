"""What vLLM calls the modules of a checkpoint: its own `named_modules()`, on CPU.

Run as a child process, because vLLM keeps global state:

    python vllm_tree_oracle.py TREES.json DIR...

builds each checkpoint's vLLM model (random weights, one gloo rank, no engine) and
writes {DIR: [[module name, class name], ...]} in `named_modules()` order.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

Tree = list[tuple[str, str]]


def read_vllm_trees(directories: Sequence[Path]) -> dict[Path, Tree]:
    """Return (module name, class name) of every module of each checkpoint, in vLLM's order.

    Raises:
        RuntimeError: the child process failed; carries its stderr.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "trees.json"
        command = [sys.executable, __file__, str(answer), *map(str, directories)]
        child = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
        if child.returncode != 0:
            raise RuntimeError(f"vLLM could not build the models:\n{child.stderr[-4000:]}")
        trees = json.loads(answer.read_text())
    return {directory: [(name, cls) for name, cls in trees[str(directory)]] for directory in directories}


def _build_trees(directories: Sequence[str]) -> dict[str, Tree]:
    """Build every model in this process; call it in a fresh one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    _import_model_classes(directories)
    trees: dict[str, Tree] = {}
    for directory in directories:
        arguments = EngineArgs(model=directory, dtype="bfloat16", enforce_eager=True, max_model_len=256)
        config = arguments.create_engine_config()
        with set_current_vllm_config(config):
            if not trees:
                init_distributed_environment(
                    1, 0, f"file://{tempfile.mkdtemp()}/rendezvous", local_rank=0, backend="gloo"
                )
            destroy_model_parallel()  # of the model before, which may have had no group of experts
            initialize_model_parallel(1)
            model = initialize_model(config)
        trees[directory] = [(name, type(module).__name__) for name, module in model.named_modules()]
    return trees


def _import_model_classes(directories: Sequence[str]) -> None:
    """Load the model classes here, or vLLM starts a process of 15 seconds to look at each."""
    from vllm import ModelRegistry

    configs = [json.loads((Path(directory) / "config.json").read_text()) for directory in directories]
    names = {name for config in configs for name in config["architectures"]} | {"TransformersForCausalLM"}
    for name in sorted(names):
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(_build_trees(sys.argv[2:])))

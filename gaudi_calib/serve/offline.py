"""vLLM's `LLM` with a calibration, for Python."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gaudi_calib.engines.detect import detect_apart
from gaudi_calib.engines.vllm_runner.child import open_engine
from gaudi_calib.files import expand_path
from gaudi_calib.serve.arguments import Asked
from gaudi_calib.serve.command import ServeOptions, plan_engine

_log = logging.getLogger(__name__)


@contextmanager
def open_llm(
    model: str | os.PathLike[str],
    *,
    quant_config: str | os.PathLike[str] | None = None,
    tensor_parallel_size: int = 1,
    device: str | None = None,
    expert_parallel: bool | None = None,
    **engine_args: Any,
) -> Iterator[Any]:
    """Yield a vLLM `LLM` that serves `model` in FP8, and shut it down whatever happens.

    Checks what `gaudi-calib serve` checks. The environment variables that the engine needs are set
    inside the block.

    Args:
        model: directory or hub name of the checkpoint.
        quant_config: `OUT/<model>/maxabs_quant_<device>.json`; None for a checkpoint that is
            quantized with AWQ, GPTQ, compressed-tensors or FP8.
        tensor_parallel_size: number of ranks.
        device: `g2` or `g3`, where the files must be that one's.
        expert_parallel: ranks hold whole experts; None: as the files were made.
        engine_args: further arguments of `LLM`.

    Raises:
        CalibrationError: the calibration does not fit; see `require_fit`.
        UsageError: one of `engine_args` contradicts the calibration.

    Example:
        with gaudi_calib.open_llm("llama", quant_config="out/llama/maxabs_quant_g3.json") as llm:
            print(llm.generate("Paris is")[0].outputs[0].text)
    """
    options = ServeOptions(
        os.path.expanduser(model),
        None if quant_config is None else expand_path(quant_config),
        tensor_parallel_size,
        device,
        expert_parallel,
    )
    asked = [Asked(f"{name}={value!r}", name, value) for name, value in engine_args.items()]
    settings, note, warnings = plan_engine(options, detect_apart(), asked)
    _log.info("%s", note)
    for warning in warnings:
        _log.warning("%s", warning)
    with _environment(settings.env), open_engine(options.model, {**settings.args, **engine_args}) as llm:
        yield llm


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

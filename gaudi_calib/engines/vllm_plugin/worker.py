"""What the runner can ask of vLLM's workers with `llm.collective_rpc(NAME)`; the answers come by rank."""

from collections.abc import Callable
from typing import Any

from gaudi_calib.errors import ConfigError


class WorkerExtension:
    """Methods that vLLM adds to its worker class: `worker_extension_cls=WORKER_EXTENSION`.

    Each raises ConfigError where the engine does not measure.
    """

    vllm_config: Any
    get_model: Callable[[], Any]

    def reset_ranges(self) -> None:
        """Forget what was observed so far."""
        from gaudi_calib.engines.vllm_plugin.collect import reset_modules

        _find_session(self.vllm_config)
        reset_modules(self.get_model())

    def save_ranges(self) -> list[str]:
        """Write this rank's ranges where `dump_stats_path` says.

        Returns:
            The files written: json, npz and _mod_list.json.

        Raises:
            RangeError: nothing was measured, or a range is not finite; nothing is written.
            ModelError: vLLM names a module otherwise than expected.
        """
        from gaudi_calib.checkpoints.plan import plan_model
        from gaudi_calib.engines.vllm_plugin.collect import collect_ranges
        from gaudi_calib.models.source import download_model
        from gaudi_calib.rankfiles.store import write_rank_set

        session = _find_session(self.vllm_config)
        plan = plan_model(download_model(self.vllm_config.model_config.model))
        rank, world = session.find_rank()
        ranges = collect_ranges(self.get_model(), plan, session, rank, world)
        session.placed.path.mkdir(parents=True, exist_ok=True)
        return [str(path) for path in write_rank_set(session.placed.path, ranges)]


def _find_session(vllm_config: Any) -> Any:
    session = getattr(vllm_config.quant_config, "session", None)
    if session is None or not session.measures:
        raise ConfigError(
            "this engine does not measure",
            where=None if session is None else session.path,
            fix="start it with quantization='gaudi_fp8' and QUANT_CONFIG=maxabs_measure_<device>.json",
        )
    return session

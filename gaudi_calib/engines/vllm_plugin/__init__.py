"""vLLM plugin: quantization method `gaudi_fp8`, which reads the QUANT_CONFIG that INC reads on a Gaudi.

    QUANT_CONFIG=OUT/<model>/maxabs_quant_g3.json
    LLM(model, quantization="gaudi_fp8", enforce_eager=True)

On CPU and CUDA, with a MEASURE config, it observes vLLM's own modules, every rank its own;
`collective_rpc("save_ranges")` then writes each rank's INC files (`engines.WORKER_EXTENSION` has to
be given as `worker_extension_cls`). With a QUANTIZE config it computes what the target device would.

vLLM calls `register` in every process (entry point `vllm.general_plugins`). Nothing else
happens, and nothing heavy is imported, unless that quantization is asked for.

    quantization  the method's entry: which module is observed, quantized or left alone
    session       what the modules of one process share: config, device, rank, whether a pass counts
    linear, attention, experts      the modules
    sequences     tokens and keys of a pass by sequence, with keys kept beside vLLM's cache
    fp8_*         the modules, computed as the target device would
    scales        scales of a rank's nodes, from its files
    collect       from what was observed to a rank's files
    worker        what can be asked of workers
"""

from gaudi_calib.engines import QUANTIZATION


def register() -> None:
    """Make `gaudi_fp8` known to vLLM; may be called any number of times."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from gaudi_calib.engines.vllm_plugin.quantization import GaudiFp8Config

    register_quantization_config(QUANTIZATION)(GaudiFp8Config)

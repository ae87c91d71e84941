"""What runs a model; nothing here loads torch before it is used.

detect          what runs now: a Gaudi, a GPU or the CPU
observe/        what both engines share: peaks, attention, its nodes, the FP8 cast
torch/          Hugging Face modules, streamed layer by layer: the default off a Gaudi
vllm_runner/    vLLM in processes of its own
vllm_plugin/    what this package does inside vLLM where there is no Gaudi
"""

# The plugin's quantization method, and the class that adds what can be asked of vLLM's workers.
QUANTIZATION = "gaudi_fp8"
WORKER_EXTENSION = "gaudi_calib.engines.vllm_plugin.worker.WorkerExtension"

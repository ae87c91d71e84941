"""Serving a calibrated model: `vllm serve` with what its QUANT_CONFIG needs, after everything was checked.

checkpoint.py    what the model is: its family, a quantization method of its own
calibration.py   whether QUANT_CONFIG and the files behind it fit the model, the device and the ranks
command.py       the command and its environment
offline.py       the same for Python: `open_llm`
"""

"""Calibrate large language models for FP8 inference on Intel Gaudi 2 and 3.

with gaudi_calib.open_llm("llama", quant_config="out/llama/maxabs_quant_g3.json") as llm:
    print(llm.generate("Paris is")[0].outputs[0].text)
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["open_llm"]

# Name -> module that has it, imported when the name is used: `import gaudi_calib` loads nothing else.
_LAZY = {"open_llm": "gaudi_calib.serve.offline"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

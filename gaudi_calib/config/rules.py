"""What INC refuses in a QUANT_CONFIG, and what it changes without saying so.

Source: INC `Fp8cfg.parse`, fp8_quant/_quant_common/quant_config.py (3.10), and
vllm-gaudi's model runner, which calls INC.
"""

import os
import re
from collections.abc import Callable, Iterator

from gaudi_calib.config.method_form import MethodForm
from gaudi_calib.config.methods import DYNAMIC_BACKOFF, SCALE_METHODS
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.errors import Finding
from gaudi_calib.files import explain_impossible

Rule = Callable[[QuantConfig], Iterator[Finding]]


def find_errors(config: QuantConfig) -> list[Finding]:
    """Return every rule of INC that `config` breaks."""
    rules: tuple[Rule, ...] = (
        _check_mode,
        _check_dynamic,
        _check_patterns,
        _check_path,
        _check_backoffs,
        _check_allreduce,
        _check_observer,
    )
    return [finding for rule in rules for finding in rule(config)]


def find_warnings(config: QuantConfig) -> list[Finding]:
    """Return what INC or vllm-gaudi silently changes or ignores in a valid `config`, and what the caller must set."""
    rules: tuple[Rule, ...] = (
        _warn_scale_format,
        _warn_backoffs,
        _warn_method_table,
        warn_of_environment,
        _warn_ignored,
        _warn_types,
        _warn_observer,
    )
    return [finding for rule in rules for finding in rule(config)]


def _check_mode(config: QuantConfig) -> Iterator[Finding]:
    if "mode" not in config.model_fields_set:
        yield Finding(
            "mode",
            "mode is missing",
            "INC takes QUANTIZE, and vllm-gaudi refuses the file",
            'add "mode": "QUANTIZE", or "MEASURE" to measure',
        )


def _check_dynamic(config: QuantConfig) -> Iterator[Finding]:
    if not config.dynamic_quantization:
        for name in dict.fromkeys(method.name for method in config.method_table.methods if method.is_dynamic_only):
            yield Finding(
                "scale_method",
                f"{name.lower()} works only with dynamic quantization",
                "its activation scales are computed while serving",
                'add "dynamic_quantization": true, or choose a static method',
            )
        return
    for key in ("use_qdq", "fake_quant", "row_parallel_linear_allreduce_quantization"):
        if getattr(config, key):
            yield Finding(key, f"{key} does not work with dynamic_quantization", fix=f"remove {key}")
    if config.mode != "QUANTIZE":
        yield Finding(
            "mode",
            f"mode {config.mode} does not work with dynamic_quantization",
            "dynamic quantization has nothing to measure",
            'use "mode": "QUANTIZE"',
        )
    for where, method in config.method_table.entries():
        if not method.allows_dynamic:
            kind = "fixed" if method.is_fixed else "hardware-aligned activation"
            yield Finding(
                "scale_method" if where == "default" else f"scale_method.{where}",
                f"{kind} scales do not work with dynamic_quantization",
                fix="choose act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw or maxabs_pcs_pow2",
            )


def _check_patterns(config: QuantConfig) -> Iterator[Finding]:
    for key in ("allowlist", "blocklist"):
        for pattern in getattr(config, key).names:
            try:
                re.compile(pattern)
            except re.error as error:
                yield Finding(
                    f"{key}.names",
                    f"{pattern!r} is not a regular expression",
                    f"{error}; INC searches every node's name with it",
                    r"escape special characters with \\, for instance mlp\\.gate\\b in JSON",
                )


def _check_path(config: QuantConfig) -> Iterator[Finding]:
    directory, name = os.path.split(config.dump_stats_path)
    if config.uses_stats_files and not (directory and name):
        yield Finding(
            "dump_stats_path",
            f"dump_stats_path {config.dump_stats_path!r} is not a directory followed by a file prefix",
            "INC puts the files of all ranks in the directory and starts their names with the prefix",
            "write a path such as /data/out/g3/inc_output",
        )
    impossible = explain_impossible(directory)
    if impossible is not None:
        yield Finding(
            "dump_stats_path",
            "no file can be at dump_stats_path",
            impossible,
            "write a path such as /data/out/g3/inc_output",
        )


def _check_backoffs(config: QuantConfig) -> Iterator[Finding]:
    if isinstance(config.scale_method, MethodForm) and config.scale_params.model_fields_set:
        yield Finding(
            "scale_params",
            "backoffs are given twice",
            "scale_method is a dict, and INC ignores scale_params",
            'remove scale_params and put "backoff" into weight and activation of scale_method',
        )


def _check_allreduce(config: QuantConfig) -> Iterator[Finding]:
    if config.row_parallel_linear_allreduce_quantization and not config.dynamic_quantization:
        yield Finding(
            "row_parallel_linear_allreduce_quantization",
            "row_parallel_linear_allreduce_quantization crashes INC 3.10",
            fix="remove it",
        )


def _check_observer(config: QuantConfig) -> Iterator[Finding]:
    if config.mode == "QUANTIZE" and config.uses_stats_files and config.observer in ("shape", "save"):
        yield Finding(
            "observer",
            f"observer {config.observer} leaves no ranges to quantize from",
            fix='use "observer": "maxabs"',
        )


def _warn_scale_format(config: QuantConfig) -> Iterator[Finding]:
    if config.scale_format != "SCALAR" or "scale_format" not in config.model_fields_set:
        return
    reasons = {
        "per-channel scales": any(method.is_per_channel for method in config.method_table.methods),
        "fake_quant": config.fake_quant,
        "dynamic_quantization": config.dynamic_quantization,
    }
    for reason, applies in reasons.items():
        if applies:
            yield Finding(
                "scale_format",
                f"INC changes scale_format SCALAR to CONST because of {reason}",
                fix='write "scale_format": "CONST"',
            )
            return


def _warn_backoffs(config: QuantConfig) -> Iterator[Finding]:
    if not config.scale_params.model_fields_set:
        return
    yield Finding(
        "scale_params",
        "INC 3.5 and later ignore the backoffs of scale_params",
        "they read backoffs only from a scale_method written as a dict",
        "nothing for files that gaudi-calib writes (it spells out the dict); else write the dict form yourself",
    )
    if config.dynamic_quantization and config.scale_params.input_backoff is not None:
        yield Finding("scale_params.input_backoff", "dynamic quantization uses its own input backoff", fix="remove it")
    method = config.method_table.default
    for key, scaling in (("input_backoff", method.activation), ("weight_backoff", method.weight)):
        if key in config.scale_params.model_fields_set and not scaling.uses_backoff:
            yield Finding(f"scale_params.{key}", f"{method.name.lower()} has no such backoff", fix="remove it")


def _warn_method_table(config: QuantConfig) -> Iterator[Finding]:
    form = config.scale_method
    if not isinstance(form, MethodForm):
        return
    method = SCALE_METHODS[config.method_table.file_tag]
    for part in ("weight", "activation"):
        default, entry = getattr(method, part).backoff, getattr(form.default, part)
        if part == "activation" and config.dynamic_quantization:
            if "backoff" in entry.model_fields_set and entry.backoff != DYNAMIC_BACKOFF:
                yield Finding(
                    f"scale_method.default.{part}.backoff",
                    f"INC takes {DYNAMIC_BACKOFF}, not the {entry.backoff} given",
                    "dynamic quantization uses its own input backoff",
                    "remove it",
                )
        elif "backoff" not in entry.model_fields_set and default != 1.0:
            yield Finding(
                f"scale_method.default.{part}.backoff",
                f"no backoff is given: INC takes 1.0, not the {default} of {method.name.lower()}",
                fix=f'add "backoff": {default}',
            )
    if "recalc_scales" in config.model_fields_set and not config.recalc_scales:
        yield Finding(
            "recalc_scales",
            "scales of an earlier run are used although the dict may have changed",
            "the name of a scale file tells only the default method",
            "remove recalc_scales; INC then recalculates for a dict",
        )


def warn_of_environment(config: QuantConfig) -> Iterator[Finding]:
    """Yield what must be set in the environment; `serve` does that."""
    env = config.list_required_env() if config.mode == "QUANTIZE" else {}
    if "VLLM_DYNAMIC_KV_QUANT" in env:
        yield Finding(
            "dynamic_quantization",
            "KV caches that are not blocked need VLLM_DYNAMIC_KV_QUANT=1 in the environment",
            "vllm-gaudi then keeps a scale beside every entry, and INC stops without; latent attention has no such "
            "scales, and its caches are to be blocked",
            'export VLLM_DYNAMIC_KV_QUANT=1 before serving, or add "VLLMKVCache" to blocklist.types',
        )
    if "RUNTIME_SCALE_PATCHING" in env:
        yield Finding(
            "scale_method",
            f"{config.method_table.file_tag.lower()} needs RUNTIME_SCALE_PATCHING=0 in the environment",
            "vllm-gaudi sets it to 1, and INC then stops at per-channel scales",
            "export RUNTIME_SCALE_PATCHING=0 before serving",
        )


def _warn_ignored(config: QuantConfig) -> Iterator[Finding]:
    if config.measure_exclude not in ("NONE", "OUTPUT"):
        meaning = (
            "NONE: everything is measured" if config.measures_outputs else "OUTPUT: inputs and weights are measured"
        )
        yield Finding(
            "measure_exclude",
            f"INC treats measure_exclude {config.measure_exclude} as {meaning}",
            fix="use NONE or OUTPUT",
        )
    if config.ignore_modules_wo_measures:
        yield Finding(
            "ignore_modules_wo_measures",
            "modules without ranges silently stay in BF16",
            fix="leave it out to be told at the first call of such a module",
        )
    if config.mode == "QUANTIZE" and config.hp_dtype != "BF16" and config.method_table.tries_scales:
        yield Finding(
            "scale_method",
            f"gaudi-calib computes {config.method_table.file_tag.lower()} for hp_dtype BF16 only",
            fix="choose a method without OPT, such as maxabs_hw; or leave these scales to INC",
        )
    if config.fp8_config == "E5M2":
        yield Finding("fp8_config", "gaudi-calib computes scales for E4M3 only", fix="leave E5M2 scales to INC")


def _warn_types(config: QuantConfig) -> Iterator[Finding]:
    for key in ("allowlist", "blocklist"):
        for name in getattr(config, key).types:
            if "." in name:
                yield Finding(
                    f"{key}.types",
                    f"{name!r} matches no module",
                    "INC compares with the bare class name",
                    f"write {name.rpartition('.')[2]!r}",
                )


def _warn_observer(config: QuantConfig) -> Iterator[Finding]:
    if config.observer == "maxabs_per_channel" and config.mode == "MEASURE":
        yield Finding(
            "observer",
            "maxabs_per_channel needs the files of an earlier run of INC with mode SHAPE in the same place",
            "vllm-gaudi runs no such mode",
            'use "observer": "maxabs"',
        )
    elif config.observer == "save" and config.mode == "MEASURE":
        yield Finding("observer", "save stores every tensor, not ranges", fix='use "observer": "maxabs" to calibrate')

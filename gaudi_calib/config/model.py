"""The attributes of a QUANT_CONFIG, their values, and what follows from them.

Source: INC `Fp8cfg.parse`, fp8_quant/_quant_common/quant_config.py (3.10), and
`should_quantize`, fp8_quant/_core/utils.py.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, field_serializer

from gaudi_calib.config.method_form import (
    MethodForm,
    OneOf,
    PositiveFloat,
    RuleError,
    StrictModel,
    build_table,
    quote,
    spell_out,
)
from gaudi_calib.config.methods import SCALE_METHODS, MethodTable, ScaleMethod
from gaudi_calib.errors import ConfigError, Finding
from gaudi_calib.fp8 import GAUDI2, GAUDI3, HP_DTYPES, Device, get_device

# What vllm-gaudi runs; INC alone also knows NONE, SHAPE and LOAD.
MODES = ("QUANTIZE", "MEASURE")
# Keys of INC's own files and of older ones that INC's parser takes, and why they change nothing.
UNREAD_KEYS = {
    "_json_file": "INC puts the path of the file there itself",
    "non_tunable_params": "only INC's tuning of its own configs reads it",
    "mod_dict": "INC fills it itself, and refuses modules of one's own",
    "local_rank": "INC asks torch.distributed for the rank",
    "global_rank": "it only becomes GlobalRank of the files of ranges, which nobody reads",
    "int4_weights": "INC reads it no more: it asks the checkpoint whether weights are 4 bits wide",
    "dump_stats_xlsx_path": "no INC that was published reads it",
}
# Classes of modules that stay as they are with `dynamic_quantization`: INC scales them from ranges only.
# Source: INC `_mod_default_dict`, fp8_quant/_core/patching_common.py.
STATIC_TYPES = frozenset(
    {
        "BlockSoftmaxConstMax",
        "Conv2d",
        "GaudiDeepseekV3MoE",
        "GaudiFP8Linear",
        "GaudiMixtralSparseMoeBlock",
        "KVCache",
        "LoRACompatibleConv",
        "ModuleFusedSDPA",
        "Softmax",
    }
)
# Stands for all caches where no list of nodes is at hand.
_ANY_CACHE = "model.layers.0.self_attn.attn.impl.k_cache"


def _read_flag(value: object) -> object:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise ValueError("use true or false")


def _read_count(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _read_mode(value: object) -> object:
    if value in MODES:
        return value
    meant = str(value).upper()
    finding = Finding(
        "mode",
        f"mode cannot be {quote(value)}",
        f"vllm-gaudi knows {' and '.join(MODES)}, compares the text as it stands, and refuses any other",
        f'write "mode": "{meant}"' if meant in MODES else 'write "mode": "QUANTIZE", or "MEASURE" to measure',
    )
    raise RuleError([finding])


def _refuse_null(value: object) -> object:
    if value is None:
        raise ValueError("leave the key out")
    return value


def _refuse_bare_list(value: object) -> object:
    if isinstance(value, str | list | tuple):
        raise ValueError('use an object such as {"types": [], "names": ["lm_head"]}')
    return value


Mode = Annotated[str, BeforeValidator(_read_mode), WithJsonSchema({"type": "string", "enum": list(MODES)})]
Flag = Annotated[
    bool, BeforeValidator(_read_flag), WithJsonSchema({"enum": [True, False, "true", "false", "True", "False"]})
]


class NodeFilter(StrictModel):
    """`allowlist` or `blocklist`.

    Attributes:
        types: class names of modules, compared as a whole.
        names: regular expressions searched in node names.
    """

    types: list[str] = Field(default_factory=list)
    names: list[str] = Field(default_factory=list)


class ScaleParams(StrictModel):
    """The documented way to change backoffs, which INC ignores since 3.5."""

    input_backoff: Annotated[PositiveFloat | None, BeforeValidator(_refuse_null)] = None
    weight_backoff: Annotated[PositiveFloat | None, BeforeValidator(_refuse_null)] = None


Filter = Annotated[NodeFilter, BeforeValidator(_refuse_bare_list)]
ScaleMethodField = Annotated[
    Annotated[str, OneOf(*SCALE_METHODS), Tag("name")] | Annotated[MethodForm, Tag("table")],
    Discriminator(lambda value: "table" if isinstance(value, dict | MethodForm) else "name"),
]


class QuantConfig(StrictModel):
    """A QUANT_CONFIG whose values are possible one by one; `parse_quant_config` makes one that also obeys the rules.

    Defaults are INC's. The order of the fields is that of the file. Upper case inside
    (`MAXABS_HW`), the reference's spelling in the file (`maxabs_hw`).
    """

    method: Annotated[str, OneOf("HOOKS")] = "HOOKS"
    mode: Mode = "QUANTIZE"
    observer: Annotated[str, OneOf("maxabs", "maxabs_per_channel", "shape", "save", exact_case=True)] = "maxabs"
    scale_method: ScaleMethodField = "MAXABS_HW"
    scale_format: Annotated[str, OneOf("CONST", "SCALAR")] = "SCALAR"
    dynamic_quantization: Flag = False
    allowlist: Filter = NodeFilter()
    blocklist: Filter = NodeFilter()
    quantize_weight: Flag = True
    dump_stats_path: str = "stats"
    calibration_sample_interval: Annotated[int, BeforeValidator(_read_count), Field(ge=0)] = 0
    measure_exclude: Annotated[str, OneOf("NONE", "INPUT", "OUTPUT", "PARAMS", "ALL")] = "OUTPUT"
    use_qdq: Flag = False
    fake_quant: Flag = False
    ignore_modules_wo_measures: Flag = False
    recalc_scales: Flag = False
    scale_params: ScaleParams = ScaleParams()
    device_for_scales: Annotated[str | None, OneOf("GAUDI2", "GAUDI3")] = None
    fp8_config: Annotated[str, OneOf("E4M3", "E5M2")] = "E4M3"
    hp_dtype: Annotated[str, OneOf(*HP_DTYPES.values())] = "BF16"
    measure_on_hpu: Flag = True
    seperate_measure_files: Flag = True  # INC's spelling
    row_parallel_linear_allreduce_quantization: Flag = False

    @field_serializer("scale_method")
    def _write_scale_method(self, value: str | MethodForm) -> Any:
        return value.model_dump(exclude_unset=True) if isinstance(value, MethodForm) else value.lower()

    @field_serializer("scale_format")
    def _write_scale_format(self, value: str) -> str:
        return "scalar" if value == "SCALAR" else value

    @field_serializer("allowlist", "blocklist")
    def _write_filter(self, value: NodeFilter) -> dict[str, list[str]]:
        return {"types": value.types, "names": value.names}

    @property
    def explicit_method(self) -> str | MethodForm:
        """`scale_method` with the backoffs of `scale_params` in it, the form that INC obeys and that is written.

        Backoffs that the method does not use, or has anyway, leave no trace.
        """
        if isinstance(self.scale_method, MethodForm):
            return self.scale_method
        published, given = SCALE_METHODS[self.scale_method], self.scale_params
        weight = published.weight.with_backoff(given.weight_backoff)
        activation = published.activation
        if not self.dynamic_quantization:
            activation = activation.with_backoff(given.input_backoff)
        method = ScaleMethod(published.name, weight, activation)
        return self.scale_method if method == published else spell_out(method)

    @property
    def method_table(self) -> MethodTable:
        """The scale method of every node, with the backoffs that INC uses."""
        table = build_table(self.explicit_method)
        return table.for_dynamic() if self.dynamic_quantization else table

    @property
    def uses_stats_files(self) -> bool:
        """Whether INC reads or writes ranges: not for fixed scales, not for dynamic ones."""
        fixed = all(method.is_fixed for method in self.method_table.methods)
        return not ((self.dynamic_quantization or fixed) and self.mode == "QUANTIZE")

    @property
    def measures_outputs(self) -> bool:
        """Whether INC measures every output, not only those it computes scales from."""
        return self.measure_exclude not in ("OUTPUT", "ALL")

    @property
    def dtype(self) -> str:
        """What the model is served in, as vLLM calls it."""
        return next(dtype for dtype, hp_dtype in HP_DTYPES.items() if hp_dtype == self.hp_dtype)

    def quantizes_caches(self, caches: Iterable[str] | None = None) -> bool:
        """Whether INC quantizes any of the KV caches called `caches`; None: one that is called as in most models."""
        names = [_ANY_CACHE] if caches is None else caches
        return any(not self.is_blocked(name, "VLLMKVCache") for name in names)

    def list_required_env(self, caches: Iterable[str] | None = None) -> dict[str, str]:
        """Return the environment variables without which serving with this config fails; see `quantizes_caches`."""
        if self.dynamic_quantization:
            # Source: INC `PatchedVLLMKVCache`, fp8_quant/_quant_common/helper_modules.py.
            return {"VLLM_DYNAMIC_KV_QUANT": "1"} if self.quantizes_caches(caches) else {}
        return {"RUNTIME_SCALE_PATCHING": "0"} if self.method_table.default.is_per_channel else {}

    def is_blocked(self, name: str, class_name: str | None = None) -> bool:
        """Tell whether INC leaves node `name` alone.

        Args:
            name: the node's name.
            class_name: class of its module, to apply the lists of types.

        >>> QuantConfig(blocklist={"names": ["lm_head"]}, dump_stats_path="out/inc").is_blocked("lm_head")
        True
        """
        if self.dynamic_quantization and class_name in STATIC_TYPES:
            return True
        allow, block = self.allowlist, self.blocklist
        allowed = not (allow.types or allow.names) or class_name in allow.types or _matches_any(allow.names, name)
        return not allowed or class_name in block.types or _matches_any(block.names, name)


def _matches_any(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def find_idle_patterns(config: QuantConfig, names: Iterable[str], expected: Collection[str] = ()) -> list[Finding]:
    """Return a finding for every name pattern of `config` that matches none of `names`.

    Args:
        names: all node names of the model, blocked ones included.
        expected: patterns that need not match.
    """
    nodes = list(names)
    return [
        Finding(
            f"{key}.names",
            f"pattern {pattern!r} matches no node of the model",
            fix="correct or remove it",
            kind="pattern-idle",
        )
        for key in ("allowlist", "blocklist")
        for pattern in getattr(config, key).names
        if pattern not in expected and not any(re.search(pattern, name) for name in nodes)
    ]


def get_scales_device(config: QuantConfig, device: Device) -> Device:
    """Return the device whose FP8 range and free scales apply when `device` serves.

    Raises:
        ConfigError: `device_for_scales` asks for something other than Gaudi 2 scales of
            MAXABS_HW on Gaudi 3.
    """
    if config.device_for_scales is None or config.device_for_scales == device.inc_name:
        return device
    chosen = get_device(config.device_for_scales)
    methods = config.method_table.methods
    if (chosen, device) != (GAUDI2, GAUDI3) or any(method.name != "MAXABS_HW" for method in methods):
        raise ConfigError(
            f"device_for_scales {config.device_for_scales} does not work on {device.name}"
            f" with {config.method_table.file_tag.lower()}",
            where="device_for_scales",
            why="INC overrides the device only for Gaudi 2 scales on Gaudi 3, with maxabs_hw",
            fix="remove device_for_scales",
        )
    return chosen


def with_dump_stats_path(config: QuantConfig, dump_stats_path: str | os.PathLike[str]) -> QuantConfig:
    """Return `config` with ranges and scales at `dump_stats_path` (made absolute)."""
    return config.model_copy(update={"dump_stats_path": os.path.abspath(dump_stats_path)})


def describe_dtype(dtype: str) -> dict[str, str]:
    """Return the keys of QUANT_CONFIG for a model that is served in `dtype`; none for bfloat16, INC's default."""
    return {} if dtype == "bfloat16" else {"hp_dtype": HP_DTYPES[dtype]}


def to_content(config: QuantConfig) -> dict[str, Any]:
    """Return what stands in the file: given keys only, backoffs in the form INC obeys."""
    shown: dict[str, Any] = {"mode": config.mode}
    if config.explicit_method != config.scale_method:
        shown["scale_method"] = config.explicit_method
    return config.model_copy(update=shown).model_dump(mode="json", exclude_unset=True, exclude={"scale_params"})


def describe_scaling(config: QuantConfig, device: Device) -> dict[str, Any]:
    """Return what scales depend on beside ranges and weights, as JSON values.

    The name of a scale file tells only the default method; a manifest records this too.

    Raises:
        ConfigError: `device` cannot serve with this config.
    """
    explicit = config.model_copy(update={"scale_method": config.explicit_method})
    return {
        "device": get_scales_device(config, device).name,
        "scale_method": to_content(explicit)["scale_method"],
        "fp8_config": config.fp8_config,
        "hp_dtype": config.hp_dtype,
    }


def describe_schema() -> Mapping[str, Any]:
    """Return the JSON schema of QUANT_CONFIG, for editors."""
    return QuantConfig.model_json_schema(mode="validation")

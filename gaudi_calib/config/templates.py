"""The files of `quantization_config/`: every published scale method and family rule.

`python -m gaudi_calib.config.templates` writes them anew.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gaudi_calib.config.file import write_quant_config
from gaudi_calib.config.methods import SCALE_METHODS
from gaudi_calib.config.model import QuantConfig
from gaudi_calib.config.presets import measure_config, quant_config
from gaudi_calib.models.families import FAMILIES, TEMPLATE_BLOCKLISTS, Family

TEMPLATE_PATH = "./hqt_output/measure"
_ANY_FAMILY = Family("default", (), FAMILIES[0].layout)


# Names that the reference gave to its templates; other methods are <method>_quant.json.
_TEMPLATE_NAMES = {
    "UNIT_SCALE": "unit_scale_quant",
    "MAXABS_HW": "maxabs_quant",
    "MAXABS_POW2": "pow2_quant",
    "MAXABS_ARBITRARY": "maxabs_quant_arbitrary",
    "MAXABS_HW_OPT_WEIGHT": "weight_opt_quant",
    "ACT_MAXABS_PCS_POW2_WEIGHT_MAXABS_PTS_POW2_HW": "maxabs_quant_dynamic_quantization",
    "MAXABS_PCS_POW2": "maxabs_quant_dynamic_quantization_weight_pcs_pow2",
}


def _template_overrides() -> Mapping[str, tuple[str, dict[str, Any]]]:
    """Name -> (scale method, overrides) of the templates that vary one setting."""
    return {
        "maxabs_quant_qdq": ("maxabs_hw", {"scale_format": "SCALAR", "use_qdq": True}),
        "maxabs_quant_scalar_scales": ("maxabs_hw", {"scale_format": "SCALAR"}),
        "maxabs_quant_dynamic_quantization_all_layers": (
            "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw",
            {"blocklist": {"types": [], "names": []}},
        ),
    }


def list_templates() -> dict[str, QuantConfig]:
    """Return every file of `quantization_config/` by name: 13 methods, the family rules, variations."""
    templates = {"maxabs_measure": measure_config(_ANY_FAMILY, TEMPLATE_PATH)}
    templates["maxabs_measure_include_outputs"] = measure_config(_ANY_FAMILY, TEMPLATE_PATH, measure_exclude="NONE")
    for method in SCALE_METHODS:
        name = _TEMPLATE_NAMES.get(method, f"{method.lower()}_quant")
        templates[name] = quant_config(_ANY_FAMILY, TEMPLATE_PATH, method)
    for name, (method, overrides) in _template_overrides().items():
        templates[name] = quant_config(_ANY_FAMILY, TEMPLATE_PATH, method, **overrides)
    for family in FAMILIES:
        if family.blocklist or family.scale_format:
            templates[f"maxabs_measure_{family.name}"] = measure_config(family, TEMPLATE_PATH)
            templates[f"maxabs_quant_{family.name}"] = quant_config(family, TEMPLATE_PATH)
    for name, blocklist in TEMPLATE_BLOCKLISTS.items():
        overrides = {"blocklist": {"types": [], "names": list(blocklist)}}
        templates[f"maxabs_quant_{name}"] = quant_config(_ANY_FAMILY, TEMPLATE_PATH, **overrides)
    return {f"{name}.json": _set_template_path(config) for name, config in templates.items()}


def _set_template_path(config: QuantConfig) -> QuantConfig:
    path = "" if config.dynamic_quantization else TEMPLATE_PATH
    return config.model_copy(update={"dump_stats_path": path})


def write_templates_dir(directory: Path) -> list[Path]:
    """Write the templates into `directory` and return their paths."""
    paths = []
    for name, config in sorted(list_templates().items()):
        write_quant_config(directory / name, config)
        paths.append(directory / name)
    return paths


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "quantization_config"
    print(f"wrote {len(write_templates_dir(target))} templates to {target}")

"""The rows of what the field sets: found by facts of config.json."""

import pytest

from gaudi_calib.models.families import find_family
from gaudi_calib.models.field import COMMON_ROW, FIELD_ROWS, find_row, serve_as_field
from tests.support import paths
from tests.support.model_configs import PUBLISHED_CONFIGS

ROWS = {
    "Qwen2-7B": "Qwen2-7B, Qwen2.5-7B, DeepSeek-R1-Distill-Qwen-7B",
    "Qwen3-8B": "Qwen3 but 32B",
    "Qwen3-14B": "Qwen3 but 32B",
    "Qwen3-30B-A3B": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "Qwen3-235B-A22B": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "Qwen3-Coder-480B-A35B": "Qwen3 but 32B",
    "GLM-4.5": "GLM-4.5",
    "GLM-4.5-Air": "GLM-4.5",
    "Mixtral-8x7B": "Mixtral",
    "Mixtral-8x22B": "Mixtral",
}


@pytest.mark.parametrize("model", PUBLISHED_CONFIGS)
def test_a_row_is_found_by_facts(model: str) -> None:
    """Models that the field names have their row, their siblings of another size and all others have none."""
    row = find_row(PUBLISHED_CONFIGS[model])
    assert (row and row.models) == ROWS.get(model)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": None},
        {"model_type": ["qwen2"], "num_hidden_layers": 28, "hidden_size": 3584},
        {"model_type": "qwen2", "num_hidden_layers": "28", "hidden_size": 3584},
        {"model_type": "qwen2", "num_hidden_layers": {}, "hidden_size": []},
        {"model_type": "mixtral-8x7b-instruct", "_name_or_path": "Qwen2-7B-Instruct"},
    ],
)
def test_a_config_that_says_something_else_has_no_row(config: dict) -> None:
    """Neither values of another kind nor names of models are taken for facts."""
    assert find_row(config) is None


def test_every_row_has_a_failure_with_sources_and_known_families() -> None:
    """What is told about a model can be looked up, and a row is of families that can be measured."""
    for row in FIELD_ROWS:
        assert row.failure and row.sources and all("#" in source for source in row.sources)
        assert row.model_types and all(find_family(model_type) for model_type in row.model_types)
    assert COMMON_ROW.failure is None and not COMMON_ROW.model_types


@pytest.mark.parametrize("model_type", ["llama4", "gpt_oss", "granitemoehybrid", "deepseek_v3"])
def test_what_no_engine_measures_stays_blocked(model_type: str) -> None:
    """A model without a row keeps the blocklist of its family, when it is measured and when it is served."""
    family = find_family(model_type)
    served = serve_as_field(family, None)
    assert set(served.blocklist) == {*COMMON_ROW.blocklist, *family.blocklist}
    assert served.measure_blocklist == family.blocklist and served.env == family.env


def test_the_page_on_families_has_every_row() -> None:
    """Its table has the models, the method, the format, the variables and the sources of each."""
    lines = (paths.ROOT / "docs" / "families.md").read_text().splitlines()
    for row in (*FIELD_ROWS, COMMON_ROW):
        (line,) = (line for line in lines if line.startswith(f"| {row.models} |"))
        words = (row.scale_method, row.scale_format.lower(), *row.model_types, *row.env)
        assert [word for word in words if word not in line] == []
        assert [source for source in row.sources if source.partition("#")[2] not in line] == []

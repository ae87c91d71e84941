"""What quantization `gaudi_fp8` refuses, and what it says: in engines where only an engine shows it."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.checkpoints.plan import plan_model
from gaudi_calib.config.check import parse_quant_config
from gaudi_calib.config.file import read_quant_config, write_quant_config
from gaudi_calib.config.presets import DYNAMIC_BLOCKED_TYPES
from gaudi_calib.engines.torch.measure import measure_channels
from gaudi_calib.engines.vllm_plugin.session import Session
from gaudi_calib.errors import ConfigError, FileError, ModelError, RangeError, TopologyError
from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.ranges.derive import derive_world
from gaudi_calib.ranges.node import Node
from gaudi_calib.ranges.topology import Topology
from gaudi_calib.rankfiles.store import write_rank_set
from tests.support.tiny import make_tiny_model

pytest.importorskip("vllm")
from tests.oracles.vllm_engine import EngineError, EngineTask, run_engines

pytestmark = [pytest.mark.torch, pytest.mark.vllm]

PROMPT = list(range(2, 20))


def write_config(directory: Path, device: str = "g3", **content: object) -> Path:
    """Write a QUANT_CONFIG beside the directory of `device`, and return its path."""
    (directory / device).mkdir(exist_ok=True, parents=True)
    content = {"mode": "QUANTIZE", "scale_method": "maxabs_hw", **content}
    config = parse_quant_config({"dump_stats_path": str(directory / device / "inc_output"), **content}, where="test")
    path = directory / f"maxabs_quant_{device}.json"
    write_quant_config(path, config)
    return path


def write_ranges(directory: Path, names: tuple[str, ...], device: str = "g3") -> None:
    """Write ranges of linear layers for one rank."""
    from gaudi_calib.ranges.node import RankSet

    one = np.ones(1, dtype=np.float32)
    write_rank_set(directory / device, RankSet(0, 1, {name: Node((one,), None, one) for name in names}, names, 1))


def open_session(path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("QUANT_CONFIG", str(path))
    return Session.from_environment()


def test_vllm_finds_the_plugin_and_it_stays_silent_and_light():
    """The entry point is there; registering twice is harmless, prints nothing and loads nothing of this package."""
    (entry,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "gaudi_fp8"]
    assert entry.value == "gaudi_calib.engines.vllm_plugin:register"
    code = (
        "import sys; from gaudi_calib.engines.vllm_plugin import register\n"
        "register(); register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config\n"
        "assert get_quantization_config('gaudi_fp8').__name__ == 'GaudiFp8Config'\n"
        "heavy = [name for name in sys.modules if name.startswith('gaudi_calib.')]\n"
        "assert 'gaudi_calib.config.model' not in heavy and 'gaudi_calib.checkpoints.plan' not in heavy, heavy\n"
    )
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "QUANT_CONFIG": "/nowhere"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "gaudi" not in child.stdout + child.stderr


def test_without_quant_config_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch):
    """The variable is the only input."""
    monkeypatch.delenv("QUANT_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="QUANT_CONFIG is not set"):
        Session.from_environment()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"mode": "MEASURE", "observer": "maxabs_per_channel"}, "observer maxabs_per_channel is not supported"),
        ({"mode": "MEASURE", "measure_exclude": "NONE"}, "measure_exclude NONE is not supported"),
        ({"fp8_config": "E5M2"}, "fp8_config E5M2 is not supported"),
    ],
    ids=["observer", "outputs", "format"],
)
def test_what_only_a_gaudi_can_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, object], what: str
):
    """Nothing is silently computed otherwise than asked for."""
    with pytest.raises(ConfigError, match=what):
        open_session(write_config(tmp_path, **content), monkeypatch)


def test_an_unreadable_config_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As for every other reader of the file."""
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        open_session(path, monkeypatch)


def test_quantizing_without_any_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before an engine starts; methods with fixed scales need none."""
    with pytest.raises(FileError, match="no ranges and no scales"):
        open_session(write_config(tmp_path), monkeypatch)
    assert open_session(write_config(tmp_path, scale_method="unit_scale"), monkeypatch).device is GAUDI3


def test_the_device_comes_from_the_files_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The directory's name, else the config's; otherwise nobody knows."""
    config = parse_quant_config(
        {"mode": "QUANTIZE", "dump_stats_path": str(tmp_path / "g2" / "inc_output")}, where="test"
    )
    assert Session(config, tmp_path / "any.json").device is GAUDI2
    config = parse_quant_config(
        {"mode": "QUANTIZE", "dump_stats_path": str(tmp_path / "x" / "inc_output")}, where="test"
    )
    assert Session(config, tmp_path / "maxabs_quant_g3.json").device is GAUDI3
    with pytest.raises(ConfigError, match="not known which Gaudi"):
        open_session(write_config(tmp_path, "x"), monkeypatch)


def test_a_session_travels_to_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """vLLM pickles it; devices are compared by identity afterwards."""
    write_ranges(tmp_path, ("lm_head",))
    session = pickle.loads(pickle.dumps(open_session(write_config(tmp_path), monkeypatch)))
    assert session.device is GAUDI3
    assert not session.measures


def test_a_node_without_measurement_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the rank's file and three ways out; `ignore_modules_wo_measures` leaves it in bfloat16, as in INC."""
    from gaudi_calib.engines.vllm_plugin.scales import ScaleSource, stand_in

    write_ranges(tmp_path, ("a.o_proj",))
    wanted = {"a.o_proj": stand_in(1), "b.o_proj": stand_in(1)}
    source = ScaleSource(open_session(write_config(tmp_path), monkeypatch))
    source.rank = (0, 1)
    with pytest.raises(RangeError, match=r"'b\.o_proj' is to be quantized and was not measured") as caught:
        source.find(wanted)
    assert "inc_output_hooks_maxabs_0_1.json" in str(caught.value.where)
    assert "blocklist" in str(caught.value.fix)
    source = ScaleSource(open_session(write_config(tmp_path, ignore_modules_wo_measures=True), monkeypatch))
    source.rank = (0, 1)
    assert list(source.find(wanted)) == ["a.o_proj"]


def test_a_rank_without_files_names_the_worlds_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The fix makes the files from what is there."""
    from gaudi_calib.engines.vllm_plugin.scales import ScaleSource, stand_in

    write_ranges(tmp_path, ("a.o_proj",))
    source = ScaleSource(open_session(write_config(tmp_path), monkeypatch))
    source.rank = (1, 4)
    with pytest.raises(FileError, match="rank 1 of 4") as caught:
        source.find({"a.o_proj": stand_in(1)})
    assert "world size 1" in str(caught.value.why)
    assert f"gaudi-calib expand {source.session.placed.path} -w 4 --from-world 1" in str(caught.value.fix)


def test_a_quantized_checkpoint_keeps_its_method():
    """Asked for on such a checkpoint, gaudi_fp8 says so; not asked for, it has no say."""
    from gaudi_calib.engines.vllm_plugin.quantization import GaudiFp8Config

    assert GaudiFp8Config.override_quantization_method({"quant_method": "fp8"}, None) is None
    assert GaudiFp8Config.override_quantization_method({"quant_method": "fp8"}, "fp8") is None
    with pytest.raises(ModelError, match=r"quantized already \(fp8\)"):
        GaudiFp8Config.override_quantization_method({"quant_method": "fp8"}, "gaudi_fp8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_vllm_may_serve_in_every_dtype_that_a_run_takes(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM asks the method before it loads a model."""
    import torch

    from gaudi_calib.engines.vllm_plugin.quantization import GaudiFp8Config

    write_ranges(tmp_path, ("lm_head",))
    monkeypatch.setenv("QUANT_CONFIG", str(write_config(tmp_path)))
    assert getattr(torch, dtype) in GaudiFp8Config().get_supported_act_dtypes()


def test_latent_attention_is_refused_unless_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Instead of leaving it silently in bfloat16."""
    from gaudi_calib.engines.vllm_plugin.quantization import GaudiFp8Config

    write_ranges(tmp_path, ("lm_head",))
    name = "model.layers.0.self_attn.mla_attn.mla_attn"
    monkeypatch.setenv("QUANT_CONFIG", str(write_config(tmp_path)))
    with pytest.raises(ConfigError, match="latent attention is not supported"):
        GaudiFp8Config()._refuse_latent(name)
    by_type = {"blocklist": {"types": list(DYNAMIC_BLOCKED_TYPES)}, "scale_method": "maxabs_pcs_pow2"}
    for content in ({"blocklist": {"names": ["mla_attn"]}}, {**by_type, "dynamic_quantization": True}):
        monkeypatch.setenv("QUANT_CONFIG", str(write_config(tmp_path, **content)))
        GaudiFp8Config()._refuse_latent(name)


def test_pipeline_parallel_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their files would be those of half a model."""
    import vllm.distributed as groups

    class Group:
        rank_in_group, world_size = 0, 2

    for name in ("get_pp_group", "get_dp_group", "get_tp_group"):
        monkeypatch.setattr(groups, name, Group)
    write_ranges(tmp_path, ("lm_head",))
    with pytest.raises(TopologyError, match="pipeline-parallel-size 2 is not supported"):
        open_session(write_config(tmp_path), monkeypatch).find_rank()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint, and a run directory with its ranges but for one layer's."""
    root = tmp_path_factory.mktemp("errors")
    model = make_tiny_model("llama", root / "model", num_hidden_layers=1)
    plan = plan_model(model)
    path = write_config(root / "run")
    config = read_quant_config(path)
    ranks = derive_world(measure_channels(model, [PROMPT], worlds=[1]), Topology(1), GAUDI3, config)[0]
    nodes = {name: node for name, node in ranks.nodes.items() if not name.endswith("down_proj")}
    assert len(nodes) < len(plan.node_names)
    write_rank_set(root / "run" / "g3", replace(ranks, nodes=nodes))
    return model, path


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        ({}, "node 'model.layers.0.mlp.down_proj' is to be quantized and was not measured"),
        ({"enforce_eager": False}, "quantization gaudi_fp8 needs enforce_eager"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 does not go with quantization gaudi_fp8"),
    ],
    ids=["unmeasured", "compiled", "cache"],
)
def test_an_engine_does_not_start(served: tuple[Path, Path], engine: dict[str, object], complaint: str):
    """It fails while it loads the model, with an error that says what to do."""
    model, path = served
    with pytest.raises(EngineError) as caught:
        run_engines([EngineTask(str(model), str(path), [PROMPT], engine=engine)])
    assert complaint in str(caught.value)
    assert "fix:" in str(caught.value)


def test_only_a_measuring_engine_saves_ranges(served: tuple[Path, Path]):
    """One that quantizes says so; with the unmeasured layer blocked, it runs."""
    model, path = served
    blocked = write_config(path.parent, blocklist={"types": [], "names": ["down_proj"]})
    with pytest.raises(EngineError, match="this engine does not measure"):
        run_engines([EngineTask(str(model), str(blocked), [PROMPT], saves=True)])

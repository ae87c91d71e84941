"""A calibration on a Gaudi, with what INC wrote on one (or a stand-in of it) in place of the engine.

The engine is the one part that cannot run here: `run_phase` is replaced by a copy of golden files, which
vllm-gaudi and INC left, to where QUANT_CONFIG of that phase points.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gaudi_calib.directory import CalibrationDir
from gaudi_calib.engines import detect
from gaudi_calib.engines.detect import Platform
from gaudi_calib.engines.vllm_runner import cluster, process
from gaudi_calib.engines.vllm_runner.phases import EngineOptions, Phase
from gaudi_calib.errors import CalibrationError, DataError, FileError, RangeError
from gaudi_calib.fp8 import GAUDI2
from gaudi_calib.layout import parse_rank_file
from gaudi_calib.manifest import read_manifest
from gaudi_calib.ranges.node import Node
from gaudi_calib.rankfiles.store import read_ranges, read_scales, write_rank_set
from gaudi_calib.runs.calibrate import calibrate, list_files, measure
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.serve.command import ServeOptions, plan_on_gaudi
from tests.support import paths
from tests.support.files import write_prompts

pytestmark = pytest.mark.torch

GOLDEN = paths.GOLDEN / "llama-tiny"


class FakeCards:
    """Stands in for the cards: phases leave the golden files, as far as `keep` says.

    Attributes:
        phases: what was run, in order.
        golden: the model's files.
    """

    def __init__(self) -> None:
        self.golden = GOLDEN
        self.phases: list[Phase] = []
        self.configs: list[dict] = []
        self.keep = lambda name: True
        self.edit = lambda path: None

    def run_phase(self, phase: Phase, log: Path) -> dict:
        self.phases.append(phase)
        config = json.loads(Path(phase.settings.env["QUANT_CONFIG"]).read_text())
        self.configs.append(config)
        target = Path(config["dump_stats_path"]).parent
        world = phase.settings.args["tensor_parallel_size"]
        for path in sorted((self.golden / f"tp{world}" / target.name).iterdir()):
            parts = parse_rank_file(path.name)
            is_scale = parts is not None and parts.method is not None
            if parts and is_scale == (phase.name == "quantize") and self.keep(path.name):
                shutil.copy(path, target / path.name)
                self.edit(target / path.name)
        return {"prompts": len(phase.prompts), "new_tokens": 0, "files": []}


@pytest.fixture
def cards(monkeypatch) -> FakeCards:
    fake = FakeCards()
    monkeypatch.setattr(detect, "detect_apart", lambda: Platform("hpu", GAUDI2))
    monkeypatch.setattr("gaudi_calib.runs.vllm_steps.find_spec", lambda name: True)
    monkeypatch.setattr(process, "run_phase", fake.run_phase)
    return fake


def options(out: Path, **changes) -> RunOptions:
    facts = {"dataset": {"dataset": str(write_prompts(out))}, "world": 2, "batch_size": 4}
    return RunOptions(**{"model": str(GOLDEN / "model"), "out": out, **facts, **changes})


def test_calibration_on_a_gaudi(cards, tmp_path):
    """MEASURE, then QUANTIZE; INC's ranges (postprocessed) and scales are the run's, and -r adds a world of its own."""
    result = calibrate(options(tmp_path, unified_world=1, engine_options=EngineOptions(max_new_tokens=5)))
    assert [phase.name for phase in cards.phases] == ["measure", "quantize"]
    assert [config["mode"] for config in cards.configs] == ["MEASURE", "QUANTIZE"]
    assert cards.phases[0].max_new_tokens == [5] * 8 and cards.phases[0].batch_size == 4
    directory = result.root / "g2"
    assert not (result.root / "g3").exists() and result.worlds == (1, 2)
    for rank in (0, 1):
        scales = f"inc_output_hooks_maxabs_MAXABS_HW_{rank}_2.npz"
        assert (directory / scales).read_bytes() == (GOLDEN / "tp2" / "g2" / scales).read_bytes()
    assert [CalibrationDir(directory).list_methods(world) for world in (1, 2)] == [["MAXABS_HW"]] * 2
    for ranks in (CalibrationDir(directory).read_world(2), CalibrationDir(directory).read_world(1)):
        for rank_set in ranks:
            impl = rank_set.nodes["model.layers.0.self_attn.attn.impl.matmul_qk"]
            cache = rank_set.nodes["model.layers.0.self_attn.attn.impl.k_cache"]
            assert impl.inputs[1] == cache.inputs[0]
    manifest = read_manifest(directory / "calibration_manifest.json")
    assert (manifest.engine, manifest.platform, manifest.measured_world) == ("vllm", "hpu", 2)
    assert CalibrationDir(directory).find_stale() == []
    assert str(directory / "inc_output") in result.quant_configs["g2"].read_text()
    assert sorted(str(path) for path in result.files) == sorted(
        str(path) for path in list_files(options(tmp_path, unified_world=1)) if path.name != "calibration_manifest.json"
    )


@pytest.mark.parametrize(
    "asked", [{"max_model_len": 20}, {"args": {"max_model_len": 20}}], ids=["option", "engine arg"]
)
def test_prompts_leave_room_for_a_new_token(cards, tmp_path, asked):
    """A prompt that fills a sequence is refused before vLLM starts, with its row; what is advised works."""
    data = write_prompts(tmp_path / "long.jsonl", [[1, 2], [3] * 20])
    wanted = options(tmp_path, dataset={"dataset": str(data)}, engine_options=EngineOptions(**asked))
    with pytest.raises(DataError, match="the prompt has 20 tokens, --max-model-len 20") as caught:
        measure(wanted)
    assert caught.value.where == f"{data}, row 2" and "--max-tokens 19" in caught.value.fix
    assert cards.phases == []
    for more, lengths in (({"max_tokens": 19}, [2, 19]), ({"skip_bad_rows": 1}, [2])):
        measure(replace(wanted, dataset={"dataset": str(data), **more}))
        assert [len(ids) for ids in cards.phases[-1].prompts] == lengths


def test_the_engine_gets_the_variables_of_the_preset(cards, tmp_path):
    """What the field sets for this model is set while it measures, too; the user's own value wins."""
    cards.golden = paths.GOLDEN / "mixtral-tiny"
    facts = {"model": str(cards.golden / "model"), "world": 1, "preset": "field"}
    measure(options(tmp_path, **facts))
    name = "VLLM_DISABLE_MARK_SCALES_AS_CONST"
    measure(options(tmp_path, **facts, engine_options=EngineOptions(env={name: "false"})))
    assert [phase.settings.env[name] for phase in cards.phases] == ["true", "false"]
    assert [config["blocklist"]["names"] for config in cards.configs] == [["lm_head"]] * 2


def test_measurement_of_another_engine_is_set_aside(cards, tmp_path):
    """Ranges by channel of an earlier torch run, and how they came about, would contradict the new ones."""
    calibrate(options(tmp_path, engine="torch", world=4, devices=("g2",)))
    result = measure(options(tmp_path))
    for name in ("channel_ranges.safetensors", "convergence.json"):
        assert [path.parent for path in result.root.rglob(name)] == [result.root / "replaced"]
    assert set(CalibrationDir(result.root / "g2").worlds) == {2}


def test_a_rank_wrote_nothing(cards, tmp_path):
    """A phase that ends well without a rank's file is a failed one."""
    cards.keep = lambda name: "_1_2" not in name
    with pytest.raises(FileError, match="no ranges of rank 1 of 2"):
        calibrate(options(tmp_path))
    cards.keep = lambda name: "MAXABS_HW_1_2" not in name
    with pytest.raises(FileError, match="rank 1 of 2 wrote no scales") as caught:
        calibrate(options(tmp_path))
    assert caught.value.where is not None and caught.value.where.endswith("g2/logs/quantize.log")
    assert list((tmp_path / "model").rglob("*.npz")) == []


def test_a_module_never_ran(cards, tmp_path):
    """Without decoding the attention matmuls have no ranges, and serving would fail: told now."""

    def forget_decode(path: Path) -> None:
        if path.name.endswith("mod_list.json") or path.suffix != ".json":
            return
        content = json.loads(path.read_text())
        content["Nodes"] = {name: node for name, node in content["Nodes"].items() if "matmul" not in name}
        path.write_text(json.dumps(content))
        path.with_suffix(".npz").unlink(missing_ok=True)

    cards.edit = forget_decode
    cards.keep = lambda name: name.endswith(".json")
    with pytest.raises(RangeError, match="16 modules of rank 0 of 2 never ran") as caught:
        measure(options(tmp_path))
    assert "--max-new-tokens" in caught.value.fix


def edit_ranges(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return what lets `change` alter the nodes of a rank's ranges, in the json and the npz that a card left."""

    def edit(path: Path) -> None:
        parts = parse_rank_file(path.name)
        if path.suffix == ".npz" and parts and parts.method is None:
            ranks = read_ranges(path.with_suffix(".json"))
            nodes = dict(ranks.nodes)
            change(nodes)
            write_rank_set(path.parent, replace(ranks, nodes=nodes))

    return edit


def calibrate_deepseek(cards: FakeCards, out: Path) -> Path:
    """Measure and quantize the golden DeepSeek on the cards, and return the directory of its files."""
    cards.golden = paths.GOLDEN / "deepseek-v3-fp8-tiny"
    result = calibrate(options(out, model=str(cards.golden / "model"), world=1))
    return result.root / "g2"


def test_modules_that_never_run_are_no_error(cards, tmp_path):
    """INC lists a second set of a DeepSeek's attention ops, which vLLM never calls; its files are taken as they are."""
    directory = calibrate_deepseek(cards, tmp_path)
    (ranks,) = CalibrationDir(directory).read_world(1)
    assert ranks.modules == tuple(
        json.loads((cards.golden / "tp1/g2/inc_output_hooks_maxabs_0_1_mod_list.json").read_text())
    )
    assert "model.layers.0.self_attn.mla_attn.mla_attn.matmul_qk" in {*ranks.modules} - {*ranks.nodes}


def test_a_module_beside_idle_ones_never_ran(cards, tmp_path):
    """One matmul that serving needs is missing among those that it does not: told, and only that one."""
    missing = "model.layers.1.self_attn.mla_attn.mla_attn.impl.matmul_av"
    cards.edit = edit_ranges(lambda nodes: nodes.pop(missing))
    with pytest.raises(RangeError, match=f"1 modules of rank 0 of 1 never ran: {missing}\n"):
        calibrate_deepseek(cards, tmp_path)
    cards.edit = edit_ranges(lambda nodes: nodes.pop("model.layers.1.mlp.experts.routed_experts.moe_op"))
    with pytest.raises(CalibrationError, match="experts"):
        calibrate_deepseek(cards, tmp_path)


@pytest.mark.parametrize("former", ["moe_op", "hpu_fused_moe.MoeOp"])
def test_idle_experts_of_older_vllm(cards, tmp_path, former):
    """Whatever the fused op is called, an expert without a token is found."""

    def rename(path: Path) -> None:
        if path.suffix == ".npz":
            ranks = read_ranges(path.with_suffix(".json"))
            nodes = {name.replace("routed_experts.moe_op", former): node for name, node in ranks.nodes.items()}
            op = next(name for name in nodes if name.endswith(former))
            nodes[op] = replace(nodes[op], outputs=(nodes[op].outputs[0], np.float32([0]), *nodes[op].outputs[2:]))
            write_rank_set(path.parent, replace(ranks, nodes=nodes, modules=tuple(nodes)))

    cards.golden, cards.edit = paths.GOLDEN / "deepseek-v3-fp8-tiny", rename
    cards.keep = lambda name: not name.endswith("mod_list.json")
    with pytest.raises(RangeError, match=rf"experts saw no token: .*{former} expert 0 \(rank 0\)"):
        measure(options(tmp_path, model=str(cards.golden / "model"), world=1, cold_experts="error"))


def test_naive_prompt_attention(cards, tmp_path):
    """The fused op is idle then, and infinity enters softmax: both are left as the cards left them."""

    def go_naive(nodes: dict) -> None:
        for name in [name for name in nodes if name.endswith("fused_scaled_dot_product_attention")]:
            softmax = f"{name.rpartition('.')[0]}.softmax"
            del nodes[name]
            nodes[softmax] = Node((np.float32([np.inf]),), (np.float32([1]),))

    cards.edit = edit_ranges(go_naive)
    directory = measure(options(tmp_path, unified_world=1)).root / "g2"
    for world in (2, 1):
        for rank in CalibrationDir(directory).read_world(world):
            assert rank.nodes["model.layers.0.self_attn.attn.impl.softmax"].inputs == (np.inf,)
    command = plan_on_gaudi(
        ServeOptions(str(GOLDEN / "model"), calibrate(options(tmp_path)).quant_configs["g2"], 2, "g2")
    )
    assert "serve" in command.argv


def test_what_the_cache_replaces_may_be_anything(cards, tmp_path):
    """A matmul reads blocks that nobody has written; its range is that of the cache in the end. The cache's counts."""
    impl = "model.layers.0.self_attn.attn.impl"

    def spoil(name: str, *values: float) -> Callable[[dict], None]:
        return lambda nodes: nodes.update({name: Node(tuple(np.float32([value]) for value in values))})

    cards.edit = edit_ranges(spoil(f"{impl}.matmul_qk", 1.0, np.nan))
    (nodes, _) = (rank.nodes for rank in CalibrationDir(measure(options(tmp_path)).root / "g2").read_world(2))
    assert nodes[f"{impl}.matmul_qk"].inputs[1] == nodes[f"{impl}.k_cache"].inputs[0]
    cards.edit = edit_ranges(spoil(f"{impl}.k_cache", np.nan))
    with pytest.raises(RangeError, match=f"{impl}.* is not finite"):
        measure(options(tmp_path))


def test_a_scale_is_not_finite(cards, tmp_path):
    """Scales are read back, too."""

    def spoil(path: Path) -> None:
        if path.suffix == ".npz" and "MAXABS_HW" in path.name:
            scales = read_scales(path.with_suffix(".json"))
            node = replace(scales.nodes["lm_head"], inputs=(float("inf"),))
            spoilt = replace(scales, nodes={**scales.nodes, "lm_head": node})
            write_rank_set(path.parent, spoilt, method="MAXABS_HW")

    cards.edit = spoil
    with pytest.raises(RangeError, match="a scale of lm_head is not finite"):
        calibrate(options(tmp_path))
    assert list((tmp_path / "model").rglob("*.npz")) == []


def test_ray_is_asked_before_an_engine_starts(cards, tmp_path, monkeypatch):
    """Too few cards: an error, and nothing was started."""
    asked = []

    def refuse(platform: str, world: int) -> None:
        asked.append((platform, world))
        raise CalibrationError("too few", fix="add nodes")

    monkeypatch.setattr(cluster, "require_cluster", refuse)
    with pytest.raises(CalibrationError, match="too few"):
        measure(options(tmp_path, engine_options=EngineOptions(executor="ray")))
    assert asked == [("hpu", 2)] and cards.phases == []


def test_values_of_the_engine_are_kept(cards, tmp_path):
    """What the ranks measured is what the run's files say."""
    result = measure(options(tmp_path))
    golden = CalibrationDir(GOLDEN / "tp2" / "g2").read_world(2)
    for ours, theirs in zip(CalibrationDir(result.root / "g2").read_world(2), golden, strict=True):
        assert ours.modules == theirs.modules and list(ours.nodes) == list(theirs.nodes)
        for name, node in theirs.nodes.items():
            assert np.array_equal(ours.nodes[name].inputs[0], node.inputs[0]), name
    assert read_scales(GOLDEN / "tp2" / "g2" / "inc_output_hooks_maxabs_MAXABS_HW_0_2.json").nodes

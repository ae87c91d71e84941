"""Runs of models with experts: coverage, cold experts, both ways of sharing, and resharding."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gaudi_calib.cli.main import main
from gaudi_calib.directory import CalibrationDir
from gaudi_calib.errors import ConfigError, FileError, RangeError, TopologyError, UsageError
from gaudi_calib.manifest import read_manifest
from gaudi_calib.ranges.coverage import count_coverage, suggest_data
from gaudi_calib.rankfiles.channel_file import read_channel_ranges
from gaudi_calib.rankfiles.store import read_ranges, read_scales
from gaudi_calib.runs.calibrate import calibrate, measure, quantize
from gaudi_calib.runs.options import RunOptions
from gaudi_calib.runs.reshard import reshard_dir
from gaudi_calib.runs.unify import unify_dir
from gaudi_calib.serve.command import ServeOptions, plan_on_gaudi
from tests.support import paths
from tests.support.files import write_prompts
from tests.support.tiny import COLD_EXPERTS

pytestmark = pytest.mark.torch

COLD = "deepseek_v3-cold"
OP = "model.layers.1.mlp.experts.routed_experts.moe_op"
TAG = "MAXABS_HW"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Random token ids, enough for every expert that is not cold by design."""
    rng = random.Random(0)
    rows = ([rng.randrange(300) for _ in range(64)] for _ in range(8))
    return write_prompts(tmp_path, rows)


@pytest.fixture
def options(dataset: Path, tiny_model: Callable[[str], Path]) -> Callable[..., RunOptions]:
    def make(checkpoint: str = COLD, **changes) -> RunOptions:
        facts = {"model": str(tiny_model(checkpoint)), "out": dataset.parent / "out", "devices": ("g3",)}
        return RunOptions(**{**facts, "dataset": {"dataset": str(dataset)}, **changes})

    return make


def serve(result, model: str, world: int):
    """The command that serves what a run made, on a Gaudi 3."""
    return plan_on_gaudi(ServeOptions(model, result.quant_configs["g3"], world, "g3"))


def find_manifest(root: Path):
    return read_manifest(root / "g3/calibration_manifest.json")


def test_cold_experts_are_filled_and_told(options):
    """By default a cold expert gets real tokens of its layer, and manifest and warnings say which and how many."""
    result = calibrate(options(min_expert_tokens=5))
    (ranges,) = CalibrationDir(result.root / "g3").read_world(1)
    assert all(one[0] > 0 for one in ranges.nodes[OP].outputs)
    coverage = find_manifest(result.root).expert_coverage
    assert coverage.policy == "fill" and coverage.min_tokens == 5
    assert set(COLD_EXPERTS[COLD]) <= set(coverage.cold[OP])
    assert all(coverage.tokens[OP][expert] == 0 for expert in coverage.cold[OP])
    assert coverage.filled[OP] == dict.fromkeys(coverage.cold[OP], 5)
    assert sum(coverage.tokens[OP]) == 2 * 8 * 64  # two experts per token
    (warning,) = [one for one in result.warnings if "fewer than 5 tokens" in one]
    assert OP in warning and "4 times as much" in warning


def test_cold_experts_are_left_when_asked(options):
    """`ignore` leaves the range 0 of an expert that saw nothing, and warns that serving goes wrong."""
    result = measure(options(cold_experts="ignore"))
    (ranges,) = CalibrationDir(result.root / "g3").read_world(1)
    cold = find_manifest(result.root).expert_coverage.cold[OP]
    idle = [index for index, one in enumerate(ranges.nodes[OP].outputs[1:]) if one[0] == 0]
    assert idle == cold and set(COLD_EXPERTS[COLD]) <= set(idle)
    assert any("serving them goes wrong" in warning for warning in result.warnings)


def test_cold_experts_are_an_error_when_asked(options):
    """`error` names the cold experts, says how much more data, and writes nothing."""
    with pytest.raises(RangeError, match="experts saw fewer than 16 tokens") as error:
        measure(options(cold_experts="error"))
    assert OP in error.value.where and "--cold-experts fill" in error.value.fix
    assert not list((options().layout.root / "g3").glob("inc_output*"))
    assert not options().layout.channel_ranges.exists()


def test_suggestion_follows_the_coldest_expert(options):
    """The factor of more data is that of the expert with fewest tokens."""
    root = measure(options("qwen3_moe")).root
    channels = read_channel_ranges(root / "channel_ranges.safetensors")
    fewest = min(int(node.experts.tokens.min()) for node in channels.nodes.values() if node.experts)
    assert fewest > 0
    coverage = count_coverage(channels, policy="ignore", min_tokens=fewest * 3)
    assert coverage.cold
    assert suggest_data(coverage, 512) == f"about 3 times the data, 1536 tokens, would give each {fewest * 3}"
    assert count_coverage(channels, policy="ignore", min_tokens=fewest).cold == {}


def test_deepseek_is_expert_parallel_and_can_be_told_otherwise(options):
    """The family's way of sharing is the default; each rank's files hold its experts, numbered from 0."""
    wanted = options(world=4, unified_world=1)
    result = calibrate(wanted)
    experts = [
        [name for name in one.nodes if "w13_list" in name] for one in CalibrationDir(result.root / "g3").read_world(4)
    ]
    assert (
        experts
        == [[f"model.layers.{i}.mlp.experts.routed_experts.moe_op.w13_list.{e}" for i in (1, 2) for e in (0, 1)]] * 4
    )
    assert "--enable-expert-parallel" in serve(result, wanted.model, 4).argv
    assert "--enable-expert-parallel" not in serve(result, wanted.model, 1).argv
    assert find_manifest(result.root).expert_parallel
    sliced = calibrate(options(world=4, expert_parallel=False))
    (first, *_) = CalibrationDir(sliced.root / "g3").read_world(4)
    assert len(first.nodes[OP].outputs) == 9


def test_quantize_keeps_the_way_the_run_shares_experts(options):
    """`quantize` without -u goes on as measured; with another way it derives the ranks anew, scales included."""
    root = measure(options("mixtral", world=2, expert_parallel=True)).root
    op = "model.layers.0.block_sparse_moe.experts.routed_experts.moe_op"
    quantize(options("mixtral", world=2))
    assert len(read_scales(root / f"g3/inc_output_hooks_maxabs_{TAG}_0_2.json").nodes[op].inputs) == 3
    quantize(options("mixtral", world=4))
    assert len(read_ranges(root / "g3/inc_output_hooks_maxabs_3_4.json").nodes[op].outputs) == 2
    quantize(options("mixtral", world=2, expert_parallel=False))
    assert len(read_ranges(root / "g3/inc_output_hooks_maxabs_1_2.json").nodes[op].outputs) == 5
    assert len(read_scales(root / f"g3/inc_output_hooks_maxabs_{TAG}_0_2.json").nodes[op].inputs) == 5
    assert {world: facts.expert_parallel for world, facts in find_manifest(root).worlds.items()} == {2: False, 4: True}
    assert CalibrationDir(root / "g3").find_stale() == []


def test_unify_takes_the_sharing_from_the_manifest(options):
    """Ranks with different experts are lined up, without a flag: the result equals a measurement with one rank."""
    root = measure(options("qwen3_moe", world=4, unified_world=1, expert_parallel=True)).root
    (expected,) = CalibrationDir(root / "g3").read_world(1)
    unify_dir(root / "g3", 1, root / "unified")
    (unified,) = CalibrationDir(root / "unified").read_world(1)
    assert list(unified.nodes) == list(expected.nodes) and unified.modules == expected.modules
    for name, node in unified.nodes.items():
        # What a rank sums up itself is no slice of what one rank alone does.
        skip = 1 if node.outputs is not None else 0
        assert repr(node.inputs) == repr(expected.nodes[name].inputs), name
        assert repr((node.outputs or ())[skip:]) == repr((expected.nodes[name].outputs or ())[skip:]), name
        assert repr(node.weight) == repr(expected.nodes[name].weight), name


@pytest.mark.parametrize("split", [False, True], ids=["tensor", "expert"])
def test_reshard_equals_a_measurement_at_that_topology(split: bool, options, tmp_path: Path):
    """Ranks written from the channel ranges are byte for byte those of a run that was asked for them."""
    asked = measure(options("qwen2_moe", world=4, expert_parallel=split)).root
    other = measure(options("qwen2_moe", out=tmp_path / "other")).root
    written = reshard_dir(other, 4, expert_parallel=split, out=tmp_path / "new")
    assert {path.name for path in written} == {path.name for path in (asked / "g3").glob("inc_output*_4*")}
    for path in written:
        assert path.read_bytes() == (asked / "g3" / path.name).read_bytes()
    manifest = read_manifest(tmp_path / "new/g3/calibration_manifest.json")
    assert manifest.status == "ok" and list(manifest.worlds) == [4]
    assert manifest.worlds[4].expert_parallel is split


def test_reshard_in_place_sets_stale_scales_aside(options, capsys):
    """Worlds stand side by side; scales of ranks that change are moved where INC does not find them."""
    root = calibrate(options("mixtral", world=2, expert_parallel=True)).root
    assert main(["reshard", str(root / "g3"), "-t", "4"]) == 0
    assert list(CalibrationDir(root / "g3").worlds) == [2, 4]
    assert [world for world in (2, 4) if CalibrationDir(root / "g3").list_scales(world, TAG)] == [2]
    assert main(["reshard", str(root), "-t", "2", "--no-expert-parallel", "--device", "g3"]) == 0
    assert not any(CalibrationDir(root / "g3").list_scales(world, TAG) for world in (2, 4))
    assert len(list((root / "g3/replaced").iterdir())) == 4
    quantize(options("mixtral", world=2))
    assert CalibrationDir(root / "g3").find_stale() == []
    op = "model.layers.0.block_sparse_moe.experts.routed_experts.moe_op"
    assert [len(CalibrationDir(root / "g3").read_world(world)[0].nodes[op].outputs) for world in (2, 4)] == [5, 2]
    capsys.readouterr()


def test_merged_runs_are_resharded_and_quantized(options, tmp_path: Path):
    """What `merge` makes of two runs is a run like any other: its blocklist is that of the runs."""
    for seed in (1, 2):
        data = {**options().dataset, "limit": 4, "seed": seed}
        measure(options("mixtral", out=tmp_path / str(seed), dataset=data, world=2, expert_parallel=True))
    name = options("mixtral").layout.root.name
    words = ["merge", str(tmp_path / "1" / name), str(tmp_path / "2" / name), "-o", str(tmp_path / "both" / name)]
    assert main(words) == 0
    reshard_dir(tmp_path / "both" / name, 4)
    quantize(options("mixtral", out=tmp_path / "both", world=4))
    (first, *_) = CalibrationDir(tmp_path / "both" / name / "g3").read_world(4)
    one = CalibrationDir(tmp_path / "1" / name / "g3").read_world(2)[0]
    assert not any("self_attn" in module for module in first.modules)
    assert len([module for module in one.modules if "w13" in module]) == 2 * len(
        [module for module in first.modules if "w13" in module]
    )


def test_names_of_an_older_vllm(options, tmp_path: Path):
    """Before 0.24 the fused op hangs below `experts` itself; the choice is kept for worlds that come later."""
    root = measure(options("mixtral", world=2, vllm="0.11")).root
    names = [name for name in CalibrationDir(root / "g3").read_world(2)[0].modules if "moe_op" in name]
    assert names[0] == "model.layers.0.block_sparse_moe.experts.moe_op"
    assert not any("routed_experts" in name for name in names)
    reshard_dir(root, 4)
    assert CalibrationDir(root / "g3").read_world(4)[0].modules == CalibrationDir(root / "g3").read_world(2)[0].modules
    method = "act_maxabs_hw_weights_pcs_maxabs_pow2"
    quantize(options("mixtral", world=4, scale_method=method))
    scales = read_scales(root / f"g3/inc_output_hooks_maxabs_{method.upper()}_1_4.json").nodes[names[0] + ".w2_list.3"]
    assert scales.weight.in_channels.shape == (48,)


def test_layers_that_cannot_be_measured_must_stay_blocked(options, tmp_path: Path):
    """A config that lets Mamba layers through is refused before anything runs."""
    config = tmp_path / "measure.json"
    config.write_text(json.dumps({"mode": "MEASURE", "observer": "maxabs", "dump_stats_path": "x/inc"}))
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mamba\.conv1d cannot be measured") as error:
        measure(options("granitemoehybrid", measure_config=config))
    assert "'mamba'" in error.value.fix
    wanted = options("granitemoehybrid")
    result = calibrate(wanted)
    (ranges,) = CalibrationDir(result.root / "g3").read_world(1)
    assert not any("mamba" in name or "self_attn" in name for name in ranges.modules)
    assert "fp8_inc" not in serve(result, wanted.model, 1).argv


def test_a_quantized_checkpoint_keeps_its_own_method(options, dataset: Path):
    """For an FP8 source, QUANT_CONFIG alone turns INC on: `--quantization inc` would be refused."""
    golden = paths.GOLDEN / "deepseek-v3-fp8-tiny/model"
    result = calibrate(options(world=2, out=dataset.parent / "fp8", cold_experts="ignore", model=str(golden)))
    command = serve(result, str(golden), 2)
    assert "fp8_inc" in command.argv and "--quantization" not in command.argv
    assert command.env["VLLM_HPU_FORCE_CHANNEL_FP8"] == "0"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"world": 3, "expert_parallel": True}, TopologyError, "does not divide over 3 ranks"),
        ({"world": 16, "expert_parallel": True}, TopologyError, "does not divide over 16 ranks"),
        ({"vllm": "latest"}, UsageError, "'latest' is not a version of vLLM"),
    ],
    ids=["three ranks", "more ranks than heads", "no version"],
)
def test_impossible_topologies_are_refused(arguments: dict, error: type, message: str, options):
    """The mistake is named, and nothing is written."""
    with pytest.raises(error, match=message):
        measure(options(**arguments))
    assert not options().layout.channel_ranges.exists()


def test_reshard_without_channel_ranges_is_refused(tmp_path: Path):
    """Rank files alone do not tell a slice from the whole."""
    with pytest.raises(FileError, match=r"no channel_ranges\.safetensors") as error:
        reshard_dir(tmp_path, 2)
    assert "OUT/<model>" in error.value.fix


def test_reshard_asks_how_experts_are_shared(options):
    """Where no manifest says it, the flag is asked for."""
    root = measure(options("mixtral")).root
    (root / "g3/calibration_manifest.json").unlink()
    with pytest.raises(TopologyError, match="not known how the ranks share the experts"):
        reshard_dir(root, 2)
    assert len(reshard_dir(root, 2, expert_parallel=False)) == 6


def test_the_language_model_of_a_larger_model(options, tiny_model: Callable[[str], Path], tmp_path: Path):
    """Of a model with a vision tower the text part is measured, under its names there; the rest is blocked."""
    from safetensors.torch import load_file, save_file

    source, directory = tiny_model("llama4_text"), tmp_path / "model"
    directory.mkdir()
    tensors = {f"language_model.{name}": one for name, one in load_file(source / "model.safetensors").items()}
    tensors["vision_model.patch_embedding.linear.weight"] = torch.ones(2, 2)
    save_file(tensors, directory / "model.safetensors")
    config = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}
    text = json.loads((source / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "text_config": text, "vision_config": {}}))
    alone, larger = (
        CalibrationDir(measure(options("llama4_text", **where)).root / "g3").read_world(2)[1]
        for where in ({"world": 2}, {"world": 2, "model": str(directory)})
    )
    assert [f"language_model.{name}" for name in alone.modules] == list(larger.modules)
    assert repr([*alone.nodes.values()]) == repr([*larger.nodes.values()])

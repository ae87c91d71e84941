"""How vLLM is started for each phase, and that nothing of a phase outlives it. No engine starts here."""

import importlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gaudi_calib.cli.main import main
from gaudi_calib.cli.measure import measure
from gaudi_calib.config.model import NodeFilter
from gaudi_calib.config.presets import measure_config, quant_config
from gaudi_calib.config.templates import list_templates
from gaudi_calib.engines import detect
from gaudi_calib.engines.detect import Platform
from gaudi_calib.engines.vllm_runner import cluster, process
from gaudi_calib.engines.vllm_runner.phases import (
    EngineOptions,
    Phase,
    choose_executor,
    plan_phase,
)
from gaudi_calib.engines.vllm_runner.process import end_group, list_group
from gaudi_calib.engines.vllm_runner.settings import Deployment, bind_cpus, plan_settings
from gaudi_calib.errors import CalibrationError, UsageError
from gaudi_calib.fp8 import GAUDI2, GAUDI3
from gaudi_calib.models.families import find_family
from gaudi_calib.runs import calibrate as pipeline
from gaudi_calib.runs.calibrate import RunResult
from gaudi_calib.runs.options import OPTIONS_OF, RunOptions
from gaudi_calib.runs.vllm_steps import computes_scales, settle_engine

RESULT = RunResult(Path(), (), {}, ())
PROMPTS = [[1] * 100, [2] * 300]
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def plan(
    model_type: str,
    device: str,
    world: int,
    options: EngineOptions | None = None,
    *,
    platform: str = "hpu",
    **facts,
) -> list[Phase]:
    family = find_family(model_type)
    dump = Path("/data/out/m") / device / "inc_output"
    deployed = Deployment("/models/m", world, family, context=4096, **facts)
    return [
        plan_phase(
            name,
            platform,
            (measure_config if name == "measure" else quant_config)(family, dump),
            Path(f"/data/out/m/maxabs_{name}_{device}.json"),
            deployed,
            PROMPTS,
            options or EngineOptions(),
        )
        for name in (("measure", "quantize") if platform == "hpu" else ("measure",))
    ]


MANY = {"PT_HPU_ENABLE_LAZY_COLLECTIVES": "true"}
RAY = {"VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "QUANT_CONFIG,PT_HPU_ENABLE_LAZY_COLLECTIVES,PT_HPU_WEIGHT_SHARING"}
INC, CACHE = {"quantization": "inc"}, {"kv_cache_dtype": "fp8_inc"}
LITTLE = {"gpu_memory_utilization": 0.1}
EXPERTS = {"enable_expert_parallel": True}


@pytest.mark.parametrize("platform", ["hpu", "cuda", "cpu"])
def test_the_engine_is_started_in_the_type_of_the_config(platform: str) -> None:
    """`hp_dtype` of either phase decides, and bfloat16 is named, too: `auto` would take what config.json says."""
    llama, dump = find_family("llama"), Path("/data/out/m/g3/inc_output")
    deployed = Deployment("/models/m", 1, llama)
    for keys, dtype in (({}, "bfloat16"), ({"hp_dtype": "FP16"}, "float16"), ({"hp_dtype": "FP32"}, "float32")):
        config = measure_config(llama, dump, **keys)
        phase = plan_phase("measure", platform, config, Path("q.json"), deployed, PROMPTS, EngineOptions())
        assert phase.settings.args["dtype"] == dtype


@pytest.mark.parametrize("device", ["g2", "g3"])
@pytest.mark.parametrize(
    ("model_type", "world", "facts", "measure", "quantize", "env"),
    [
        ("llama", 1, {}, INC, INC | CACHE, {}),
        ("llama", 8, {}, INC, INC | CACHE, MANY),
        ("llama", 16, {}, INC, INC | CACHE, MANY | RAY),
        (
            "deepseek_v3", 8, {"expert_parallel": True, "quantization": BLOCK_FP8},
            EXPERTS, CACHE | EXPERTS, MANY | {"VLLM_HPU_FORCE_CHANNEL_FP8": "0"},
        ),
        ("mixtral", 8, {}, INC, INC, MANY),
        (
            "granitemoehybrid", 1, {},
            INC | LITTLE, INC | LITTLE | {"max_model_len": 2048}, {"VLLM_CONTIGUOUS_PA": "false"},
        ),
        ("qwen3", 1, {"quantization": BLOCK_FP8}, {}, CACHE, {"VLLM_HPU_FORCE_CHANNEL_FP8": "0"}),
    ],
    ids=["tp1", "tp8", "tp16", "deepseek", "mixtral", "granite4", "block-fp8"],
)  # fmt: skip
def test_phases_on_a_gaudi(model_type, world, facts, measure, quantize, env, device):
    """Either phase has exactly these engine arguments and this environment."""
    phases = plan(model_type, device, world, **facts)
    shared = {
        "tensor_parallel_size": world,
        "dtype": "bfloat16",
        "max_num_seqs": 32,
        "enforce_eager": False,
        "distributed_executor_backend": "ray" if world > 8 else "mp",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    common = {
        "VLLM_SKIP_WARMUP": "true",
        "PT_HPU_WEIGHT_SHARING": "0",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1800",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **env,
    }
    assert phases[0].settings.args == {**shared, "max_model_len": 384, **measure}
    assert phases[1].settings.args == {**shared, "max_model_len": 128, **quantize}
    for phase in phases:
        config = f"/data/out/m/maxabs_{phase.name}_{device}.json"
        assert phase.settings.env == {**common, "QUANT_CONFIG": config}
    assert [phase.saving for phase in phases] == ["shutdown", "none"]
    assert [list(map(len, phase.prompts)) for phase in phases] == [[100, 300], [16]]
    assert phases[0].max_new_tokens == [16, 16]


@pytest.mark.parametrize(
    ("blocklist", "modules", "quantizes_caches"),
    [
        ({}, (), True),
        ({}, ("model.layers.0.self_attn.attn.impl.v_cache",), True),
        ({"types": ["VLLMKVCache"]}, (), False),
        ({"names": ["self_attn"]}, ("model.layers.0.self_attn.attn.impl.v_cache", "lm_head"), False),
        ({}, ("lm_head",), False),
    ],
    ids=["all", "named", "types", "names", "no cache"],
)
def test_dynamic_caches_are_announced(blocklist: dict, modules: tuple[str, ...], quantizes_caches: bool) -> None:
    """INC stops without VLLM_DYNAMIC_KV_QUANT where it scales the cache while serving; our plugin asks for nothing."""
    config = list_templates()["maxabs_quant_dynamic_quantization_all_layers.json"]
    config = config.model_copy(update={"blocklist": NodeFilter(**blocklist)})
    for platform in ("hpu", "cpu"):
        settings = plan_settings(platform, config, Path("q.json"), Deployment("/models/m", 1, None, modules=modules))
        is_told = quantizes_caches and platform == "hpu"
        assert settings.env.get("VLLM_DYNAMIC_KV_QUANT") == ("1" if is_told else None)
        assert settings.args.get("kv_cache_dtype") == ("fp8_inc" if is_told else None)


def test_phase_off_a_gaudi():
    """Our plugin measures, eagerly; scales are computed without an engine."""
    (phase,) = plan("llama", "g3", 2, platform="cuda")
    assert phase.settings.args == {
        "quantization": "gaudi_fp8",
        "worker_extension_cls": "gaudi_calib.engines.vllm_plugin.worker.WorkerExtension",
        "enforce_eager": True,
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "max_model_len": 384,
        "max_num_seqs": 32,
        "distributed_executor_backend": "mp",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    assert phase.settings.env == {"QUANT_CONFIG": "/data/out/m/maxabs_measure_g3.json"}
    assert phase.saving == "ask"


@pytest.mark.vllm
def test_the_plugin_has_the_names_the_runner_uses():
    """The class that vLLM adds to its workers can be imported by the name they get, and has what child.py calls."""
    (phase,) = plan("llama", "g3", 1, platform="cpu")
    module, _, name = phase.settings.args["worker_extension_cls"].rpartition(".")
    assert callable(getattr(importlib.import_module(module), name).save_ranges)


def test_what_the_caller_gives_wins():
    """Flags win over the family's facts, --engine-arg and --env over everything."""
    options = EngineOptions(
        batch_size=4,
        max_new_tokens=3,
        enforce_eager=True,
        max_model_len=512,
        gpu_memory_utilization=0.5,
        trust_remote_code=True,
        args={"max_num_seqs": 7, "block_size": 128},
        env={"VLLM_SKIP_WARMUP": "false", "FOO": "1"},
    )
    for phase in plan("granitemoehybrid", "g2", 1, options):
        args, env = phase.settings.args, phase.settings.env
        assert (args["max_model_len"], args["gpu_memory_utilization"], args["enforce_eager"]) == (512, 0.5, True)
        assert (args["max_num_seqs"], args["block_size"], args["trust_remote_code"]) == (7, 128, True)
        assert (env["VLLM_SKIP_WARMUP"], env["FOO"], env["VLLM_CONTIGUOUS_PA"]) == ("false", "1", "false")
        assert phase.batch_size == 4
    with pytest.raises(UsageError, match="QUANT_CONFIG"):
        plan("llama", "g2", 1, EngineOptions(env={"QUANT_CONFIG": "x"}))


def test_new_tokens_fit_into_the_context():
    """A prompt that leaves little room gets fewer new tokens."""
    (phase, _) = plan("llama", "g3", 1, EngineOptions(max_model_len=310))
    assert phase.max_new_tokens == [16, 10]


def test_static_per_channel_scales_need_a_variable():
    """INC's runtime scale patching is switched off for scale methods that it cannot patch."""
    family = find_family("llama")
    config = quant_config(family, "/data/g3/inc_output", "act_maxabs_hw_weights_pcs_maxabs_pow2")
    settings = plan_settings("hpu", config, Path("/q.json"), Deployment("m", 1, family))
    assert settings.env == {"QUANT_CONFIG": "/q.json", "RUNTIME_SCALE_PATCHING": "0"}


def test_the_command_line_reaches_the_engine(monkeypatch):
    """Every option of the vllm engine arrives; --engine-arg takes JSON values, --env plain text."""
    runs = []
    monkeypatch.setattr(pipeline, "measure", lambda options: runs.append(options) or RESULT)
    words = "measure -m m -d builtin -o out -t 2 --engine vllm -e --max-new-tokens 3 --max-model-len 64 --executor mp"
    more = "--gpu-memory-utilization 0.5 --engine-arg block-size=128 --engine-arg dtype=auto --env A=1=2 --env B="
    assert main([*words.split(), *more.split()]) == 0
    (run,) = runs
    assert (run.engine, run.world) == ("vllm", 2)
    assert run.engine_options == EngineOptions(
        max_new_tokens=3,
        enforce_eager=True,
        max_model_len=64,
        gpu_memory_utilization=0.5,
        executor="mp",
        args={"block_size": 128, "dtype": "auto"},
        env={"A": "1=2", "B": ""},
    )
    assert main([*words.split(), "--env", "A"]) == 2


@pytest.mark.parametrize(
    ("asked", "world", "platform", "chosen"),
    [(None, 8, "hpu", "mp"), (None, 9, "hpu", "ray"), ("ray", 2, "hpu", "ray"), (None, 16, "cuda", "mp")],
)
def test_executor(asked, world, platform, chosen):
    """Ranks beyond one Gaudi node need Ray."""
    assert choose_executor(asked, world, platform) == chosen


@pytest.mark.parametrize(("asked", "world", "platform"), [("mp", 16, "hpu"), ("ray", 2, "cpu")])
def test_executor_that_cannot_work(asked, world, platform):
    """One node does not hold 16 ranks, and vLLM's CPU platform refuses Ray."""
    with pytest.raises(UsageError):
        choose_executor(asked, world, platform)
    with pytest.raises(UsageError):
        plan("llama", "g3", world, EngineOptions(args={"distributed_executor_backend": asked}), platform=platform)


@pytest.mark.vllm
def test_vllm_on_cpu_still_refuses_ray():
    """The reason we give for refusing `--executor ray` on CPU is vLLM's: its platform names no resource."""
    cpu = pytest.importorskip("vllm.platforms.cpu")
    assert not cpu.CpuPlatform.ray_device_key


def test_ranks_share_the_cores(monkeypatch):
    """Each rank of a CPU run has cores of its own, as far as there are enough; the caller's choice wins."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    assert bind_cpus(2, {})["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,5"
    assert bind_cpus(8, {})["VLLM_CPU_OMP_THREADS_BIND"] == "0|1|2|5|0|1|2|5"
    assert bind_cpus(1, {"VLLM_CPU_KVCACHE_SPACE": "4"}) == {"VLLM_CPU_KVCACHE_SPACE": "4"}


@pytest.fixture
def on_gaudi3(monkeypatch):
    """Let this machine be a Gaudi 3 with vLLM."""
    monkeypatch.setattr(detect, "detect_apart", lambda: Platform("hpu", GAUDI3))
    monkeypatch.setattr("gaudi_calib.runs.vllm_steps.find_spec", lambda name: True)


def test_a_gaudi_measures_with_vllm_and_for_itself(on_gaudi3):
    """`auto` takes vLLM, the detected device alone, and leaves scales to INC; another device is refused."""
    options = settle_engine(RunOptions("m", Path("out")))
    assert (options.engine, options.platform, options.devices) == ("vllm", "hpu", ("g3",))
    assert computes_scales(options)
    assert settle_engine(RunOptions("m", Path("out"), engine="torch")).engine == "torch"
    with pytest.raises(UsageError, match=r"this is a g3.*g2"):
        settle_engine(RunOptions("m", Path("out"), devices=(GAUDI2.name,)))
    with pytest.raises(UsageError, match="--dtype float16: vllm-gaudi measures in bfloat16"):
        settle_engine(RunOptions("m", Path("out"), dtype="float16"))


def test_without_a_gaudi_torch_measures(monkeypatch):
    """`auto` needs no vLLM; asked for, vLLM measures for both devices and computes no scales."""
    monkeypatch.setattr(detect, "detect_apart", lambda: Platform("cpu"))
    options = RunOptions("m", Path("out"))
    assert settle_engine(options).engine == "torch"
    monkeypatch.setattr("gaudi_calib.runs.vllm_steps.find_spec", lambda name: True)
    settled = settle_engine(replace(options, engine="vllm"))
    assert (settled.engine, settled.devices) == ("vllm", ("g2", "g3"))
    assert not computes_scales(settled)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--engine torch --max-new-tokens 3 --env A=1", "--max-new-tokens, --env have no effect: the torch engine"),
        ("--executor mp --engine-arg a=1", "--executor, --engine-arg have no effect: the torch engine"),
        ("--gpu-memory-utilization 0.5 --max-model-len 64", "--max-model-len, --gpu-memory-utilization have no"),
        ("--engine vllm --compute-dtype bfloat16", "--compute-dtype has no effect: the vllm engine"),
        ("--engine vllm --min-expert-tokens 3 --vllm 0.23", "--min-expert-tokens, --vllm have no effect: the vllm"),
        ("--engine torch --compute-dtype bfloat16 --vllm 0.23 -e -b 3", None),
        ("--engine vllm --max-new-tokens 3 -e -b 3 --cold-experts error", None),
        ("", None),
    ],
)
def test_options_that_an_engine_ignores_are_named(words, told, monkeypatch, capsys):
    """In both directions, and only those that are given; -e asks for what torch does anyway."""
    monkeypatch.setattr("gaudi_calib.runs.vllm_steps.find_spec", lambda name: True)
    settled = []
    monkeypatch.setattr(pipeline, "measure", lambda options: settled.append(settle_engine(options)) or RESULT)
    assert main(["measure", "-m", "m", "-d", "builtin", "-o", "out", *words.split()]) == 0
    assert len(settled) == 1
    err = capsys.readouterr().err
    assert told in err if told else "effect" not in err


def test_options_of_an_engine_are_fields_and_flags():
    """What belongs to one engine is an option of the command line and of Python."""
    flags = {name for option in measure.params for name in option.opts}
    for engine, fields in (("torch", RunOptions), ("vllm", EngineOptions)):
        assert OPTIONS_OF[engine].keys() <= fields.__dataclass_fields__.keys()
        assert set(OPTIONS_OF[engine].values()) <= flags


def test_a_gaudi_is_asked_in_another_process(tmp_path, monkeypatch):
    """The process that starts engines never loads Habana's package, which would keep the card."""
    package = tmp_path / "habana_frameworks" / "torch"
    package.mkdir(parents=True)
    for directory in (package.parent, package):
        (directory / "__init__.py").write_text("")
    (package / "hpu.py").write_text("def is_available(): return True\ndef get_device_name(): return 'GAUDI2'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert detect.detect_apart() == Platform("hpu", GAUDI2)
    assert "habana_frameworks.torch.hpu" not in sys.modules
    (package / "hpu.py").write_text("raise OSError('driver mismatch')\n")
    with pytest.raises(CalibrationError, match="driver mismatch"):
        detect.detect_apart()


def test_a_group_is_ended_whole():
    """Also processes that ignore SIGTERM, and those whose parent is gone."""
    script = "trap '' TERM; (sleep 60 &) ; sleep 60; true"
    child = subprocess.Popen(["bash", "-c", script], start_new_session=True)
    _wait_until(lambda: len(list_group(child.pid)) >= 3)
    end_group(child.pid, grace_s=0.3)
    child.wait()
    assert list_group(child.pid) == []


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                "(MainProcess pid=1) WARNING 11-21 13:17:01 [base.py:380] ValueError: Tokenizer not available",
                "(Worker_TP0 pid=2) ERROR 11-21 13:17:01 [executor.py:1063] RuntimeError: head_dim=16",
                "vllm.v1.engine.exceptions.EngineDeadError: See stack trace (above) for the root cause.",
            ],
            "RuntimeError: head_dim=16",
        ),
        (
            ["(EngineCore pid=3) ERROR [executor.py] Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"],
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)",
        ),
        (["all is well"], None),
    ],
    ids=["exception", "killed", "none"],
)  # fmt: skip
def test_the_error_tells_the_cause(lines, cause):
    """Not vLLM's last words, nor what it only warns of."""
    output = process._Output()
    for line in lines:
        output.take(line)
    assert output.cause == cause


def test_a_phase_ends_with_its_parent():
    """When the process that started it dies in any way, a phase kills itself and what it started."""
    script = (
        "import subprocess, threading, time\n"
        "from gaudi_calib.engines.vllm_runner.child import _end_with_parent\n"
        "subprocess.Popen(['sleep', '60'])\n"
        "threading.Thread(target=_end_with_parent, daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert child.stdout is not None and child.stdin is not None
    child.stdout.readline()
    assert len(list_group(child.pid)) == 2
    child.stdin.close()
    _wait_until(lambda: list_group(child.pid) == [])
    assert child.wait() != 0


def _wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory):
    """A real Ray cluster of two nodes on this machine, with one (pretended) HPU each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    facts = {"num_cpus": 1, "resources": {"HPU": 1}, "object_store_memory": 80_000_000, "include_dashboard": False}
    running = cluster_utils.Cluster(initialize_head=True, head_node_args=facts)
    running.add_node(**{name: value for name, value in facts.items() if name != "include_dashboard"})
    running.wait_for_nodes()
    yield running.address
    running.shutdown()


@pytest.mark.ray
def test_ray_resources_are_checked_first(ray_cluster, monkeypatch):
    """Two ranks fit two nodes with a card each; four do not, and the error says how to add some."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    cluster.require_cluster("hpu", 2)
    with pytest.raises(CalibrationError, match="2 free HPU, and 4 ranks") as caught:
        cluster.require_cluster("hpu", 4)
    assert "ray start --address" in caught.value.fix


@pytest.mark.ray
def test_no_ray_cluster(monkeypatch):
    """Without a cluster the error says how to start one."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(CalibrationError, match="no Ray cluster") as caught:
        cluster.require_cluster("hpu", 2)
    assert "ray start --head" in caught.value.fix


@pytest.mark.vllm
@pytest.mark.ray
def test_vllm_copies_quant_config_to_ray_workers(monkeypatch):
    """The variable that the runner sets is the one vLLM reads to decide what its Ray workers get."""
    ray_env = pytest.importorskip("vllm.ray.ray_env")
    (phase, _) = plan("llama", "g3", 16)
    for name, value in phase.settings.env.items():
        monkeypatch.setenv(name, value)
    assert {"QUANT_CONFIG", "PT_HPU_WEIGHT_SHARING", "VLLM_SKIP_WARMUP"} <= ray_env.get_env_vars_to_copy()

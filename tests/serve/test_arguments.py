"""What follows `--`, and arguments of `LLM`, may repeat what was checked, and not contradict it."""

import contextlib
import re

import pytest

import gaudi_calib
from gaudi_calib.errors import UsageError
from gaudi_calib.serve.arguments import read_words
from tests.support.calibrated import CPU, MODEL, Calibrated, calibrate_by_torch

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Calibrated:
    return calibrate_by_torch(MODEL, tmp_path_factory.mktemp("out"), devices=("g3",))


@pytest.mark.parametrize(
    ("words", "what", "why"),
    [
        ("-pp 2", "-pp 2 contradicts .* pipeline_parallel_size is 1", "no file is of a part of the layers"),
        ("--pipeline-parallel-size=2", "pipeline_parallel_size is 1", "part of the layers"),
        ("-dp 2", "data_parallel_size is 1", "experts would be shared"),
        ("--data_parallel_size 2", "data_parallel_size is 1", "experts would be shared"),
        ("-pcp=2", "prefill_context_parallel_size is 1", "ranks are counted"),
        ("-tp 4", "tensor_parallel_size is 2", "which files the ranks read"),
        ("-t 4", "tensor_parallel_size is 2", "which files the ranks read"),
        ("--tensor_parallel_size=4", "tensor_parallel_size is 2", "which files the ranks read"),
        ("--tensor-parallel 4", "tensor_parallel_size is 2", "which files the ranks read"),
        ("--port=8001", "port is 8000", "before vLLM starts"),
        ("--port 8001", "port is 8000", "before vLLM starts"),
        ("-q fp8", "quantization is inc", "QUANT_CONFIG names the method"),
        ("-qfp8", "quantization is inc", "QUANT_CONFIG names the method"),
        ("--dtype float16", "dtype is bfloat16", "hp_dtype"),
        ("--dtype=auto", "dtype is bfloat16", "hp_dtype"),
        ("--kv_cache_dtype auto", "kv_cache_dtype is fp8_inc", "the config does not block|QUANT_CONFIG does not block"),
        ("-ep", "enable_expert_parallel is false", "whole experts, or a slice"),
        ("--enable-expert", "enable_expert_parallel is false", "whole experts, or a slice"),
        ("--model other", "--model other contradicts", "-m names the model"),
        ("other --max-model-len 9", "other after -- is a second model", "-m names the model"),
        ("--revision v2", "revision is none", "another checkpoint"),
        ("--no-e", "may mean several flags", "enable_expert_parallel, enforce_eager"),
        ("--config none.yaml", "--config after -- cannot be read", "No such file"),
    ],
)
def test_words_that_contradict_the_calibration_are_refused(words, what, why, run):
    """Each with a reason of its own, however vLLM lets it be spelled, as a usage error."""
    with pytest.raises(UsageError, match=what) as caught:
        run.plan(world=2, extra=tuple(words.split()))
    assert re.search(why, caught.value.why) and caught.value.fix


@pytest.mark.parametrize(
    "words",
    [
        "-tp 2 --dtype bfloat16 -pp 1 --data-parallel-size=1 --port 8000",
        "-q inc --kv-cache-dtype fp8_inc --no-enable-expert-parallel",
        "--max-model-len 4096 --served-model-name a b --quantization-config {} --model-impl auto -O3 --seed -1",
        "--host 0.0.0.0 -r 0 -n 1 --enforce-eager",
    ],
)
def test_words_that_do_not_are_passed_on(words, run):
    """The same value once more, and what the calibration does not decide."""
    extra = tuple(words.split())
    assert run.plan(world=2, extra=extra).argv[-len(extra) :] == extra


def test_what_the_plugin_needs(run):
    """Off a Gaudi the dtype and eager execution are decided, too; names of the same type are one."""
    for words in (("--dtype", "half"), ("--no-enforce-eager",), ("--kv-cache-dtype", "fp8")):
        with pytest.raises(UsageError, match="contradicts what is served"):
            run.plan("g3", CPU, extra=words)
    assert run.plan("g3", CPU, extra=("--dtype=bfloat16", "--enforce-eager")).argv[-1] == "--enforce-eager"


def test_a_config_file_of_vllm_is_read(run, tmp_path):
    """Its keys are flags; those that the calibration decides are refused as such."""
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 4096\ntensor-parallel-size: 2\nenable-expert-parallel: false\n")
    extra = ("--config", str(file))
    assert run.plan(world=2, extra=extra).argv[-2:] == extra
    for line in (
        "pipeline_parallel_size: 2",
        "port: 1",
        "model: other",
        "kv-cache-dtype: fp8",
        "data-parallel-size: 2",
    ):
        file.write_text(f"seed: 1\n{line}\n")
        with pytest.raises(UsageError, match=f"{line} in .*vllm.yaml contradicts"):
            run.plan(world=2, extra=("--seed", "1", f"--config={file}"))
    file.write_text("[unclosed")
    with pytest.raises(UsageError, match="--config after -- cannot be read"):
        run.plan(extra=extra)


def test_without_a_calibration_only_own_options_are_decided(run):
    """A checkpoint that keeps a method of vLLM's may be served in any way that vLLM knows."""
    words = ("--quantization", "fp8", "-pp", "2", "--dtype", "float16", "-dp", "2")
    assert run.plan(quant_config=None, extra=words).argv[-8:] == words
    with pytest.raises(UsageError, match="tensor_parallel_size is 1"):
        run.plan(quant_config=None, extra=("-q", "fp8", "-tp", "2"))


@pytest.mark.parametrize(
    "arguments",
    [{"dtype": "float16"}, {"quantization": "fp8"}, {"pipeline_parallel_size": 2}, {"data_parallel_size": 2},
     {"kv_cache_dtype": "fp8"}, {"enable_expert_parallel": True}, {"enforce_eager": False}],
    ids=lambda arguments: next(iter(arguments)),
)  # fmt: skip
def test_arguments_of_open_llm_obey_the_same_rule(arguments, run):
    """No engine starts."""
    with (
        pytest.raises(UsageError, match=f"{next(iter(arguments))}=.* contradicts what is served"),
        gaudi_calib.open_llm(run.model, quant_config=run.config("g3"), **arguments),
    ):
        pass


@pytest.mark.vllm
def test_flags_are_those_of_vllm():
    """vLLM's parser takes each flag that is decided here for what it is taken for here, and no other flag."""
    argparse_utils = pytest.importorskip("vllm.utils.argparse_utils")
    cli_args = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    parser = cli_args.make_arg_parser(argparse_utils.FlexibleArgumentParser())
    names = {"quantization", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "dtype", "model"}
    names |= {"prefill_context_parallel_size", "kv_cache_dtype", "port", "revision"}
    switches = {"enable_expert_parallel", "enforce_eager"}
    for action in parser._actions:
        for flag in action.option_strings:
            found = []
            with contextlib.suppress(UsageError):
                found = [given.name for given in read_words([flag, "1"])]
            assert found == ([action.dest] if action.dest in names | switches else []), flag
    dests = {action.dest for action in parser._actions}
    assert names | switches <= dests

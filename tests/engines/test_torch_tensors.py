"""Observer `save` with the torch engine: the tensors that INC saves, under its names, in files that torch reads."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gaudi_calib.checkpoints.plan import ModelPlan, plan_model
from gaudi_calib.config.check import parse_quant_config
from gaudi_calib.engines.torch.tensors import estimate_bytes, plan_tensors, save_tensors
from gaudi_calib.models.modules import Split

pytestmark = pytest.mark.torch

PROMPTS = [[5, 9, 200, 31, 7], [1, 2, 3], [17] * 11]


def save(
    plan: ModelPlan, directory: Path, *, dtype: str = "bfloat16", vllm: str | None = None, **config: object
) -> int:
    """Save what `config` asks for, one prompt at a time if computed in bfloat16; return the estimate."""
    content = {"mode": "MEASURE", "observer": "save", "dump_stats_path": "x/inc_output", **config}
    nodes = plan_tensors(plan, parse_quant_config(content))
    batch_size = 1 if dtype == "bfloat16" else 32
    save_tensors(plan, nodes, PROMPTS, directory, vllm=vllm, compute_dtype=dtype, batch_size=batch_size)
    return estimate_bytes(nodes.values(), PROMPTS, plan.dtype)


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor by the name of its file."""
    return {path.stem: torch.load(path, weights_only=True) for path in directory.glob("*.pt")}


@pytest.mark.inc
@pytest.mark.parametrize("checkpoint", ["llama", "qwen2", "opt"])
def test_the_files_are_those_of_inc(checkpoint: str, tiny_model: Callable[[str], Path], tmp_path: Path):
    """Names, types, shapes and values are INC's, bit for bit; a fused layer's are those of its parts side by side.

    INC's patched `Linear` adds a bias that its patched layers of vLLM do not see; they are compared without one.
    """
    pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")
    from tests.oracles.inc_save import save_with_inc

    plan = plan_model(tiny_model(checkpoint))
    child = save_with_inc(plan.checkpoint.directory, PROMPTS, tmp_path / "inc", mend=True)
    assert child.returncode == 0, child.stderr[-2000:]
    save(plan, tmp_path / "ours", measure_exclude="NONE")
    ours, incs = read(tmp_path / "ours"), read(tmp_path / "inc/tensors")
    expected = {}
    for node, linear in plan.linears.items():
        parts = linear.modules or ("lm_head",)
        biased = [f"{part}.bias" in plan.checkpoint.shapes for part in parts]
        expected[f"{node}_weight_iter0"] = torch.cat([incs[f"{part}_weight_iter0"].detach() for part in parts])
        for number in range(len(PROMPTS)):
            expected[f"{node}_input0_iter{number}"] = incs[f"{parts[0]}_input0_iter{number}"]
            outputs = [incs[f"{part}_output0_iter{number}"] for part in parts]
            expected[f"{node}_output0_iter{number}"] = None if any(biased) else torch.cat(outputs, -1)
    assert ours.keys() == expected.keys()
    assert not any(name.endswith(f"iter{len(PROMPTS)}") for name in incs)
    for name, tensor in expected.items():
        if tensor is not None:
            padding = ours[name].shape[-1 if "output" in name else 0] - tensor.shape[-1 if "output" in name else 0]
            shape = (0, padding) if "output" in name else (0, 0, 0, padding)
            tensor = torch.nn.functional.pad(tensor, shape) if "lm_head" in name and "input" not in name else tensor
            assert ours[name].dtype is tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.inc
def test_inc_itself_stops_at_the_first_module(tiny_model: Callable[[str], Path], tmp_path: Path):
    """Why the vLLM engine refuses the observer; once INC is mended, it need not."""
    pytest.importorskip("neural_compressor.torch", reason="the hpu extra (INC) is not installed")
    from tests.oracles.inc_save import save_with_inc

    child = save_with_inc(tiny_model("llama"), PROMPTS, tmp_path / "inc", mend=False)
    assert child.returncode != 0 and "NameError: name 'os' is not defined" in child.stderr


@pytest.mark.parametrize("checkpoint", ["llama", "mixtral", "gpt_oss", "falcon-grouped", "opt"])
def test_outputs_are_products_of_what_else_is_saved(checkpoint: str, tiny_model: Callable[[str], Path], tmp_path: Path):
    """However prompts are batched; no tensor carries others with it, and the estimate is about what files take."""
    plan = plan_model(tiny_model(checkpoint))
    estimate = save(plan, tmp_path, dtype="float32", measure_exclude="NONE")
    tensors = read(tmp_path)
    assert {name.rpartition("_iter")[2] for name in tensors} == {"0", "1", "2"}
    for node, linear in plan.linears.items():
        for number, prompt in enumerate(PROMPTS):
            x, weight = tensors[f"{node}_input0_iter{number}"], tensors[f"{node}_weight_iter0"]
            assert x.shape[-2:] == (len(prompt), weight.shape[1])
            bias = f"{linear.modules[0]}.bias" if linear.modules else ""
            added = linear.split is Split.NONE and bias in plan.checkpoint.shapes
            product = x.float() @ weight.float().T + (plan.checkpoint.read([bias])[bias].float() if added else 0)
            saved = tensors[f"{node}_output0_iter{number}"].float()
            torch.testing.assert_close(saved, product, rtol=2**-6, atol=2**-6 * float(product.abs().max()))
    for node, experts in plan.experts.items():
        assert all(f"{node}.w2_list.{index}_weight_iter0" in tensors for index in range(experts.count))
        assert tensors[f"{node}_input0_iter2"].shape == (11, plan.checkpoint.config["hidden_size"])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size == pytest.approx(estimate, rel=0.1)


def test_only_what_is_asked_for_is_saved(tiny_model: Callable[[str], Path], tmp_path: Path):
    """Without measure_exclude, only the outputs that INC needs; nothing of blocked nodes; names as vLLM has them."""
    plan = plan_model(tiny_model("mixtral"))
    save(plan, tmp_path, vllm="0.11", blocklist={"types": ["ParallelLMHead"], "names": ["qkv_proj", r"layers\.1\."]})
    names = set(read(tmp_path))
    assert {name.rpartition("_output0")[0] for name in names if "_output0" in name} == {
        "model.layers.0.self_attn.o_proj"
    }
    assert "model.layers.0.block_sparse_moe.experts.moe_op_input0_iter0" in names
    assert not any(part in name for name in names for part in ("lm_head", "qkv_proj", "layers.1.", "routed"))

"""Modules that INC patches and that never run, in lists of real cards and where something is missing."""

import json

import pytest

from gaudi_calib.ranges.idle import find_idle
from tests.support.paths import GOLDEN

OPS = ("matmul_qk", "softmax", "matmul_av", "batch2block_matmul", "block2batch_matmul")
LLAMA, MLA, EXPERTS = (
    "model.layers.0.self_attn.attn.impl",
    "model.layers.0.self_attn.mla_attn",
    "model.layers.3.mlp.experts",
)
# Of one layer each, as `_mod_list.json` has them, and which of them real cards left without ranges.
# Source: HabanaAI/vllm-fork, branches semi_analysis_scripts and ds-example-local.
REAL = {
    "llama-3.1-405b": (
        [f"{LLAMA}.{op}" for op in (*OPS, "k_cache", "v_cache")] + ["lm_head"],
        {f"{LLAMA}.softmax"},
    ),
    "deepseek-r1": (
        [f"{MLA}.impl.{op}" for op in ("kv_b_proj", *OPS)]
        + [EXPERTS, f"{EXPERTS}.moe_op", f"{EXPERTS}.moe_op.w13_list.0", f"{EXPERTS}.moe_op.w2_list.0"],
        {f"{MLA}.impl.softmax", EXPERTS},
    ),
}


@pytest.mark.parametrize("model", REAL)
def test_real_cards(model: str) -> None:
    """What they left without ranges is idle; of the rest nothing is that is missing."""
    modules, idle = REAL[model]
    measured = [name for name in modules if name not in idle]
    assert find_idle(modules, measured) == idle
    for missing in measured:
        assert missing not in find_idle(modules, {*measured} - {missing})


@pytest.mark.parametrize("model", ["llama-tiny", "mixtral-tiny", "deepseek-v3-fp8-tiny"])
def test_golden_files(model: str) -> None:
    """Exactly what the files of vllm-gaudi lack is idle; of DeepSeek a second set of attention ops is."""
    path = GOLDEN / model / "tp1" / "g2" / "inc_output_hooks_maxabs_0_1.json"
    modules = json.loads(path.with_name(f"{path.stem}_mod_list.json").read_text())
    measured = json.loads(path.read_text())["Nodes"]
    assert find_idle(modules, measured) == {*modules} - {*measured}


def test_prompts_take_one_way_through_attention() -> None:
    """With naive prompt attention the fused op never runs, with another neither does."""
    ways = {f"{LLAMA}.softmax", f"{LLAMA}.fused_scaled_dot_product_attention"}
    modules = [f"{LLAMA}.matmul_qk", *ways]
    for used in (*ways, None):
        assert find_idle(modules, {f"{LLAMA}.matmul_qk", used or "lm_head"}) == ways - {used}


def test_attention_that_never_ran_is_not_idle() -> None:
    """Without the set of `impl` nothing stands for the other; experts without their op neither."""
    modules = [*(f"{MLA}.{op}" for op in OPS), *(f"{MLA}.impl.{op}" for op in OPS), EXPERTS, f"{EXPERTS}.moe_op"]
    assert find_idle(modules, ["lm_head"]) == {f"{MLA}.softmax", f"{MLA}.impl.softmax"}

"""Class names of measured modules, for the `layer_types` of a dict-form scale method.

INC looks a module up by the name of its class in vLLM (or vllm-gaudi). Range files do
not record it; it follows from the module's name, except where the checkpoint decides:
experts of an FP8 checkpoint are `VllmMixtureOfExpertsOpFP8`,
`VllmMixtureOfExpertsOpFP8PerChannel` and `MoeFP8Matmul`; here they are called by their
bfloat16 names, `VllmMixtureOfExpertsOp` and `MoeMatmul`. Give `compute_scales` a mapping
where that, or a module this table does not know, matters.

Source: INC `_mod_default_dict`, fp8_quant/_core/patching_common.py.
"""

from gaudi_calib.ranges.node import Op

_BY_OP = {
    Op.ROW_PARALLEL_LINEAR: "RowParallelLinear",
    Op.MATMUL: "Matmul",
    Op.B2B_MATMUL: "B2BMatmul",
    Op.KV_CACHE: "VLLMKVCache",
    Op.SOFTMAX: "Softmax",
    Op.FUSED_SDPA: "ModuleFusedSDPA",
    Op.DYNAMIC_MOE: "VllmMixtureOfExpertsOp",
}
_LINEAR_BY_SUFFIX = {
    "qkv_proj": "QKVParallelLinear",
    "query_key_value": "QKVParallelLinear",
    "gate_up_proj": "MergedColumnParallelLinear",
    "input_linear": "MergedColumnParallelLinear",
    "q_proj": "ColumnParallelLinear",
    "q_b_proj": "ColumnParallelLinear",
    "kv_b_proj": "ColumnParallelLinear",
    "fc1": "ColumnParallelLinear",
    "dense_h_to_4h": "ColumnParallelLinear",
    "gate": "ReplicatedLinear",
    "kv_a_proj_with_mqa": "ReplicatedLinear",
    "project_in": "ReplicatedLinear",
    "project_out": "ReplicatedLinear",
    "lm_head": "ParallelLMHead",
    "embed_out": "ParallelLMHead",
}


def find_layer_type(name: str, op: Op) -> str | None:
    """Return the class of module `name`, or None where its name does not tell.

    >>> find_layer_type("model.layers.0.self_attn.qkv_proj", Op.LINEAR)
    'QKVParallelLinear'
    >>> find_layer_type("model.layers.0.mlp.experts.moe_op.w13_list.3", Op.LINEAR)
    'MoeMatmul'
    """
    if op is not Op.LINEAR:
        return _BY_OP[op]
    if is_expert_matmul(name):
        return "MoeMatmul"
    return _LINEAR_BY_SUFFIX.get(name.rpartition(".")[2])


def is_expert_matmul(name: str) -> bool:
    """Tell whether `name` is an expert's matmul inside a fused op, which INC measures with a dummy input of 0."""
    path = name.split(".")
    return len(path) > 1 and path[-2] in ("w13_list", "w2_list") and path[-1].isdecimal()

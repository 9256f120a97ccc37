"""The DeepSpeed configuration, generated from the run config so that no value exists in two places."""

from __future__ import annotations

from typing import Any

from safecl.config import RunConfig

# One flat shard per rank: methods with global dot products need all gradients in one call of the optimizer. Smaller
# groups would bound temporaries, but the step makes none.
_ONE_SUB_GROUP = 10**15

BUCKET = 5 * 10**8
"""Largest number of elements in DeepSpeed's buckets of gradients and of weights; DeepSpeed's own default."""


def deepspeed_config(config: RunConfig, num_trained: int = BUCKET) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize(config=...)`, which is also written to deepspeed.json in the run folder.

    Clipping, schedule, accumulation boundaries and logging are off, because safecl does them itself. `num_trained`:
    number of trained weights; buckets are never larger, because DeepSpeed allocates them in full.
    """
    bucket = min(BUCKET, num_trained + num_trained % 2)  # DeepSpeed asks for an even number
    bf16 = config.model.dtype == "bf16"
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        # safecl sets the boundaries before each backward; DeepSpeed only needs to know that there is accumulation.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(config, bucket),
    }
    if bf16:
        result["bf16"] = {"enabled": True}
        result["communication_data_type"] = config.deepspeed.reduce_dtype
        # DeepSpeed refuses fp32 accumulation where nothing is sharded.
        result["data_types"] = {"grad_accum_dtype": "fp32" if config.deepspeed.stage > 0 else "bf16"}
    return result


def _zero(config: RunConfig, bucket: int) -> dict[str, Any]:
    stage, offload = config.deepspeed.stage, config.deepspeed.offload
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": config.deepspeed.overlap_comm, "contiguous_gradients": True}
    if stage > 0:
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        zero["sub_group_size"] = _ONE_SUB_GROUP
    if offload.optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload.parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero

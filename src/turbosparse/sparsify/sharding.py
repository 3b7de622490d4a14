"""Full sharding (FSDP2): what the Trainer is told, and the original model sharded in the same way."""

import os
import socket
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from turbosparse.models.gated_ffn import gated_ffns

__all__ = ["fsdp_arguments", "set_up_single_process", "shard_teacher"]


def fsdp_arguments(activation_checkpointing: bool) -> dict[str, Any]:
    """Return the arguments of `TrainingArguments` that turn full sharding on.

    Parameters
    ----------
    activation_checkpointing : bool
        Recompute activations in the backward pass.

    Returns
    -------
    dict
        Parameters, gradients and optimizer are sharded per decoder layer; checkpoints are written in shards,
        which load on any number of processes.
    """
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "SHARDED_STATE_DICT",
            "activation_checkpointing": activation_checkpointing,
        },
    }


def set_up_single_process() -> None:
    """Let one process that nobody launched form a group of its own, so that it can run sharded."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)


def shard_teacher(teacher: Any) -> Any:
    """Shard the original model over the processes, each FFN by itself, so that it can be called alone.

    Parameters
    ----------
    teacher : PreTrainedModel
        In the host's memory, its FFNs replaced by `GatedFFN` modules. Each layer goes to the GPU and is cut
        before the next one, so that no GPU ever holds more than its shard and one layer.

    Returns
    -------
    PreTrainedModel
        The same object.
    """
    for ffn in gated_ffns(teacher).values():
        fully_shard(ffn)
        register_fsdp_forward_method(ffn, "compute")
    names = set(teacher._no_split_modules or ())
    layers: list[nn.Module] = [module for module in teacher.modules() if type(module).__name__ in names]
    for layer in layers:
        fully_shard(layer)
    fully_shard(teacher)
    return teacher

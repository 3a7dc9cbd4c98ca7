"""How a model is shared among processes: PyTorch's DDP or FSDP2, put around what recomputes and is compiled already.

What only several processes need is imported where they need it: it takes a second, which one process can do without.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adamae_fast.config import Precision, RunConfig
from adamae_fast.config_distributed import DistributedConfig
from adamae_fast.distributed.world import World
from adamae_fast.model.block import Block


def parallelize(
    model: nn.Module, config: DistributedConfig, world: World, device: torch.device, precision: Precision
) -> nn.Module:
    """Return what to call in training in place of ``model``: itself, with one process.

    Recomputation and compilation come before it, and the optimizer is built after it, from the parameters of ``model``,
    which keep their names. Every process must have the same weights.

    With fsdp2, parameters become shares (DTensor); the weights of a block travel in bf16 under precision=bf16, since
    its products round them to that anyway, and everything outside the blocks stays fp32.
    """
    if world.size == 1:
        return model
    if config.mode == "ddp":
        return _replicate(model, config)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    reduce_dtype = torch.bfloat16 if config.gradient_compression == "bf16" else torch.float32
    in_blocks = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=reduce_dtype,
        cast_forward_inputs=False,  # autocast has chosen their dtype
    )
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=in_blocks)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False))
    return model


def _replicate(model: nn.Module, config: DistributedConfig) -> DistributedDataParallel:
    # Blocks are compiled one by one: there is no graph over several of them that would have to be cut at buckets.
    torch._dynamo.config.optimize_ddp = False
    # Buffers are position tables, which never change. PyTorch 2.13 has renamed the option that says so.
    names = inspect.signature(DistributedDataParallel).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {no_sync: False, "gradient_as_bucket_view": True}
    replica = DistributedDataParallel(model, **options)
    if config.gradient_compression == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        # Within another function, since under its own name PyTorch refuses it where there is no NCCL.
        replica.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return replica


def describe_sharing(config: RunConfig, world: World) -> str:
    """Words for the start of a run; none with one process."""
    if world.size == 1:
        return ""
    distributed = config.distributed
    compressed = ", gradients travel as bf16" if distributed.gradient_compression == "bf16" else ""
    return f", {world.size} processes ({distributed.mode}{compressed})"


def only_last_syncs(network: nn.Module, is_last: bool) -> AbstractContextManager[None]:
    """Return the context for forward and backward of a micro-batch: gradients travel with a step's last one alone."""
    if isinstance(network, DistributedDataParallel):
        return nullcontext() if is_last else cast(AbstractContextManager[None], network.no_sync())
    if _is_shared(network):
        network.set_requires_gradient_sync(is_last)  # type: ignore[operator]
    return nullcontext()


def _is_shared(module: Any) -> bool:
    """Whether ``fully_shard`` has made it an FSDPModule."""
    return hasattr(module, "set_requires_gradient_sync")


def whole(tensor: Tensor) -> Tensor:
    """Return ``tensor``, put together where each process has a share of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_whole(model: nn.Module, weights: Mapping[str, Tensor], world: World) -> None:
    """Load whole weights into ``model``, of which each process may have a share."""
    if world.size == 1:
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, dict(weights), options=StateDictOptions(full_state_dict=True))


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Let every process have all weights of ``model`` meanwhile, so that each can call it as often as it likes."""
    shards: list[Any] = [module for module in model.modules() if _is_shared(module)]
    for shard in shards:
        shard.unshard()
        shard.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for number, shard in enumerate(shards):
            shard.set_reshard_after_forward(number > 0, recurse=False)
            shard.reshard()

"""Training on several processes: gradients averaged by DDP, or weights and optimizer state sharded by FSDP2.

Whatever is exact for one process, such as resuming a run bit for bit on a CPU, is exact for any fixed number of
processes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from layerprobe.backbones import Backbone
from layerprobe.capture import INPUT, evaluating, find_layer
from layerprobe.ranks import Ranks


def host_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of a network in CPU memory, made without a second one on its device."""
    copies: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        here = tensor.detach().to("cpu", copy=True)
        copies[id(tensor)] = nn.Parameter(here, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else here
    return copy.deepcopy(module, copies)


def parallel(backbone: Backbone, ranks: Ranks, *, fsdp: bool = False, device: torch.device | None = None) -> Backbone:
    """Returns a backbone whose backward pass averages gradients over the processes.

    All processes start with the weights of the first. The module of the backbone stays the network itself, with the
    same hooks, names and state; only `forward` is wrapped. If the parts of a batch differ in size, multiply the loss of
    a process by `Ranks.share`.

    Args:
        backbone: The backbone; FSDP changes its module in place.
        ranks: The processes.
        fsdp: Whether to shard weights, gradients and optimizer state over the processes (FSDP2) instead of keeping
            copies on each (DDP).
        device: Device of the shards; by default that of the backbone, which may be a copy on the host.

    Raises:
        ValueError: If `fsdp` is set with a single process.
    """
    if ranks.world_size == 1:
        if fsdp:
            raise ValueError(
                "--fsdp needs several processes to share the weights; start them with torchrun or srun, or leave out "
                "--fsdp"
            )
        return backbone
    if fsdp:
        shard(backbone.module, backbone.layers, device or backbone.device)
        return backbone
    unused = _leaves_parameters_unused(backbone)
    backbone = replace(backbone, forward=_Replicated(backbone, unused))
    if not unused:
        # DDP rebuilds its buckets after the first backward pass, which changes rounding. Because this pass is done in
        # advance, a resumed run gives the same bits as an uninterrupted one.
        _leaves_parameters_unused(backbone)
    return backbone


def accumulating(backbone: Backbone) -> AbstractContextManager[None]:
    """Disables the averaging of DDP inside the block, for all parts of a step's batch except the last."""
    replicated = isinstance(backbone.forward, _Replicated)
    return backbone.forward.replicated.no_sync() if replicated else nullcontext()  # type: ignore[attr-defined]


def shard(module: nn.Module, layers: Sequence[str], device: torch.device) -> None:
    """Copies the weights of the first process to all, and shards them over the processes in place (FSDP2).

    Args:
        module: The network; if it is on the host, the device holds one unit at a time beside the shards.
        layers: Names of submodules that are sharded as units; all other weights belong to the root.
        device: Device of the shards.
    """
    from torch.distributed.fsdp import fully_shard

    # The warning is about in-place operations on the output, which do not occur here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for tensor in (*module.parameters(), *module.buffers()):
        there = tensor.data.to(device)  # the tensor itself, if it is there
        dist.broadcast(there, 0)
        tensor.data.copy_(there)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    names = {layer.removesuffix(INPUT) for layer in layers}
    for name in sorted(names, key=lambda name: -name.count(".")):  # Inner submodules first.
        fully_shard(find_layer(module, name), mesh=mesh)
    fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """Returns the shard of this process, which shares memory with the tensor, or a tensor without shards itself."""
    sharded: Any = tensor  # a DTensor, which has no public type in every supported version of torch
    shard: Tensor = sharded.to_local() if _is_sharded(tensor) else tensor
    return shard


def average_gradients(parameters: Iterable[Tensor], ranks: Ranks) -> None:
    """Averages gradients in place, for parameters outside the module of `parallel`, such as LayerSync's projectors."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if ranks.world_size > 1 and gradients:
        means = ranks.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, torch.split(means, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Computes the norm over all gradients, a scalar, including shards on other processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [local(gradient) for gradient in gradients if _is_sharded(gradient)]
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if not _is_sharded(gradient)])
    if not shards:
        return norm
    squared = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(squared)
    return (squared + norm.to(squared.device).square()).sqrt()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales gradients down to a maximum norm, like torch's `clip_grads_with_norm_` but also for shards.

    Args:
        parameters: Parameters, sharded or not.
        max_norm: Maximum norm.
        norm: Norm of the gradients, as computed by `gradient_norm`.
    """
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def unsharded(tensor: Tensor) -> Tensor:
    """Returns the whole tensor, gathered from the shards of all processes; every process must call it."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if _is_sharded(tensor) else tensor
    return full


def gathered(state: Any, ranks: Ranks) -> Any:
    """Replaces sharded tensors by whole tensors in CPU memory on the first process, and by None on the others.

    Args:
        state: Tensors, JSON-compatible values, and dicts or lists of them. Every process must call it.
        ranks: The processes.
    """

    def gather(tensor: Tensor) -> Tensor | None:
        if not _is_sharded(tensor):
            return tensor
        full = unsharded(tensor)
        return full.cpu() if ranks.is_first else None

    return _mapped(state, gather)


def announced(state: Any, ranks: Ranks) -> Any:
    """Sends the state of the first process to all, without the values of its tensors, which `placed` sends later."""
    outline = ranks.broadcast(_mapped(state, lambda tensor: tensor.to("meta")) if ranks.is_first else None)
    return state if ranks.is_first else outline


def placed(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """Sends a tensor of the first process to all, sharded if `like` is sharded, else whole.

    Args:
        tensor: The tensor; only the first process needs its values. If its shape differs from that of `like`, as for a
            count of steps, it is not sharded.
        like: Tensor with the device and layout of the result.
        ranks: The processes.
    """
    if ranks.world_size == 1:
        return tensor
    full = tensor.to(like.device) if ranks.is_first else torch.empty_like(tensor, device=like.device)
    if _is_sharded(like) and like.shape == tensor.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    dist.broadcast(full, 0)
    return full


def _is_sharded(tensor: Tensor) -> bool:
    # Importing the type `DTensor` takes half as long as importing torch, which one process does not need.
    return hasattr(tensor, "full_tensor")


class _Replicated:
    """The `forward` of the backbone, called through DDP."""

    def __init__(self, backbone: Backbone, unused: bool) -> None:
        self.module, self.forward = backbone.module, backbone.forward
        network = _Network(backbone.module, backbone.forward)
        self.replicated = DistributedDataParallel(network, find_unused_parameters=unused, gradient_as_bucket_view=True)

    def __call__(self, module: nn.Module, *arguments: Tensor | None) -> Tensor:
        # Copies of the module, such as an averaged teacher, are called without DDP.
        output: Tensor = self.replicated(*arguments) if module is self.module else self.forward(module, *arguments)
        return output


class _Network(nn.Module):
    """The network inside DDP, called by the `forward` of its backbone, which needs the network without a wrapper."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, *arguments: Tensor | None) -> Tensor:
        return self._forward(self.module, *arguments)


def _leaves_parameters_unused(backbone: Backbone) -> bool:
    """Returns whether a forward and backward pass of one sample leaves a parameter without a gradient."""
    x, level = torch.zeros(1, *backbone.shape), torch.full((1,), 0.5, dtype=torch.float64)
    with evaluating(backbone.module), torch.enable_grad():
        output = backbone.predict(x.to(backbone.device), level.to(backbone.device))
        output.sum().backward()  # type: ignore[no-untyped-call]
    trained = [parameter for parameter in backbone.module.parameters() if parameter.requires_grad]
    missing = any(parameter.grad is None for parameter in trained)
    for parameter in trained:
        parameter.grad = None
    return missing


def _mapped(state: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _mapped(value, function) for key, value in state.items()}
    return [_mapped(value, function) for value in state] if isinstance(state, list) else state

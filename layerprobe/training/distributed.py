"""Several processes that train or sample together: who is who, what they share, how they end.

torchrun and SLURM's srun start the processes; `processes` joins those that the environment tells of. Without any of it
there is one process, no process group and no cost. Rank r of N takes positions r, r + N, ... of every batch.

Numbers on the host go through gloo, those on a GPU through NCCL. Whatever is exact for one process, such as resuming a
training bit for bit, is exact for any fixed number of processes.
"""

from __future__ import annotations

import atexit
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from layerprobe.backbones import Backbone
from layerprobe.capture import INPUT, evaluating

T = TypeVar("T")

# Others wait this long for the first process, which may be measuring or sampling meanwhile.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this is.

    Attributes:
        rank: From 0.
        world_size: How many there are, on all machines.
        local_rank: The place on this machine, from 0; the GPU it uses.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    # For what may take long: unlike NCCL, gloo waits, and notices at once when the other end is gone.
    _patient: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"this is process {self.rank} of {self.world_size}, but ranks go from 0 to world size - 1; "
                "check RANK and WORLD_SIZE"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, logs and writes."""
        return self.rank == 0

    def positions(self, positions: range) -> range:
        """Those of a batch that are this process' own."""
        return positions[self.rank :: self.world_size]

    def share(self, part: int, whole: int) -> float:
        """What a mean over `part` of `whole` samples counts, so that `mean` of it is the mean over the whole."""
        return part * self.world_size / whole

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes, element-wise; every process must ask for it."""
        if self.world_size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def broadcast(self, item: T) -> T:
        """The first process' item, which must pickle, on all; they wait for it."""
        if self.world_size == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, 0, group=self._patient)
        return items[0]

    def barrier(self) -> None:
        """Waits until all processes have come here."""
        if self.world_size > 1:
            dist.barrier(group=self._patient)


_joined: tuple[Ranks, Any] | None = None
_inside = False


@contextmanager
def processes() -> Iterator[Ranks]:
    """Joins the processes that torchrun or srun started; blocks may be nested and follow one another.

    All end together. When a process fails, it raises its exception, and the others leave with exit code 1 and without a
    word, so that people read one message. When one was killed, one of the others says so.

    Raises:
        ValueError: If the environment tells of several processes but not where they meet.
        ConnectionError: If another process was killed or its machine is gone.
    """
    global _inside
    if _joined is None and dist.is_initialized():  # The caller's own group, and the caller's to end.
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        return
    ranks, store = _joined or _join()
    if store is None or _inside:
        yield ranks
        return
    _inside = True
    try:
        yield ranks
        ranks.barrier()
    except (Exception, KeyboardInterrupt) as error:
        _fail(error, store)
    finally:
        _inside = False


def _join() -> tuple[Ranks, Any]:
    """The process group of the environment, for as long as the process lives: a store cannot be met at twice."""
    global _joined
    ranks, url = ranks_of(os.environ)
    if ranks.world_size == 1:
        return ranks, None
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    store, _, _ = next(rendezvous(url, ranks.rank, ranks.world_size))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size)
    atexit.register(dist.destroy_process_group)
    ranks = replace(ranks, _patient=dist.new_group(backend="gloo", timeout=PATIENCE))
    _joined = ranks, store
    return ranks, store


def ranks_of(environment: Mapping[str, str]) -> tuple[Ranks, str]:
    """Who this process is, and the URL where the processes meet.

    torchrun's variables go before SLURM's, for a torchrun that srun started. Of SLURM only a job step counts: a batch
    script knows the number of tasks too, but is a single process.

    Raises:
        ValueError: If they do not say where the processes meet, or contradict each other.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        ranks = Ranks(*(int(environment.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing and ranks.world_size > 1:
            raise ValueError(f"{missing[0]} is not set, so the processes cannot meet; start them with torchrun or srun")
        return ranks, "env://"
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        ranks = Ranks(*(int(environment.get(name, "0")) for name in names))
        host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
        # Steps that run at the same time need ports of their own.
        number = 100 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
        port = environment.get("MASTER_PORT") or 20000 + number % 12000  # below the ports that systems hand out
        return ranks, f"tcp://{host}:{port}"
    return Ranks(), ""


def first_host(nodes: str) -> str:
    """The first of SLURM's hosts: "gpu[07-09,12],login1" begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first.group())


def parallel(backbone: Backbone, ranks: Ranks, *, fsdp: bool = False) -> Backbone:
    """The backbone whose backward pass averages gradients over the processes; all begin with the first's weights.

    Its module is the network itself, so hooks, names and state are what they were: what does the averaging is round
    `forward`. Multiply a process' loss by `Ranks.share` where their parts of the batch differ in size.

    Args:
        backbone: Its module is used, and with FSDP changed, in place.
        ranks: Who takes part.
        fsdp: Keep a share of the weights, gradients and optimizer's state on each process (FSDP2), instead of all on
            every one (DDP).

    Raises:
        ValueError: If there is one process only and it should shard.
    """
    if ranks.world_size == 1:
        if fsdp:
            raise ValueError(
                "one process has nobody to share the weights with; start several with torchrun or srun, or leave out "
                "--fsdp"
            )
        return backbone
    if fsdp:
        shard(backbone.module, backbone.layers)
        return backbone
    unused = _without_gradient(backbone)
    backbone = replace(backbone, forward=_Replicated(backbone, unused))
    if not unused:
        # DDP sorts its buckets anew after its first backward pass, and sums are rounded by their place in a bucket: a
        # resumed training would not get the bits of one that was not interrupted.
        _without_gradient(backbone)
    return backbone


def accumulating(backbone: Backbone) -> AbstractContextManager[None]:
    """Forward and backward passes of a part of a step's batch that is not its last: DDP need not average yet."""
    replicated = isinstance(backbone.forward, _Replicated)
    return backbone.forward.through.no_sync() if replicated else nullcontext()  # type: ignore[attr-defined]


def shard(module: nn.Module, layers: Sequence[str]) -> None:
    """Spreads the weights over the processes, in place (FSDP2), after giving all the first's weights.

    Args:
        module: The network.
        layers: Names of the submodules whose weights are gathered together when they run; the rest belongs to the root.
    """
    from torch.distributed.fsdp import fully_shard

    # It is about work in place on the output, which nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)
    mesh = init_device_mesh(tensors[0].device.type, (dist.get_world_size(),))
    names = {layer.removesuffix(INPUT) for layer in layers}
    for name in sorted(names, key=lambda name: -name.count(".")):  # What is inside comes first.
        fully_shard(module.get_submodule(name), mesh=mesh)
    fully_shard(module, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is in this process: its shard, which shares memory with it, or the tensor itself."""
    sharded: Any = tensor  # a DTensor, which has no public type in every torch that will do
    part: Tensor = sharded.to_local() if _is_sharded(tensor) else tensor
    return part


def average_gradients(parameters: Iterable[Tensor], ranks: Ranks) -> None:
    """Averages, in place, the gradients of parameters that `parallel` does not know, such as LayerSync's projectors."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if ranks.world_size > 1 and gradients:
        means = ranks.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, torch.split(means, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm over all gradients, shards on other processes included, a scalar; parameters may be sharded or not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [local(gradient) for gradient in gradients if _is_sharded(gradient)]
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if not _is_sharded(gradient)])
    if not shards:
        return norm
    squared = nn.utils.get_total_norm(shards).square()
    dist.all_reduce(squared)
    return (squared + norm.to(squared.device).square()).sqrt()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales gradients, whose norm is known, down to a norm; as torch's `clip_grads_with_norm_`, but for shards too."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def unsharded(tensor: Tensor) -> Tensor:
    """A tensor with its shards from all processes, every one of which must ask; or the tensor itself."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if _is_sharded(tensor) else tensor
    return full


def gathered(state: Any, ranks: Ranks) -> Any:
    """A state with whole tensors where it has shards, in the first process' memory; None stands there on the others.

    Args:
        state: Tensors, JSON and dicts or lists of them. Every process must gather its own.
        ranks: Who takes part.
    """

    def kept(tensor: Tensor) -> Tensor | None:
        if not _is_sharded(tensor):
            return tensor
        full = unsharded(tensor)
        return full.cpu() if ranks.is_first else None

    return _mapped(state, kept)


def announced(state: Any, ranks: Ranks) -> Any:
    """The first process' state on all processes; elsewhere its tensors have no values yet, which `placed` gets."""
    outline = ranks.broadcast(_mapped(state, lambda tensor: tensor.to("meta")) if ranks.is_first else None)
    return state if ranks.is_first else outline


def placed(tensor: Tensor, like: Tensor, ranks: Ranks) -> Tensor:
    """The first process' tensor, as every process holds `like`: its shard where that is sharded, else the whole.

    Args:
        tensor: On the first process with values; elsewhere shape and type are enough. One of another shape than `like`,
            such as a count of steps, is not sharded.
        like: Gives device and layout.
        ranks: Who takes part.
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
    # Importing the type, `DTensor`, takes half as long as importing torch: not where there is one process.
    return hasattr(tensor, "full_tensor")


class _Replicated:
    """The backbone's `forward`, through DDP."""

    def __init__(self, backbone: Backbone, unused: bool) -> None:
        self.inner, self.forward = backbone.module, backbone.forward
        network = _Called(backbone.module, backbone.forward)
        self.through = DistributedDataParallel(network, find_unused_parameters=unused, gradient_as_bucket_view=True)

    def __call__(self, module: nn.Module, *arguments: Tensor | None) -> Tensor:
        # Other modules come here too: copies that teach or are measured.
        output: Tensor = self.through(*arguments) if module is self.inner else self.forward(module, *arguments)
        return output


class _Called(nn.Module):
    """A network as its backbone calls it: adapters look at the network, which DDP would hide from them."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, *arguments: Tensor | None) -> Tensor:
        return self._forward(self.module, *arguments)


def _without_gradient(backbone: Backbone) -> bool:
    """Whether a forward and backward pass of one sample leaves a parameter without a gradient."""
    x, level = torch.zeros(1, *backbone.shape), torch.full((1,), 0.5, dtype=torch.float64)
    with evaluating(backbone.module), torch.enable_grad():
        output = backbone.predict(x.to(backbone.device), level.to(backbone.device))
        output.sum().backward()  # type: ignore[no-untyped-call]
    trained = [parameter for parameter in backbone.module.parameters() if parameter.requires_grad]
    missing = any(parameter.grad is None for parameter in trained)
    for parameter in trained:
        parameter.grad = None
    return missing


def _fail(error: BaseException, store: Any) -> None:
    """Raises what this process has to say of an error, which is nothing where another one failed before it."""
    atexit.unregister(dist.destroy_process_group)  # It would wait for the others.
    try:
        first = store.add("layerprobe/failures", 1) == 1
    except RuntimeError:  # The process that kept the store has ended.
        first = False
    if not first:
        raise SystemExit(1) from error
    if _is_lost_connection(error):
        raise ConnectionError(
            "another process was killed, or its machine is gone; repeat the command to go on from the last checkpoint"
        ) from error
    raise error


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(r"gloo|[Cc]onnection (closed|reset)", str(error)) is not None
    )


def _mapped(state: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _mapped(value, function) for key, value in state.items()}
    return [_mapped(value, function) for value in state] if isinstance(state, list) else state

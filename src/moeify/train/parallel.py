"""One training on several processes: who trains on which sequences, and where gradients and weights are.

    torchrun --nproc-per-node 8 script.py

    with distributed() as device:
        model.to(device)
        train(model, data, TrainConfig(parallel="fsdp", ...), parts=[ssd], state=folder)

Every process calls everything with the same arguments. The mean over all labels of a step is exact, however they fall on processes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._dist import ALONE, Ranks, is_spread, part_of, whole
from ..channels import kept
from ..controls import store_by_shape
from ..errors import ConfigError, MoeifyError, TrainingError
from ..layers import moe_layers
from .expert_parallel import ExpertGroup, expert_group

ParallelKind = Literal["auto", "none", "ddp", "fsdp"]

_LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "timeout", "Timeout", "NCCL", "gloo", "peer")
"""What gloo and NCCL say where another process is gone or does not answer; gloo's are plain RuntimeErrors."""


@contextmanager
def distributed(*, timeout_s: float = 1800.0, device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` has started, and leave them at the end; without it, or joined already, nothing.

    GPUs: NCCL, and gloo for what is on the CPU; else gloo.

    Args:
        timeout_s: how long a process waits for the others before it gives up; longer than the slowest evaluation or checkpoint.
        device: "cpu" leaves GPUs alone; "auto" takes them where there are any.

    Yields:
        This process' device, for ``model.to``.

    Raises:
        ConfigError: fewer GPUs than processes on this machine.
    """
    joins = num_started() > 0 and not dist.is_initialized()
    place = torch.device("cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        local = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} of this machine has no GPU ({torch.cuda.device_count()} there); lower --nproc-per-node.")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if joins:
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        _join(backend, timedelta(seconds=timeout_s))
    try:
        yield place
    finally:
        if joins:
            dist.destroy_process_group()


def _join(backend: str, timeout: timedelta) -> None:
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend, timeout=timeout)
        return
    # torchrun --max-restarts on one machine: the agent's store lives on, with the addresses of processes that are gone (torch 2.13). Of
    # several machines the counts need not agree.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(backend, store=PrefixStore(f"restart-{restarts}", store), rank=rank, world_size=size, timeout=timeout)


class Parallel:
    """How one `train` is spread over processes.

    Args:
        kind: see `TrainConfig.parallel`.
        model: on its device, with everything attached to it; "fsdp" turns its parameters into new ones, each process with its part.
        compute: dtype of matrix products: of what "fsdp" gathers.
        experts: processes that share out experts, see `TrainConfig.expert_parallel`.

    Raises:
        ConfigError: several processes are asked for and not there, float16 with "fsdp", or ``experts`` does not divide their number, or is
            more than the experts of an FFN.
    """

    def __init__(self, kind: ParallelKind, model: nn.Module, *, compute: torch.dtype, experts: int = 1) -> None:
        self.ranks = ALONE if kind == "none" else Ranks.present()
        is_joined = dist.is_available() and dist.is_initialized()
        if kind != "none" and not is_joined and num_started() > 1:
            raise ConfigError(
                "torchrun has started several processes, which have not joined; train inside of 'with moeify.train.distributed()'."
            )
        if kind in ("ddp", "fsdp") and not is_joined:
            raise ConfigError(f"parallel='{kind}' needs several processes: start with torchrun, and train inside of distributed().")
        self.kind = ("ddp" if self.ranks.size > 1 else "none") if kind == "auto" else kind
        self._experts = self._shared(experts, model)
        self._layers = list(moe_layers(model).values())
        self.model = model
        """What a forward calls."""
        self._device = next(model.parameters()).device
        self._routers: list[nn.Parameter] = []
        if self.kind == "ddp":
            self._routers = [p for layer in moe_layers(model).values() for p in layer.router.parameters() if p.requires_grad]
            self.model = _replicated(model, self._routers, self.ranks)
        elif self.kind == "fsdp":
            if compute is torch.float16:
                raise ConfigError("compute='float16' does not go with parallel='fsdp'; use bfloat16.")
            shard(model, compute=compute)

    def _shared(self, size: int, model: nn.Module) -> ExpertGroup | None:
        if size == 1:
            return None
        if self.ranks.size % size:
            raise ConfigError(
                f"expert_parallel {size} does not divide the {self.ranks.size} processes that train; set 1, or one that does."
            )
        group = expert_group(size)
        for layer in moe_layers(model).values():
            group.bounds(layer.num_experts)
        return group

    @contextmanager
    def shared_experts(self) -> Iterator[None]:
        """Inside, FFNs in moe mode that train are computed by the processes that share out their experts."""
        if self._experts is None:
            yield
            return
        with kept(self._layers, "dispatch"):
            for layer in self._layers:
                layer.dispatch = self._experts.ffn
            yield

    @property
    def is_spread(self) -> bool:
        """Whether each process has a part of the weights: then all must run the same forwards."""
        return self.kind == "fsdp"

    def weight(self, count: int, total: int) -> float:
        """What a micro-batch's mean loss is multiplied by; gradients are averaged over processes."""
        return count / total * self.ranks.size

    def totals(self, *counts: int) -> list[int]:
        """Sums over processes."""
        if self.ranks.size == 1:
            return list(counts)
        return [int(value) for value in self.ranks.sum(torch.tensor(counts)).tolist()]

    @contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        """Around a forward and its backward; DDP sends gradients after the last one of a step alone.

        FSDP sends after each: to wait would keep whole gradients.
        """
        waits = isinstance(self.model, nn.parallel.DistributedDataParallel) and not is_last
        with cast(nn.parallel.DistributedDataParallel, self.model).no_sync() if waits else nullcontext():
            yield
        if is_last:
            self._average_routers()

    def _average_routers(self) -> None:
        gradients = [p.grad for p in self._routers if p.grad is not None]
        if not gradients:
            return
        mean = self.ranks.sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.ranks.size
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def begin_step(self, step: int, *, seed: int) -> None:
        """Random numbers (dropout) of this process and step: nothing of them has to be kept, and other processes have others."""
        if self.ranks.size > 1:
            mixed = (seed * 1_000_003 + step) * 65_537 + self.ranks.rank
            torch.default_generator.manual_seed(mixed)
            if self._device.type == "cuda":
                torch.cuda.manual_seed(mixed)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of all gradients, whole ones."""
        return whole(nn.utils.get_total_norm(gradients))

    def faults(self, step: int) -> AbstractContextManager[None]:
        """`faults` of a step."""
        return faults(self.ranks, f"at step {step}")


@contextmanager
def faults(ranks: Ranks, where: str) -> Iterator[None]:
    """Say so in one line where another process is gone.

    Raises:
        TrainingError: it is.
    """
    try:
        yield
    except MoeifyError:
        raise
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST)
        if ranks.size == 1 or not is_lost:
            raise
        raise TrainingError(
            f"process {ranks.rank} of {ranks.size} lost another one {where} ({_said(error)}); "
            "that one's own output says why. The same command goes on from the last saved state."
        ) from error


def share(rows: Sequence[int], micro: int | None, ranks: Ranks) -> list[list[int]]:
    """One process' part of a step's sequences, in forwards of at most ``micro``: as many on every process, the last may be empty."""
    most = -(-len(rows) // ranks.size)
    own = list(rows[ranks.rank :: ranks.size])
    micro = micro or max(1, most)
    return [own[i : i + micro] for i in range(0, most, micro)]


def _replicated(model: nn.Module, routers: Sequence[nn.Parameter], ranks: Ranks) -> nn.Module:
    """A model whose gradients are averaged by DDP, but for those of routers, which have none in dense phases.

    DDP's own way, ``find_unused_parameters``, searches the graph after every forward and warns in sparse phases that it need not. Buffers
    are left alone, too: at every forward each process would wait for the first one's.
    """
    _take_from_first(model, ranks)
    left = {id(p) for p in routers}
    ignored = [name for name, p in model.named_parameters() if id(p) in left] + [name for name, _ in model.named_buffers()]
    if not any(p.requires_grad and id(p) not in left for p in model.parameters()):
        return model  # routers alone are trained
    device = next(model.parameters()).device
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]  # what DDP reads; there is no argument for it
    try:
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    finally:
        del model._ddp_params_and_buffers_to_ignore


@torch.no_grad()
def _take_from_first(model: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's weights and buffers."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.copy_(ranks.broadcast(tensor, source=0))


def shard(model: nn.Module, *, compute: torch.dtype = torch.float32) -> None:
    """Spread a model's parameters over all processes (FSDP2), blocks first, then what is left; in place.

    A block is a child of an outermost ``nn.ModuleList`` or ``nn.Sequential`` that holds parameters. Its FFN's weights are whole while the
    block computes, forward and backward, and nowhere else. Routers are gathered by themselves, in float32. The first process' weights
    count.

    Args:
        model: on its device.
        compute: dtype that blocks' parameters are gathered in, for an autocast to it; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ranks, device = Ranks.present(), next(model.parameters()).device
    _take_from_first(model, ranks)
    store_by_shape(model)
    mesh = init_device_mesh(device.type, (ranks.size,))
    low = None if compute is torch.float32 else compute
    # Inputs are not cast, and what is outside of blocks stays as it is: so that the loop's autocast finds what it would without sharding,
    # a residual stream in float32 above all, and only norms' weights are rounded more.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=None if low is None else torch.float32, cast_forward_inputs=False)
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in moe_layers(model).values():
        if any(True for _ in layer.router.parameters()):
            fully_shard(layer.router, mesh=mesh, mp_policy=plain)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=plain)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """A model's blocks: children, with parameters, of the outermost lists of modules."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential):
                found.extend(block for block in child if any(True for _ in block.parameters()))
            else:
                look(child)

    look(model)
    return found


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A trained model's ``state_dict`` on the CPU, gathered tensor by tensor: for ``save_pretrained(..., state_dict=...)``.

    All processes call this.

    Returns:
        All of it in the first process, {} in others.
    """
    state: dict[str, Tensor] = {}
    is_first = Ranks.present().is_first
    for name, tensor in model.state_dict().items():
        full = whole(tensor) if isinstance(tensor, Tensor) else tensor
        if is_first:
            state[name] = full.detach().to("cpu") if isinstance(full, Tensor) else full
    return state


def blank(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch that a process runs because the others run one: any labels, so that its loss is a number, which counts 0."""
    return {key: torch.zeros_like(value) if key == "labels" else value for key, value in batch.items()}


def is_finite(gradient: Tensor) -> bool:
    """Whether this process' part of a gradient is finite."""
    return bool(part_of(gradient).isfinite().all())


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the model."""
    return any(is_spread(p) for p in model.parameters())


def _said(error: Exception) -> str:
    return str(error).splitlines()[0].partition(". ")[0]


def started_rank() -> int:
    """Number of this process among those that torchrun has started, joined or not; 0 without it."""
    return int(os.environ["RANK"]) if num_started() > 0 else 0


def num_started() -> int:
    """Processes that torchrun, or whoever sets the same variables, has started; 0: none has."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_available() and {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 0

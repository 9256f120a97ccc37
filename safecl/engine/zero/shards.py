"""The layout of DeepSpeed's flat fp32 shards: where the elements of each parameter are on this rank.

No other module uses DeepSpeed's private names. Layouts of DeepSpeed 0.19.8 (other versions are refused):

  stage 0       no shards: every parameter is its own flat tensor, replicated on all ranks
  stage 1, 2    the group's parameters concatenated in optimizer order, padded at the end to a multiple of 2 W;
                rank r owns [r * part, (r + 1) * part). Shards cut through parameters.
  stage 3       of every parameter rank r owns elements [r * ceil(n / W), (r + 1) * ceil(n / W)), padded inside the
                parameter; the pieces are concatenated.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from safecl.distributed import collectives, devices, recorder
from safecl.engine.zero.compiling import compiling_late
from safecl.kernels import page_locked

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SUPPORTED = ((0, 19, 8), (0, 20, 0))
LIVE, PREFETCHED = 10**9, 5 * 10**7
"""Elements that stage 3 keeps gathered at most, and those that it gathers ahead."""


@dataclass(frozen=True)
class Fragment:
    """Elements of one parameter that are next to each other in one of this rank's flat shards."""

    name: str
    offset: int
    """The first element, counted in the flattened parameter."""
    length: int
    flat: int
    """Number of the shard."""
    start: int
    """Index of the first element in the shard."""


def check_deepspeed_version() -> None:
    """Raise RuntimeError for a version of DeepSpeed whose layout is not known."""
    import deepspeed

    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3])
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} is not supported: safecl reads its shards' layout, which it knows for "
            ">= 0.19.8, < 0.20"
        )


def initialize(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    config: dict[str, Any],
    viewed: Collection[torch.nn.Parameter] = (),
    when_partitioned: Callable[[], None] = lambda: None,
) -> DeepSpeedEngine:
    """Call deepspeed.initialize and return its engine.

    Stage 3 cuts up one parameter after the other, so that no device ever holds the whole model. viewed: parameters that
    are views of a read-only store, and so equal on all ranks already. DeepSpeed's broadcast from rank 0 leaves them
    out. when_partitioned: called in stage 3 as soon as none of them is a view any more, before DeepSpeed makes the
    master weights.
    """
    import deepspeed

    _lock_memory_exactly()
    limit = recorder.default_timeout(collectives.timeout_of_phase())
    with limit, compiling_late(), _broadcasting_all_but({id(p) for p in viewed}, when_partitioned):
        if config["zero_optimization"]["stage"] == 3:
            _shard_at_once(model, config)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def reads_parameter(engine: DeepSpeedEngine, module: torch.nn.Module, parameter: torch.Tensor) -> None:
    """Tell stage 3 that the module's forward reads a parameter of another module.

    DeepSpeed notices it in the first such pass; where passes of another kind have come before, the order in which
    parameters are used is no longer the one that it has noted, and it raises.
    """
    import deepspeed

    if engine.zero_optimization_stage() == 3:
        deepspeed.zero.register_external_parameter(module, parameter)


@contextlib.contextmanager
def whole_model(module: torch.nn.Module) -> Iterator[None]:
    """Keep the weights of a module that stage 3 has cut up whole on every rank inside the block, gathered once, for
    passes that change none."""
    import deepspeed

    live: list[Any] = list(module.parameters())
    known = [p.is_external_param for p in live]
    with contextlib.ExitStack() as stack:
        for p in live:
            stack.enter_context(deepspeed.zero.GatheredParameters([p]))
            p.is_external_param = True  # DeepSpeed's hooks do not release such parameters after a module
        try:
            yield
        finally:
            for p, before in zip(live, known, strict=True):
                p.is_external_param = before


def whole_model_bytes(module: torch.nn.Module) -> int:
    """Bytes of the weights of a module on a rank that holds them all."""
    return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in module.parameters())


def _shard_at_once(model: torch.nn.Module, config: dict[str, Any]) -> None:
    """Give each rank its part of every parameter, on the device (or in host memory where parameters are offloaded), and
    put the buffers on the device. deepspeed.initialize would first copy the whole model to every device."""
    import deepspeed

    dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
    for p in model.parameters():
        if p.is_floating_point() and p.dtype != dtype:
            p.data = p.data.to(dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(devices.device())


def _lock_memory_exactly() -> None:
    """Let DeepSpeed, too, lock host memory of exactly the size that it needs."""
    from deepspeed.accelerator import get_accelerator

    if devices.on_gpu():
        accelerator = get_accelerator()
        accelerator._torch_pin_memory = page_locked.copy_of
        accelerator._torch_empty_pinned = lambda like, shape: page_locked.empty(shape, like.dtype)


@contextlib.contextmanager
def _broadcasting_all_but(viewed: set[int], when_partitioned: Callable[[], None]) -> Iterator[None]:
    """Make DeepSpeed leave these parameters (by id) out of its broadcast from rank 0, inside the block."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partition_parameters import Init

    replicate, partition, remaining = DeepSpeedEngine._broadcast_model, Init._zero_init_param, set(viewed)

    def broadcast_model(engine: Any) -> None:  # stages 0 to 2
        for p in engine.module.parameters():
            if id(p) not in viewed and not hasattr(p, "ds_id"):
                dist.broadcast(p.data, 0)

    def partition_one(init: Any, p: Any) -> None:  # stage 3
        init._convert_to_deepspeed_param(p)
        if id(p) not in viewed:
            dist.broadcast(p.data, 0)
        p.partition()
        if id(p) in remaining:
            remaining.remove(id(p))
            if not remaining:
                when_partitioned()

    if viewed:
        DeepSpeedEngine._broadcast_model, Init._zero_init_param = broadcast_model, partition_one
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model, Init._zero_init_param = replicate, partition


class ShardMap:
    """The places of the trained weights in the flat shards, in every ZeRO stage.

    `flats[i]` is this rank's i-th flat fp32 master tensor, which the optimizer sees; `fragments` lists the parts of
    parameters in all of them. In stage 0 every rank has all weights (`replicated`); in the others the ranks' fragments
    are a partition of them.

    engine: the result of deepspeed.initialize. prefix: removed from the parameters' names.
    """

    def __init__(self, engine: DeepSpeedEngine, prefix: str = ""):
        check_deepspeed_version()
        self.engine = engine
        self.optimizer: Any = engine.optimizer
        self.stage: int = engine.zero_optimization_stage()
        self.named = [(name.removeprefix(prefix), p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.named}
        self.numel = sum(_numel(shape) for shape in self.shapes.values())
        self.replicated = self.stage == 0
        if self.stage == 3:
            self._skip_scaling_by_one()
            self._step_on_the_gradients_themselves()
        elif self.stage in (1, 2):
            # Otherwise DeepSpeed's first step links the optimizer's current state to every parameter. State that is
            # dropped later (temporary sums of a Fisher, moments of the last task) would then stay in memory until the
            # run ends.
            self.optimizer._hp_optimizer_states_linked = True
        self.flats = self._find_flats()
        self.fragments = list(self._find_fragments())

    # ----------------------------------------------------------------------------------------------------------- layout

    def _find_flats(self) -> list[torch.Tensor]:
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        if self.stage in (1, 2):
            bf16_optimizer = getattr(self.optimizer, "fp32_groups_flat_partition", None)
            return list(
                bf16_optimizer if bf16_optimizer is not None else self.optimizer.single_partition_of_fp32_groups
            )
        masters = getattr(self.optimizer, "fp32_groups", None)  # the bf16 wrapper of stage 0
        return [p for group in masters for p in group] if masters is not None else [p for _, p in self.named]

    def _find_fragments(self) -> Iterator[Fragment]:
        if self.stage == 0:
            for index, (name, shape) in enumerate(self.shapes.items()):
                yield Fragment(name, 0, _numel(shape), index, 0)
        elif self.stage == 3:
            yield from self._stage3_fragments()
        else:
            yield from self._stage12_fragments()

    def _stage12_fragments(self) -> Iterator[Fragment]:
        assert len(self.flats) == 1, "safecl uses one parameter group"
        part = self.flats[0].numel()
        begin, end = dist.get_rank() * part, (dist.get_rank() + 1) * part
        position = 0
        for name, shape in self.shapes.items():
            numel = _numel(shape)
            low, high = max(position, begin), min(position + numel, end)
            if low < high:
                yield Fragment(name, low - position, high - low, 0, low - begin)
            position += numel

    def _stage3_fragments(self) -> Iterator[Fragment]:
        names = {id(p): name for name, p in self.named}
        rank, world = dist.get_rank(), dist.get_world_size()
        for index, group in enumerate(self.optimizer.fp16_groups):
            start = 0
            for p in group:
                numel = p.ds_numel
                part = -(-numel // world)
                low, high = min(rank * part, numel), min((rank + 1) * part, numel)
                if low < high:
                    yield Fragment(names[id(p)], low, high - low, index, start)
                start += part

    # --------------------------------------------------------------------------------------------------------- elements

    def view(self, fragment: Fragment, tensors: list[torch.Tensor] | None = None) -> torch.Tensor:
        """The fragment's elements, 1-D, in the master weights or in `tensors` of their layout (state of one kind)."""
        flat = (self.flats if tensors is None else tensors)[fragment.flat]
        return flat.detach().view(-1)[fragment.start : fragment.start + fragment.length]

    def read(self, name: str, tensors: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Return a whole parameter (or its state) on the CPU, in the tensors' dtype. A collective call."""
        sample = (self.flats if tensors is None else tensors)[0]
        full = torch.zeros(_numel(self.shapes[name]), dtype=sample.dtype, device=self.engine.device)
        for fragment in self.fragments:
            if fragment.name == name:
                full[fragment.offset : fragment.offset + fragment.length] = self.view(fragment, tensors).to(full.device)
        if not self.replicated:
            dist.all_reduce(full)
        return full.cpu().view(self.shapes[name])

    def write(self, name: str, value: torch.Tensor, tensors: list[torch.Tensor] | None = None) -> None:
        """Write a whole parameter (or its state) into the shards. Every rank passes the same value.

        Call `publish` after a change of the master weights.
        """
        assert tuple(value.shape) == self.shapes[name], f"{name}: shape {tuple(value.shape)} is not {self.shapes[name]}"
        for fragment in self.fragments:
            if fragment.name == name:
                own = value.reshape(-1)[fragment.offset : fragment.offset + fragment.length]
                self.view(fragment, tensors).copy_(own)

    def swap(self, tensors: list[torch.Tensor], chunk: int = 1 << 24) -> None:
        """Exchange the master weights with tensors of their layout (the EMA), and publish. A second call restores both
        exactly."""
        for flat, other in zip(self.flats, tensors, strict=True):
            flat, other = flat.detach().view(-1), other.view(-1)
            for begin in range(0, flat.numel(), chunk):
                saved = flat[begin : begin + chunk].clone()
                flat[begin : begin + chunk].copy_(other[begin : begin + chunk])
                other[begin : begin + chunk].copy_(saved)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the live model's weights, in the model's dtype."""
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # parameters that are still gathered would hide the new values
            for index in range(len(self.flats)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
            self.optimizer.checkpoint_event_epilogue()
        elif self.stage in (1, 2):
            self.optimizer.update_lp_params()
        elif hasattr(self.optimizer, "fp32_groups"):
            for masters, live in zip(self.optimizer.fp32_groups, self.optimizer.fp16_groups, strict=True):
                for master, p in zip(masters, live, strict=True):
                    p.data.copy_(master.data)

    # -------------------------------------------------------------------------------------------------------- gradients

    def grad_norm(self) -> torch.Tensor | None:
        """The global gradient norm that DeepSpeed computed just before it called the optimizer; None where it computes
        none (stage 0, fp32)."""
        norm = getattr(self.optimizer, "_global_grad_norm", None)
        if norm is None or self.stage == 0:
            return None
        return torch.as_tensor(norm, dtype=torch.float32, device=self.flats[0].device)

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all shards of numbers that each rank has for its own shards; in stage 0 every rank has the sum."""
        if self.replicated or dist.get_world_size() == 1:
            return values
        moved = values.to(self.engine.device)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def all_agree(self, flag: bool) -> bool:
        """Return whether the flag is true on every rank.

        A collective call in stage 0, where each rank has a norm of its own; in the other stages the norm, and so the
        flag, is the same on all ranks.
        """
        if not self.replicated or dist.get_world_size() == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.engine.device)
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
        return bool(value.item())

    def _skip_scaling_by_one(self) -> None:
        """Save a pass over the shard: stage 3 multiplies all gradients by 1 / loss scale even when that is 1."""
        original = self.optimizer.unscale_and_clip_grads

        def unscale(optimizer: Any, sub_group_id: int, total_norm: torch.Tensor) -> None:
            if optimizer.loss_scale != 1.0 or optimizer.clip_grad > 0.0:
                original(sub_group_id, total_norm)

        self.optimizer.unscale_and_clip_grads = types.MethodType(unscale, self.optimizer)

    def _step_on_the_gradients_themselves(self) -> None:
        """Save 4 bytes per weight and a pass over the shard: for the step, stage 3 flattens the reduced gradients,
        although they are slices of one flat buffer."""
        original = self.optimizer._prepare_fp32_grad_for_sub_group

        def prepare(optimizer: Any, sub_group_id: int) -> None:
            masters, gradients = optimizer.fp32_partitioned_groups_flat, optimizer.grad_partitions_flat_buffer
            master = masters[sub_group_id]
            fits = gradients.shape == master.shape and gradients.dtype == master.dtype
            if len(masters) > 1 or not fits:
                original(sub_group_id)
                return
            master.grad = gradients
            optimizer.averaged_gradients[sub_group_id] = None

        self.optimizer._prepare_fp32_grad_for_sub_group = types.MethodType(prepare, self.optimizer)

    def full_parameter(self, p: torch.nn.Parameter) -> AbstractContextManager[Any]:
        """A context in which a live parameter is whole on every rank, for reading."""
        if self.stage == 3:
            import deepspeed

            return deepspeed.zero.GatheredParameters([p])
        return contextlib.nullcontext()


class UnshardedFp32Gradients:
    """Accumulates and reduces gradients in fp32 for stage 0 in bf16, where DeepSpeed does so in bf16 only.

    Call `add` after each backward (none of them at an accumulation boundary), `reduce` after the last one, `hand_over`
    inside the optimizer, and `clear` after the step, also where DeepSpeed skipped it.
    """

    def __init__(self, shard_map: ShardMap):
        self.live = [p for _, p in shard_map.named]
        self.sums = [torch.zeros_like(p, dtype=torch.float32) for p in self.live]

    @torch.no_grad()
    def add(self) -> None:
        for p, total in zip(self.live, self.sums, strict=True):
            if p.grad is not None:
                total.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def reduce(self) -> None:
        """Take the mean over ranks. Only DeepSpeed's check that all gradients are finite reads the bf16 copy."""
        for p, total in zip(self.live, self.sums, strict=True):
            dist.all_reduce(total)
            p.grad = total.div_(dist.get_world_size()).to(p.dtype)

    def hand_over(self, masters: list[torch.Tensor]) -> None:
        """Set the fp32 gradients as those of the master weights."""
        for master, total in zip(masters, self.sums, strict=True):
            master.grad = total

    def clear(self) -> None:
        for total in self.sums:
            total.zero_()


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())

"""The Accelerator of this process, and functions that depend on the launcher."""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator as Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType, broadcast_object_list

from tutelage.engine import zero
from tutelage.errors import CapabilityError, MissingDependencyError

T = TypeVar("T")


def build_accelerator(precision: str | None = None, trackers: list[str] | None = None) -> Accelerator:
    """Build the accelerator of this process, started by ``accelerate launch``, ``torchrun`` or directly."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if zero.uses_deepspeed():
        zero.check_installed()
    elif world > 1 and not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "1"  # else accelerate treats each process as the only one
    precision = resolve_precision(precision)
    if AcceleratorState._shared_state and precision != AcceleratorState().mixed_precision:
        AcceleratorState._reset_state()  # a second run in one process may use another precision
    for tracker in trackers or ():
        if LoggerType(tracker) not in get_available_trackers():  # accelerate would ignore it silently
            raise MissingDependencyError(
                f"train.trackers: {tracker} is not installed",
                remedy=f"pip install {tracker}, or remove it from train.trackers",
            )
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise CapabilityError(
            "fp16 needs a GPU, and this run is on the CPU",
            where="train.precision",
            remedy="use bf16, or no mixed precision",
        )
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            log_with=trackers or None,
            project_dir=".",  # trackers need one now; open_trackers() sets the real one before they write
        )
    except (ImportError, ValueError) as error:
        raise CapabilityError(
            str(error), remedy="install the package, or change train.precision or train.trackers"
        ) from None
    if accelerator.num_processes != world:
        raise CapabilityError(
            f"the launcher started {world} processes, but accelerate sees {accelerator.num_processes}",
            remedy="start it with torchrun --nproc_per_node N -m tutelage run ..., and check `accelerate env`",
        )
    if world > 1:
        _wait_at_exit()
    return accelerator


def resolve_precision(precision: str | None) -> str:
    """The mixed precision on this machine: ``no``, ``bf16`` or ``fp16``.

    Args:
        precision: one of these; ``auto``: bf16 if the hardware supports it, else ``no``; ``None``: that of the
            launcher, else ``no``.
    """
    if precision == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        if device is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
            has_bf16 = _cpu_has_bf16()
        else:
            has_bf16 = device.type != "mps" and (
                device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
            )
        return "bf16" if has_bf16 else "no"
    return precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def is_bf16_slow(accelerator: Accelerator) -> bool:
    """Whether this run computes in bf16 on a CPU without bf16 instructions."""
    return accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 instructions; on x86 (AVX-512, AMX) and ARM their names contain "bf16"."""
    return any(available for name, available in torch.cpu.get_capabilities().items() if "bf16" in name)


def leave() -> None:
    """Leave the process group, at the end of a launched process without an error."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        _wait_at_exit()


def _wait_at_exit() -> None:
    """Make the interpreter wait for gloo's threads as the first step of its exit."""
    atexit.unregister(_wait_for_gloo)
    atexit.register(_wait_for_gloo)


def _wait_for_gloo() -> None:
    """Wait until gloo's threads have released the tensors of their last collective.

    A thread of gloo signals the end of a collective before it releases the tensors, which needs the interpreter's
    lock. If the interpreter exits in between, the process aborts ("terminate called without an active exception")
    after its work is done, and the launcher reports a failed run. DDP holds a process group beyond
    ``destroy_process_group``, so its threads cannot be joined here.
    """
    time.sleep(0.5)


def broadcast_from_main(accelerator: Accelerator, make: Callable[[], T]) -> T:
    """The result of ``make`` on every process; only the main process calls ``make``."""
    value = [make() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(value)
    return value[0]  # type: ignore[return-value]


@contextmanager
def open_trackers(accelerator: Accelerator, folder: Path, config: dict[str, str]) -> Iterator[None]:
    """Open the experiment trackers, if there are any, during the block; they write their files to ``folder``."""
    if not accelerator.log_with:
        yield
        return
    accelerator.project_configuration.project_dir = str(folder)
    accelerator.project_configuration.logging_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("tutelage", config=config)
    try:
        yield
    finally:
        accelerator.end_training()
        accelerator.trackers = []

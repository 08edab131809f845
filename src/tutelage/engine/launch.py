"""The accelerator of this process, as the launcher set it up."""

from __future__ import annotations

from accelerate import Accelerator as Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list

from tutelage.errors import CapabilityError


def make_accelerator(
    precision: str | None = None, trackers: list[str] | None = None, project_dir: str | None = None
) -> Accelerator:
    """An accelerator under ``accelerate launch``, ``torchrun`` or neither.

    Args:
        precision: ``no``, ``bf16``, ``fp16``; ``None`` for what the launcher says.
        trackers: experiment trackers by accelerate's names.
        project_dir: where trackers that write files put them.

    Raises:
        CapabilityError: this machine cannot compute in that precision, or a tracker is not installed.
    """
    if AcceleratorState._shared_state and precision not in (None, AcceleratorState().mixed_precision):
        AcceleratorState._reset_state()  # a second run in one process may want another precision
    if precision == "fp16" and PartialState().device.type == "cpu":
        raise CapabilityError(
            "train.precision fp16 needs a GPU; this run is on the CPU", remedy="use bf16, or no mixed precision"
        )
    try:
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            log_with=trackers or None,
            project_dir=project_dir,
        )
    except (ImportError, ValueError) as error:
        raise CapabilityError(
            str(error), remedy="install the package, or change train.precision / trackers"
        ) from None


def from_main(accelerator: Accelerator, value: str) -> str:
    """The main process's value, on every process."""
    return value if accelerator.num_processes == 1 else str(broadcast_object_list([value])[0])

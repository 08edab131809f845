"""An exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA:
    """Averages of all floating parameters of a module: ``a = decay * a + (1 - decay) * w``.

    In the first steps the decay is (1 + step) / (10 + step), so that the initial weights have little influence.
    Buffers are not averaged.

    Args:
        module: the unwrapped module, sharded or not. Its names are the same for any number of processes.
        decay: in (0, 1).

    Reference: Tarvainen and Valpola, Mean teachers are better role models (2017), section 3.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = dict(module.named_parameters())
        self.averages = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its weight."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            [_local(a) for a in self.averages.values()],
            [_local(p.detach()) for p in self.parameters.values()],
            1.0 - decay,
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Use the averages as weights of the module during the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            mine, theirs = _local(self.averages[name]), _local(parameter.data)
            weights = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(weights)

    def state(self) -> dict[str, object]:
        """The unsharded state for a checkpoint; every process must call it."""
        whole = {k: a.full_tensor() if isinstance(a, DTensor) else a for k, a in self.averages.items()}
        return {"updates": self.updates, "averages": whole}

    @torch.no_grad()
    def load(self, state: dict[str, object]) -> None:
        """Restore :meth:`state`."""
        self.updates = int(state["updates"])  # type: ignore[call-overload]
        whole: dict[str, Tensor] = state["averages"]  # type: ignore[assignment]
        for name, average in self.averages.items():
            value = whole[name]
            if isinstance(average, DTensor):
                value = distribute_tensor(value, average.device_mesh, average.placements)
            average.copy_(value)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x

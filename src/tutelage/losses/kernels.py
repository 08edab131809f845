"""GPU kernels of other packages, which need a few passes over memory where torch needs a dozen.

Each returns what :mod:`tutelage.losses.closed_form_grads` returns, times T^2 and from logits, so that masks, soft
caps, LoRA, other terms and sums in float32 are the same with and without it. If a package is missing, too old, or has
no kernel for the device, torch computes the loss.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tutelage.losses.closed_form_grads import LossAndGrad

DEVICES = {"cuda"}
"""Device types for which kernels are used."""

Kernel = Callable[[Tensor, Tensor, float, bool], LossAndGrad]
"""(student's logits ``[n, V]``, which it does not change, the teacher's, T, whether the gradient is required)."""


def kernel_for(divergence: str, logits: Tensor) -> Kernel | None:
    """The kernel for ``divergence`` of such logits, or ``None`` for torch. Kernels support float32 only."""
    if divergence not in KERNELS or logits.device.type not in DEVICES or logits.dtype != torch.float32:
        return None
    return KERNELS[divergence]()


@cache
def liger_kl() -> Kernel | None:
    """Liger's ``KL(p || q)``.

    Reference: Hsu et al., Liger Kernel (2024).
    """
    try:
        import liger_kernel.functional  # noqa: F401  # registers the kernels
        from liger_kernel.backends import available_impls, dispatch
    except ImportError:
        return None
    if not available_impls("kl_loss_and_grad"):
        return None
    least = torch.finfo(torch.float32).tiny  # the kernel clamps probabilities to this before it takes logarithms

    def compute(logits: Tensor, teacher: Tensor, t: float, needs_grad: bool) -> LossAndGrad:
        p = (teacher if t == 1.0 else teacher / t).softmax(-1)
        with torch.cuda.device_of(logits):
            value, grad = dispatch("kl_loss_and_grad", logits.clone(), p, None, -100, t, least, t**2)
        return LossAndGrad(value, grad if needs_grad else None)

    return compute


KERNELS: dict[str, Callable[[], Kernel | None]] = {"kl": liger_kl}
"""By divergence."""

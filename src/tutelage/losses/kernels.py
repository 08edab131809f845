"""Kernels of other packages, for a GPU: what torch passes over memory a dozen times for, they do in a few passes.

Each gives what :mod:`tutelage.losses.closed_form_grads` gives, with T^2 and from scores as they are, so that all else
(masks, soft caps, LoRA, other terms, sums in float32) is the same with and without it. Where a package is not
installed, is too old, or has no kernel for the device, torch does it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tutelage.losses.closed_form_grads import LossAndGrad

DEVICES = {"cuda"}
"""Types of devices on which kernels are looked for."""

Kernel = Callable[[Tensor, Tensor, float, bool], LossAndGrad]
"""(student's scores ``[n, V]``, which it leaves as they are, the teacher's, T, whether the gradient is wanted)."""


def kernel_for(divergence: str, scores: Tensor) -> Kernel | None:
    """What computes ``divergence`` of such scores, or ``None`` for torch. None is more precise than float32."""
    if divergence not in KERNELS or scores.device.type not in DEVICES or scores.dtype != torch.float32:
        return None
    return KERNELS[divergence]()


@cache
def liger_kl() -> Kernel | None:
    """Liger's ``KL(p || q)``.

    Reference: Hsu et al., Liger Kernel (2024).
    """
    try:
        import liger_kernel.functional  # noqa: F401  # says which kernels there are
        from liger_kernel.backends import available_impls, dispatch
    except ImportError:
        return None
    if not available_impls("kl_loss_and_grad"):
        return None
    least = torch.finfo(torch.float32).tiny  # of a probability, below which the kernel takes its logarithm as that

    def compare(scores: Tensor, said: Tensor, t: float, learns: bool) -> LossAndGrad:
        p = (said if t == 1.0 else said / t).softmax(-1)
        with torch.cuda.device_of(scores):
            value, slope = dispatch("kl_loss_and_grad", scores.clone(), p, None, -100, t, least, t**2)
        return LossAndGrad(value, slope if learns else None)

    return compare


KERNELS: dict[str, Callable[[], Kernel | None]] = {"kl": liger_kl}
"""By divergence."""

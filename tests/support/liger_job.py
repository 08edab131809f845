"""Token losses with Liger's kernel, in Triton's interpreter, for which no GPU is needed (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.token_world import OTHER, TOKENS, World, gradients, same
from tutelage.losses import LinearHead, kernels
from tutelage.losses.closed_form_grads import LossAndGrad

MASK = torch.arange(TOKENS) % 3 > 0
FULL: dict[str, Any] = {"bias": True, "lora": True, "scale": 0.3, "softcap": 2.5}
CASES: list[tuple[dict[str, Any], float, Tensor | None, bool]] = [
    ({}, 1.0, None, False),
    ({}, 2.0, MASK, True),
    (FULL, 0.7, MASK, False),
    (FULL, 2.0, None, True),
    ({"size": 33_000}, 2.0, MASK, False),  # more than the kernel takes at once
]
"""Head, temperature, mask, and whether the teacher gives scores."""


def main() -> None:
    """Compare with dense in float32, and count calls."""
    calls: list[Tensor] = []
    kernels.DEVICES.add("cpu")
    found = kernels.liger_kl()
    assert found is not None

    def watched(scores: Tensor, said: Tensor, t: float, learns: bool) -> LossAndGrad:
        before = scores.clone()
        calls.append(scores)
        result = found(scores, said, t, learns)
        assert torch.equal(scores, before), "other terms need them"
        return result

    kernels.KERNELS["kl"] = lambda: watched
    for head, t, mask, whole in CASES:
        world = World(torch.float32, **head)
        teacher = {"teacher": world.teacher()} if whole else {}
        options = {"temperature": t, "mask": mask, "ce": 0.6}
        value = world.chunked(chunk=5, **options, **teacher)
        assert calls, "another way was taken"
        calls.clear()
        with torch.no_grad():
            assert world.chunked(chunk=5, **options, **teacher) == value
        same(value, world.dense(**options), world.learned, 1e-5)
        by = world.draw(TOKENS).float()
        options |= {"reduction": "none", "ce": 0.0}
        same(world.chunked(chunk=5, **options, **teacher), world.dense(**options), world.learned, 1e-5, by)

    far = World(torch.float32, size=OTHER + 1)
    ends = torch.eye(OTHER + 1, OTHER).sub(0.5).mul(2)
    far.hidden = (200 * torch.eye(TOKENS, 5)).requires_grad_()
    far.weight = ends[:, :5].clone().requires_grad_()
    far.head, far.said, far.other = LinearHead(far.weight), -200 * torch.eye(TOKENS, OTHER), ends
    same(far.chunked(), far.dense(), far.learned, 1e-5)

    half = World(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in half.learned]
    for x, y in zip(
        gradients(half.chunked(temperature=2.0, teacher=half.teacher()), half.learned),
        gradients(_plain(exact, half.teacher().double()), exact),
        strict=True,
    ):
        assert (x.double() - y).norm() < 1e-2 * y.norm()

    calls.clear()
    World(torch.float64).chunked()
    World(torch.float32).chunked("reverse_kl")
    assert not calls, "a kernel of float32, and of another divergence, was taken"
    print("agrees", flush=True)


def _plain(of: list[Tensor], said: Tensor) -> Tensor:
    log_q, p = (of[0] @ of[1].mT / 2).log_softmax(-1), (said / 2).softmax(-1)
    return 4 * torch.nn.functional.kl_div(log_q, p, reduction="batchmean")


if __name__ == "__main__":
    main()

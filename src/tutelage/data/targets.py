"""The scale of regression targets."""

from typing import NamedTuple

from torch import Tensor

from tutelage.data.batch import IGNORE


class TargetScale(NamedTuple):
    """Mean and standard deviation of each target over the labelled training rows, ``[C]`` each."""

    mean: Tensor
    std: Tensor

    def standardise(self, values: Tensor) -> Tensor:
        """``[..., C]`` around the mean, in units of the standard deviation."""
        return (values - self.mean.to(values)) / self.std.to(values)


def target_scale(targets: Tensor | None, labels: Tensor) -> TargetScale | None:
    """The scale of ``[N, C]`` targets over the rows that have a label; ``None`` where no row has.

    A target that is the same in all rows has a standard deviation of 1.
    """
    known = None if targets is None else targets[labels != IGNORE].double()
    if known is None or not len(known):
        return None
    std = known.std(0, correction=0)
    return TargetScale(known.mean(0).float(), std.masked_fill(std == 0, 1.0).float())

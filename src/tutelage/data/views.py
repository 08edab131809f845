"""Augmentations of images and masking of tokens: functions of a seed, so that teacher, student and cache agree."""

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tutelage.data.batch import IGNORE
from tutelage.errors import ConfigError, DataError, require, suggest

UInts = npt.NDArray[np.uint64]
Augment = Callable[[Tensor, Tensor], Tensor]
"""``(uint8 images [B, C, H, W], seeds [B]) -> images`` of the same type."""


def _mix(x: UInts) -> UInts:
    """One round of splitmix64 (Steele et al., 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def view_seeds(run_seed: int, epoch: int, ids: Tensor) -> Tensor:
    """The seed of each sample's view in one epoch, int64 ``[B]``."""
    base = _mix(_mix(np.array([run_seed & (2**64 - 1)], dtype=np.uint64)) ^ np.uint64(epoch))
    mixed = _mix(base ^ _mix(ids.numpy().astype(np.uint64)))
    return torch.from_numpy(mixed.view(np.int64))


def uniform(seeds: Tensor, stream: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each seed; numbers of different streams are independent."""
    bits = _mix(seeds.numpy().view(np.uint64) ^ _mix(np.array([stream], dtype=np.uint64)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def flip(p: float = 0.5, *, stream: int) -> Augment:
    """Mirror left to right with probability ``p``."""
    if not 0 <= p <= 1:
        raise ValueError(f"p={p!r} is not a probability in [0, 1]")

    def apply(images: Tensor, seeds: Tensor) -> Tensor:
        chosen = torch.from_numpy(uniform(seeds, stream) < p).view(-1, 1, 1, 1)
        return torch.where(chosen, images.flip(-1), images)

    return apply


def shift(pixels: int = 2, *, stream: int) -> Augment:
    """Shift by up to ``pixels`` in each direction: a random crop after zero padding."""
    if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 0:
        raise ValueError(f"pixels={pixels!r} is not an integer of at least 0")

    def apply(images: Tensor, seeds: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        padded = torch.nn.functional.pad(images, [pixels] * 4)
        dy, dx = (
            torch.from_numpy((uniform(seeds, stream + i) * (2 * pixels + 1)).astype(np.int64)).view(n, 1, 1, 1)
            for i in range(2)
        )
        ys = torch.arange(height).view(1, 1, -1, 1) + dy
        xs = torch.arange(width).view(1, 1, 1, -1) + dx
        return padded[torch.arange(n).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1), ys, xs]

    return apply


def transform(name: str, options: dict[str, Any]) -> Augment:
    """A random transform of ``torchvision.transforms.v2``, applied to each image with the seed of its view."""
    require("torchvision", "vision", f"the augmentation {name!r}")
    from torchvision.transforms import v2

    module = getattr(v2, name)(**options)

    def apply(images: Tensor, seeds: Tensor) -> Tensor:
        return torch.stack(
            [apply_seeded(module, image, int(seed)) for image, seed in zip(images, seeds, strict=True)]
        )

    return apply


def apply_seeded(transform: Callable[[Any], Any], image: Any, seed: int) -> Any:
    """``transform(image)`` with seeded generators of torch and Python, whose states are then restored."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed & (2**63 - 1))
        random.seed(seed)
        try:
            return transform(image)
        finally:
            random.setstate(state)


Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(images, images to mix with, seeds) -> images``."""


def partners(seeds: Tensor, count: int, stream: int) -> tuple[Tensor, Tensor]:
    """For each seed a row of ``count`` to mix with, and the seed of that row's view."""
    rows = torch.from_numpy((uniform(seeds, stream) * count).astype(np.int64))
    views = _mix(seeds.numpy().view(np.uint64) ^ _mix(np.array([stream + 1], dtype=np.uint64)))
    return rows, torch.from_numpy(views.view(np.int64))


def _beta(alpha: float, seeds: Tensor, stream: int) -> npt.NDArray[np.float64]:
    """A sample of Beta(alpha, alpha) for each seed."""
    from scipy.special import betaincinv

    out: npt.NDArray[np.float64] = betaincinv(alpha, alpha, uniform(seeds, stream))
    return out


def mixup(alpha: float = 1.0, *, stream: int) -> Mix:
    """Blend two images with a weight from Beta(`alpha`, `alpha`) (Zhang et al., 2018)."""
    _check_alpha(alpha)

    def apply(images: Tensor, others: Tensor, seeds: Tensor) -> Tensor:
        share = torch.from_numpy(_beta(alpha, seeds, stream + 2)).float().view(-1, 1, 1, 1)
        return (images.float() * share + others.float() * (1 - share)).round().to(torch.uint8)

    return apply


def cutmix(alpha: float = 1.0, *, stream: int) -> Mix:
    """Paste a rectangle of another image; its area is from Beta(`alpha`, `alpha`) (Yun et al., 2019)."""
    _check_alpha(alpha)

    def apply(images: Tensor, others: Tensor, seeds: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        side = np.sqrt(1 - _beta(alpha, seeds, stream + 2))
        inside = []
        for i, length in enumerate((height, width)):
            centre, half = uniform(seeds, stream + 3 + i) * length, side * length / 2
            at = np.arange(length)[None]
            inside.append((at >= np.round(centre - half)[:, None]) & (at < np.round(centre + half)[:, None]))
        box = torch.from_numpy(inside[0][:, None, :, None] & inside[1][:, None, None, :])
        return torch.where(box, others, images)

    return apply


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha!r} is not a number above 0")


TENSOR_AUGMENTS: dict[str, Callable[..., Augment]] = {"flip": flip, "shift": shift}
MIX_AUGMENTS: dict[str, Callable[..., Mix]] = {"cutmix": cutmix, "mixup": mixup}
"""Augmentations that combine two images. The result has no label, so the student learns only from the teacher."""
TORCHVISION_AUGMENTS = {
    "auto-augment": "AutoAugment",
    "color-jitter": "ColorJitter",
    "erase": "RandomErasing",
    "grayscale": "RandomGrayscale",
    "rand-augment": "RandAugment",
    "rotate": "RandomRotation",
    "trivial-augment": "TrivialAugmentWide",
}
MAIN_OPTION = {
    "cutmix": "alpha", "mixup": "alpha", "flip": "p", "shift": "pixels", "rotate": "degrees", "erase": "p",
    "grayscale": "p",
}  # fmt: skip
"""The option that a single value sets, as in ``{shift: 2}``."""
CROPS = ("resized-crop",)
"""Augmentations that replace the resizing of an image file; they must come first."""


def parse_augment(entry: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Parse ``shift``, ``{shift: 2}`` or ``{shift: {pixels: 2}}`` to a name and options.

    Raises:
        ConfigError: the name is unknown, or the entry has another form.
    """
    allowed = [*TENSOR_AUGMENTS, *MIX_AUGMENTS, *TORCHVISION_AUGMENTS, *CROPS]
    names = [entry] if isinstance(entry, str) else list(entry)
    name = names[0] if len(names) == 1 else ""
    if name not in allowed:
        raise ConfigError(
            f"data.augment: {entry!r} is not one augmentation" + suggest(name, allowed),
            remedy=f"give one name in each entry of the list: {', '.join(allowed)}",
        )
    value = None if isinstance(entry, str) else entry[name]
    if value is None:
        return name, {}
    if isinstance(value, dict):
        return name, value
    if name not in MAIN_OPTION:
        raise ConfigError(
            f"data.augment: {name}: {value!r} gives no option by name", remedy=f"write {{{name}: {{OPTION: VALUE}}}}"
        )
    return name, {MAIN_OPTION[name]: value}


def build_augments(entries: Sequence[str | dict[str, Any]]) -> tuple[list[Augment], list[tuple[int, Mix]]]:
    """The augmentations of a recipe except crops: those of one image, and those of two images with their stream.

    Each augmentation has a random stream of its own.

    Raises:
        ConfigError: a name or option is unknown, or an augmentation of one image follows one of two.
        MissingDependencyError: torchvision is needed and not installed.
    """
    augments: list[Augment] = []
    mixes: list[tuple[int, Mix]] = []
    for position, entry in enumerate(entries):
        name, options = parse_augment(entry)
        if name in CROPS:
            continue
        if mixes and name not in MIX_AUGMENTS:
            raise ConfigError(f"data.augment: {name} follows mixup or cutmix", remedy="put mixup and cutmix last")
        stream = 16 * position
        try:
            if name in MIX_AUGMENTS:
                mixes.append((stream, MIX_AUGMENTS[name](**options, stream=stream)))
            elif name in TENSOR_AUGMENTS:
                augments.append(TENSOR_AUGMENTS[name](**options, stream=stream))
            else:
                augments.append(transform(TORCHVISION_AUGMENTS[name], options))
        except (TypeError, ValueError) as error:
            known = f"those of torchvision.transforms.v2.{TORCHVISION_AUGMENTS.get(name)}"
            if function := TENSOR_AUGMENTS.get(name) or MIX_AUGMENTS.get(name):
                known = ", ".join(p for p in inspect.signature(function).parameters if p != "stream")
            raise ConfigError(
                f"data.augment: {name} with {options}: {error}", remedy=f"its options: {known}"
            ) from None
    return augments, mixes


@dataclass(frozen=True)
class Masking:
    """Masks tokens as a function of the view seed.

    Attributes:
        share: fraction of the tokens to predict.
        mask: id of the mask token, which replaces 80 % of these.
        ids: ids of random tokens, which replace 10 %; 10 % stay unchanged.

    Reference: Devlin et al., BERT (2019), section 3.1, task 1, with a share of 0.15.
    """

    share: float
    mask: int
    ids: Tensor

    def __call__(self, ids: Tensor, counted: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Masked token ids, and labels: the original ids at the chosen positions, else -100.

        Args:
            ids: ``[B, L]``.
            counted: ``[B, L]``, true for tokens of the text.
            seeds: ``[B]`` int64 view seeds.
        """
        where = torch.arange(ids.shape[1])
        places = torch.from_numpy(np.stack([view_seeds(int(seed), 0, where).numpy() for seed in seeds]))
        draw = [torch.from_numpy(uniform(places.flatten(), stream)).view_as(ids) for stream in (101, 102, 103)]
        chosen = (draw[0] < self.share) & counted
        # In a text without a chosen token, the one with the lowest draw is chosen.
        least = torch.where(counted, draw[0], torch.inf).argmin(1)
        none = ~chosen.any(1) & counted.any(1)
        chosen[none, least[none]] = True
        labels = ids.masked_fill(~chosen, IGNORE)
        other = self.ids[(draw[2] * len(self.ids)).long()]
        seen = torch.where(chosen & (draw[1] < 0.8), torch.full_like(ids, self.mask), ids)
        return torch.where(chosen & (draw[1] >= 0.9), other, seen), labels


def build_masking(tokenizer: Any, share: float) -> Masking:
    """The masking for a tokenizer of transformers; special tokens never replace a word.

    Raises:
        DataError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            f"the tokenizer, a {type(tokenizer).__name__}, has no mask token",
            remedy="masked language modelling needs an encoder: use another teacher, or another task",
        )
    special = set(tokenizer.all_special_ids)
    ids = torch.tensor([i for i in sorted(tokenizer.get_vocab().values()) if i not in special])
    return Masking(share, tokenizer.mask_token_id, ids)

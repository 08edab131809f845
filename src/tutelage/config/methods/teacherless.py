"""Options of methods without a teacher: mutual learning, self-distillation, and controls."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ValidatorFunctionWrapHandler, WrapValidator

from tutelage.config.base import BelowOne, Count, Fraction, NotNegative, Positive, Share
from tutelage.config.methods.base import MethodOptions, auto_or_list
from tutelage.config.models import ModelConfig
from tutelage.errors import shorten


def _peers(given: Any) -> Any:
    if isinstance(given, int) and not isinstance(given, bool):
        if given < 1:
            raise ValueError(f"{given} peers, and the student needs at least one to learn from; give 1 or more")
        return [None] * given
    if not isinstance(given, list) or not given:
        raise ValueError(
            f"{shorten(given)} is neither a number nor a list of models; for example 2, or [convnet, mlp]"
        )
    return [{"model": one} if isinstance(one, str) else one for one in given]


def _model_or_function(given: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    return given if callable(given) else handler(given)


Peer = Annotated[ModelConfig | None, WrapValidator(_model_or_function)]
"""A model, ``None`` for a copy of the student, or (in Python) a function that returns a module."""


class MutualOptions(MethodOptions):
    """Students that teach each other: of each, CE + weight * the mean over its peers of T^2 * KL(p_peer || p). Deep
    mutual learning; with `target: mean`, `refresh` and `burn_in` codistillation. The recipe's student is exported
    and compared with its baseline. Its peers are measured too, and saved in `models/`."""

    needs_teacher: ClassVar[bool] = False
    kind: Literal["mutual"] = "mutual"
    """The student learns from peers that train with it. A teacher is used for comparison only."""
    peers: Annotated[list[Peer], BeforeValidator(_peers)] = 1  # type: ignore[assignment]
    """The other students: a number of copies of the student's architecture, each with its own initialisation, or a
    list of models such as ``[{model: convnet, options: {widths: [8, 16]}}, mlp]``; ``null`` is a copy. Default: one
    copy."""
    temperature: Positive = 1.0
    """T of all students."""
    weight: NotNegative = 1.0
    """Weight of the loss to the peers."""
    target: Literal["each", "mean"] = "each"
    """``each``: the mean of the losses to each peer; ``mean``: the loss to the mean of their probabilities."""
    refresh: Count | None = None
    """The targets are copies of the peers, updated every this many steps. Default: the peers themselves."""
    burn_in: BelowOne = 0.0
    """Share of the steps that train with the labels only, before the loss to the peers starts."""


class ByotOptions(MethodOptions):
    """Be your own teacher: exits at the student's stages learn from the labels and from its own deepest classifier.
    Exits are trained and measured, but not exported."""

    needs_teacher: ClassVar[bool] = False
    kind: Literal["byot"] = "byot"
    """The network is its own teacher. A separate teacher is used for comparison only."""
    exits: Annotated[list[str] | None, auto_or_list("taps", "for example [stages.0, stages.1]")] = None
    """``auto``, the default: the last feature map of each resolution except the deepest. Or a list of taps, as
    ``tutelage taps RECIPE`` lists them."""
    alpha: Fraction = 0.3
    """Loss of an exit: (1 - alpha) * CE + alpha * KL to the deepest classifier, without T^2."""
    temperature: Positive = 3.0
    """T of that KL."""
    hint: NotNegative = 0.03
    """Weight of the squared distance of an exit's feature to the input of the student's head."""
    factor: Count = 4
    """Divisor of the width of that input, which gives the width of an exit's bottleneck."""


class SupervisedOptions(MethodOptions):
    """Labels only, with or without smoothing: a control. Uses labelled samples only."""

    needs_teacher: ClassVar[bool] = False
    kind: Literal["supervised"] = "supervised"
    """Cross-entropy. A teacher is used for comparison only."""
    label_smoothing: BelowOne = 0.0
    """Share of the target that is spread evenly over all classes; 0.1 is usual."""


class TeacherFreeOptions(MethodOptions):
    """Tf-KD: (1 - alpha) * CE + alpha * hand-made soft labels. Uses labelled images only."""

    needs_teacher: ClassVar[bool] = False
    kind: Literal["teacher-free"] = "teacher-free"
    """Hand-made soft labels, a control. A teacher is used for comparison only."""
    alpha: Fraction = 0.1
    """Weight of the hand-made soft labels."""
    temperature: Positive = 20.0
    """T that softens them; the paper uses 20 or more."""
    correct: Share = 0.99
    """Probability of the label before the softening; the other classes share the rest. It must be above 1 / number of
    classes."""
    variant: Literal["authors", "paper"] = "authors"
    """``authors``: KL(softmax(p / T) || student), the code behind the published numbers and alpha, close to label
    smoothing; ``paper``: T^2 * KL of both at T."""

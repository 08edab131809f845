"""Pure losses: ``loss(student, teacher, ..., *, mask=None, reduction="mean")``.

Each is a function of tensors for any training loop::

    loss = losses.kd(student_logits, teacher_logits, temperature=4.0)

For language models there are losses on hidden states, without the logits of all tokens at once::

    loss = losses.linear_divergence(hidden, head, (teacher_hidden, teacher_head), temperature=2.0)

All take ``mask``, booleans that are true where an example (a row of logits, a token, a text) counts, and
``reduction``: ``mean`` over the examples that count, ``sum``, or ``none`` for one value per example, 0 where masked.
``mask`` has the shape of the examples: ``[...]`` for logits ``[..., C]``, ``[B]`` for features ``[B, ...]``; losses
on features element by element also take more leading dimensions, such as ``[B, L]`` for tokens ``[B, L, D]``.

Relations (``dist``, ``mlkd``, ``similarity``, ``correlation``, ``pkt``, ``rkd_distance``,
``rkd_angle``, ``cosine_matrix``) compare the examples of a batch with each other: ``mask`` deletes rows, ``mean``
is the formula of the loss, ``sum`` is the mean times the number of rows, and ``none`` is an error.

All raise ``ValueError`` for shapes that do not fit, an unknown choice, and an option outside of its range.
"""

from tutelage.losses.attention import attention_kl, attention_mse, value_relation
from tutelage.losses.contrast import ContrastiveMemory, crd
from tutelage.losses.cross_vocabulary import coarse, uld
from tutelage.losses.divergences import js, reverse_kl, skew_kl, tvd
from tutelage.losses.features import factor_transfer, hint, overhaul, overhaul_margin, simkd, vid
from tutelage.losses.heads import LinearHead, LoRA
from tutelage.losses.logits import (
    binary_cross_entropy,
    binary_kd,
    bounded_regression,
    cross_entropy,
    distillation,
    kd,
    mse,
    soft_cross_entropy,
    teacher_free,
)
from tutelage.losses.maps import attention_transfer, nst, review
from tutelage.losses.relations import correlation, pkt, rkd_angle, rkd_distance, similarity
from tutelage.losses.sparse import sampled_kd, topk_kd
from tutelage.losses.structured import dist, dkd, mlkd
from tutelage.losses.terms import (
    CrossVocabularyTargets,
    HardTargets,
    SampledTargets,
    SoftTargets,
    TeacherDistribution,
    TopKTargets,
)
from tutelage.losses.tokens import linear_cross_entropy, linear_divergence, linear_sums
from tutelage.losses.vectors import cosine, cosine_matrix, margin_mse, patient

__all__ = [
    "ContrastiveMemory", "CrossVocabularyTargets", "HardTargets", "LinearHead", "LoRA", "SampledTargets",
    "SoftTargets", "TeacherDistribution", "TopKTargets", "attention_kl", "attention_mse", "attention_transfer",
    "binary_cross_entropy", "binary_kd", "bounded_regression", "coarse", "correlation", "cosine", "cosine_matrix",
    "crd", "cross_entropy", "dist", "distillation", "dkd", "factor_transfer", "hint", "js", "kd",
    "linear_cross_entropy", "linear_divergence", "linear_sums", "margin_mse", "mlkd", "mse", "nst", "overhaul",
    "overhaul_margin", "patient", "pkt", "reverse_kl", "review", "rkd_angle", "rkd_distance", "sampled_kd",
    "similarity", "simkd", "skew_kl", "soft_cross_entropy", "teacher_free", "topk_kd", "tvd", "uld", "value_relation",
    "vid",
]  # fmt: skip

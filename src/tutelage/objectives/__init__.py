"""Pure losses: ``objective(student, teacher, ..., *, mask=None, reduction="mean")``.

Each is a function of tensors that drops into any training loop::

    loss = objectives.kd(student_logits, teacher_logits, temperature=4.0)

For language models there is the same from hidden states, without the logits of a whole vocabulary::

    loss = objectives.linear_divergence(hidden, head, (teacher_hidden, teacher_head), temperature=2.0)

Most have a value per example, which ``mask`` can leave out and ``reduction="none"`` shows.
Relations (``dist``, ``mlkd``, ``similarity``, ``correlation``, ``pkt``, ``rkd_distance``,
``rkd_angle``, ``cosine_matrix``) compare the examples of a batch with each other: for them ``mask`` deletes rows,
and ``reduction="none"`` is an error.
"""

from tutelage.objectives.attention import attention_kl, attention_mse, value_relation
from tutelage.objectives.contrast import ContrastiveMemory, crd
from tutelage.objectives.crossed import coarse, uld
from tutelage.objectives.divergences import js, reverse_kl, skew_kl, tvd
from tutelage.objectives.features import factor_transfer, hint, overhaul, overhaul_margin, simkd, vid
from tutelage.objectives.heads import LinearHead, LoRA
from tutelage.objectives.logits import (
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
from tutelage.objectives.maps import attention_transfer, nst, review
from tutelage.objectives.relations import correlation, pkt, rkd_angle, rkd_distance, similarity
from tutelage.objectives.sparse import sampled_kd, topk_kd
from tutelage.objectives.structured import dist, dkd, mlkd
from tutelage.objectives.terms import Crossed, Hard, Sampled, Soft, Teaching, TopK, check_divergence
from tutelage.objectives.tokens import linear_cross_entropy, linear_divergence, linear_sums
from tutelage.objectives.vectors import cosine, cosine_matrix, margin_mse, patient

__all__ = [
    "ContrastiveMemory",
    "Crossed",
    "Hard",
    "LinearHead",
    "LoRA",
    "Sampled",
    "Soft",
    "Teaching",
    "TopK",
    "attention_kl",
    "attention_mse",
    "attention_transfer",
    "binary_cross_entropy",
    "binary_kd",
    "bounded_regression",
    "check_divergence",
    "coarse",
    "correlation",
    "cosine",
    "cosine_matrix",
    "crd",
    "cross_entropy",
    "dist",
    "distillation",
    "dkd",
    "factor_transfer",
    "hint",
    "js",
    "kd",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_sums",
    "margin_mse",
    "mlkd",
    "mse",
    "nst",
    "overhaul",
    "overhaul_margin",
    "patient",
    "pkt",
    "reverse_kl",
    "review",
    "rkd_angle",
    "rkd_distance",
    "sampled_kd",
    "similarity",
    "simkd",
    "skew_kl",
    "soft_cross_entropy",
    "teacher_free",
    "topk_kd",
    "tvd",
    "uld",
    "value_relation",
    "vid",
]

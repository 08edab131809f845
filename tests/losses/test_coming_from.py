"""The losses of other libraries equal ours, as docs/coming-from.md tells: nobody's loss changes its size unnoticed.

The expected values are the output of ``tests/support/peer_losses.py`` with the versions in ``PACKAGES``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from support import peer_losses as peers
from tutelage import losses
from tutelage.config.methods.language import OnPolicyOptions, TokenOptions
from tutelage.config.methods.logit import LogitOptions

ROOT = Path(__file__).parents[2]
PACKAGES = [
    "torchdistill==1.1.5", "nvidia-modelopt==0.47.0", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3",
    "pulp==3.3.0", "trl==1.16.0", "textbrewer==0.2.1.post1", "liger-kernel==0.8.5",
]  # fmt: skip
"""What ``pip install --no-deps --target`` adds to the development environment."""

T, C, V, L = peers.T, 5, 5, 3
S, TEACHER, Y = peers.STUDENT, peers.TEACHER, peers.LABELS
S_TOKENS, T_TOKENS, Y_TOKENS = peers.STUDENT_TOKENS, peers.TEACHER_TOKENS, peers.TOKEN_LABELS
MASK = Y_TOKENS != -100
S_FEATURES, T_FEATURES = peers.STUDENT_FEATURES, peers.TEACHER_FEATURES

EXPECTED = {
    "torchdistill: KDLoss": 2.689172,
    "torchdistill: KDLoss, alpha 0": 0.8189541,
    "torchdistill: KDLoss, tokens": 2.224051,
    "torchdistill: LogitStdKDLoss": 0.9287167,
    "torchdistill: DISTLoss": 5.40894,
    "torchdistill: ATLoss": 0.001808092,
    "torchdistill: PKTLoss": 0.1468176,
    "torchdistill: SPKDLoss": 0.1523864,
    "torchdistill: RKDLoss": 12.17097,
    "modelopt: LogitsDistillationLoss": 0.64906,
    "modelopt: LogitsDistillationLoss, batchmean": 9.735899,
    "modelopt: LogitsDistillationLoss, none": 19.4718,
    "trl: GKDTrainer, beta 0.5": 0.159823,
    "trl: GKDTrainer, beta 0": 0.784739,
    "trl: GKDTrainer, beta 1": 0.6721814,
    "trl: GKDTrainer, no labels": 0.471154,
    "trl: DistillationTrainer": 0.3380326,
    "liger: LigerFusedLinearJSDLoss": 1.707296,
    "liger: LigerFusedLinearJSDLoss, padded": 1.705163,
    "textbrewer: kd_ce_loss": 2.041611,
    "textbrewer: kd_mse_loss": 2.360659,
    "textbrewer: hid_mse_loss": 9.361193,
    "textbrewer: cos_loss": 1.021265,
}


def kd_tokens(temperature: float = T) -> Tensor:
    return losses.kd(S_TOKENS, T_TOKENS, temperature=temperature)


def js_tokens(beta: float) -> Tensor:
    return losses.js(S_TOKENS, T_TOKENS, beta=beta, temperature=T, mask=MASK)


def from_heads(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence over T^2 and the cross-entropy of the tokens with a label."""
    soft = losses.linear_divergence(
        peers.STUDENT_HIDDEN, peers.STUDENT_HEAD, peers.TEACHER_HIDDEN @ peers.TEACHER_HEAD.T, divergence="js",
        temperature=T, mask=labels != -100,
    )  # fmt: skip
    return soft / T**2, losses.linear_cross_entropy(peers.STUDENT_HIDDEN, peers.STUDENT_HEAD, labels)


def ours() -> dict[str, Tensor]:
    """The right column of the page, by the left one."""
    soft, hard = from_heads(Y_TOKENS.reshape(-1))
    wide = (C / (C - 1)) ** 0.5
    standard = losses.kd(S, TEACHER, temperature=T * wide, standardize=True) / wide**2
    return {
        "torchdistill: KDLoss": losses.distillation(S, TEACHER, Y, temperature=T, alpha=1 - 0.3),
        "torchdistill: KDLoss, alpha 0": losses.kd(S, TEACHER, temperature=T) / T**2,
        "torchdistill: KDLoss, tokens": losses.kd(S_TOKENS.mT, T_TOKENS.mT, temperature=T) * V / T**2,
        "torchdistill: LogitStdKDLoss": 0.3 * losses.cross_entropy(S, Y) + 0.7 * standard,
        "torchdistill: DISTLoss": losses.dist(S, TEACHER, temperature=T),
        "torchdistill: ATLoss": losses.attention_transfer(peers.STUDENT_MAPS, peers.TEACHER_MAPS, variant="authors"),
        "torchdistill: PKTLoss": losses.pkt(S_FEATURES, T_FEATURES, variant="authors"),
        "torchdistill: RKDLoss": 25 * losses.rkd_distance(S_FEATURES, T_FEATURES)
        + 50 * losses.rkd_angle(S_FEATURES, T_FEATURES),
        "modelopt: LogitsDistillationLoss": kd_tokens() / V,
        "modelopt: LogitsDistillationLoss, batchmean": kd_tokens() * L,
        "modelopt: LogitsDistillationLoss, none": losses.kd(S_TOKENS, T_TOKENS, temperature=T, reduction="sum"),
        "trl: GKDTrainer, beta 0.5": js_tokens(0.5) / T**2,
        "trl: GKDTrainer, beta 0": js_tokens(0.0) / T**2,
        "trl: GKDTrainer, beta 1": js_tokens(1.0) / T**2,
        "trl: GKDTrainer, no labels": losses.js(S_TOKENS, T_TOKENS, beta=0.5, temperature=T) * L / T**2,
        "trl: DistillationTrainer": soft,
        "liger: LigerFusedLinearJSDLoss": 0.25 * hard + 0.75 * soft,
        "textbrewer: kd_ce_loss": losses.soft_cross_entropy(S, TEACHER, temperature=T) / T**2,
        "textbrewer: kd_mse_loss": losses.mse(S, TEACHER) / (C * T**2),
        "textbrewer: hid_mse_loss": losses.hint(S_TOKENS, T_TOKENS, mask=MASK),
        "textbrewer: cos_loss": losses.cosine(S_TOKENS, T_TOKENS, mask=MASK),
    }


@pytest.mark.parametrize("row", ours())
def test_our_loss_is_the_value_that_the_other_library_gave(row: str) -> None:
    assert ours()[row].item() == pytest.approx(EXPECTED[row], rel=2e-5)


def test_similarity_divides_rows_by_the_norm_of_the_paper_and_torchdistill_by_the_sum() -> None:
    gram_s, gram_t = S_FEATURES @ S_FEATURES.T, T_FEATURES @ T_FEATURES.T

    def gap(p: float) -> float:
        return ((F.normalize(gram_s, p=p) - F.normalize(gram_t, p=p)).square().sum() / 4**2).item()

    assert pytest.approx(gap(1.0), rel=2e-5) == EXPECTED["torchdistill: SPKDLoss"]
    assert losses.similarity(S_FEATURES, T_FEATURES).item() == pytest.approx(gap(2.0), rel=2e-5)


def test_a_teacher_padded_by_two_rows_changes_ligers_loss_and_not_ours() -> None:
    teacher, labels = peers.TEACHER_HIDDEN @ peers.PADDED_HEAD.T, Y_TOKENS.reshape(-1)
    logits = peers.STUDENT_HIDDEN @ peers.STUDENT_HEAD.T
    zeros = torch.cat([logits, logits.new_zeros(6, 2)], -1)
    soft, hard = from_heads(labels)
    with_zeros = losses.js(zeros, teacher, temperature=T, mask=labels != -100) / T**2
    padded = EXPECTED["liger: LigerFusedLinearJSDLoss, padded"]
    assert (0.25 * hard + 0.75 * with_zeros).item() == pytest.approx(padded, rel=2e-5), "logits of zero"
    unpadded = losses.linear_divergence(
        peers.STUDENT_HIDDEN, peers.STUDENT_HEAD, teacher, divergence="js", temperature=T, mask=labels != -100,
        vocabulary=V,
    )  # fmt: skip
    assert (unpadded / T**2).item() == pytest.approx(soft.item(), rel=1e-6)
    assert padded != pytest.approx(EXPECTED["liger: LigerFusedLinearJSDLoss"], rel=1e-3)


# The page ------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", EXPECTED)
def test_the_page_names_every_loss_that_is_compared(row: str) -> None:
    assert row.partition(": ")[2].partition(",")[0] in PAGE


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("{kind: logit, temperature: 2, alpha: 0.7}", (0.7, 0.3)),
        ("{kind: logit, temperature: 2, alpha: 0.25, hard: 0}", (1 / T**2, 0.0)),
        ("{kind: logit, soft: dist, temperature: 2, alpha: 1}", (1.0, 0.0)),
        ("{kind: on-policy, divergence: js, beta: 0.5}", (1.0, 0.0)),
        ("{kind: token, divergence: js, temperature: 2, alpha: 0.1875, hard: 0.25}", (0.75 / T**2, 0.25)),
        ("{kind: logit, temperature: 2, alpha: 0.25}", (0.25, 0.75)),
    ],
)
def test_recipes_of_the_page_have_the_weights_that_it_gives(method: str, weights: tuple[float, float]) -> None:
    assert f"method: {method}" in PAGE
    kinds = {"logit": LogitOptions, "token": TokenOptions, "on-policy": OnPolicyOptions}
    raw = yaml.safe_load(method)
    options = kinds[raw["kind"]].model_validate(raw)
    hard = 1 - options.alpha if options.hard is None else options.hard
    assert (options.alpha, hard) == pytest.approx(weights)


# Loops that people copy from the web, as they are written --------------------------------------------


def tutorial() -> Tensor:
    """The tutorial of PyTorch, weights 0.25 and 0.75."""
    targets, log_q = F.softmax(TEACHER / T, dim=-1), F.log_softmax(S / T, dim=-1)
    soft = torch.sum(targets * (targets.log() - log_q)) / log_q.size()[0] * (T**2)
    return 0.25 * soft + 0.75 * F.cross_entropy(S, Y)


def default_reduction() -> Tensor:
    """``KLDivLoss()`` with its default reduction, which divides by the classes too."""
    with pytest.warns(UserWarning, match="batchmean"):
        soft = F.kl_div(F.log_softmax(S / T, dim=1), F.softmax(TEACHER / T, dim=1))
    return soft * (0.9 * T * T) + F.cross_entropy(S, Y) * (1.0 - 0.9)


def deit() -> Tensor:
    """DeiT's soft distillation: divided by all elements."""
    log_q, log_p = F.log_softmax(S / T, dim=1), F.log_softmax(TEACHER / T, dim=1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * (T * T) / S.numel()


def distilbert() -> Tensor:
    """DistilBERT's ``loss_ce``: over the tokens of the mask."""
    log_q, p = F.log_softmax(S_TOKENS[MASK] / T, dim=-1), F.softmax(T_TOKENS[MASK] / T, dim=-1)
    return F.kl_div(log_q, p, reduction="batchmean") * T**2


def tokens_by_batch() -> Tensor:
    """``batchmean`` on ``[B, L, V]``, which divides by B and not by the tokens."""
    log_q, p = F.log_softmax(S_TOKENS / T, dim=-1), F.softmax(T_TOKENS / T, dim=-1)
    return F.kl_div(log_q, p, reduction="batchmean") * T**2


LOOPS = {
    "tutorial": (tutorial, lambda: losses.distillation(S, TEACHER, Y, temperature=T, alpha=0.25)),
    "default reduction": (
        default_reduction,
        lambda: 0.9 / C * losses.kd(S, TEACHER, temperature=T) + (1 - 0.9) * losses.cross_entropy(S, Y),
    ),
    "DeiT": (deit, lambda: losses.kd(S, TEACHER, temperature=T) / C),
    "DistilBERT": (distilbert, lambda: losses.kd(S_TOKENS, T_TOKENS, temperature=T, mask=MASK)),
    "batchmean on tokens": (tokens_by_batch, lambda: kd_tokens() * L),
}


@pytest.mark.parametrize("name", LOOPS)
def test_our_loss_is_that_of_the_loop(name: str) -> None:
    loop, mine = LOOPS[name]
    assert mine().item() == pytest.approx(loop().item(), rel=2e-6)


@pytest.mark.slow
def test_the_expected_values_are_what_the_libraries_give(tmp_path: Path) -> None:
    folder = os.environ.get("TUTELAGE_PEERS")
    if folder is None:
        folder = str(tmp_path / "peers")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, *PACKAGES], check=True)
    environment = {**os.environ, "PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, str(ROOT / "tests/support/peer_losses.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values == pytest.approx(EXPECTED, rel=2e-5)

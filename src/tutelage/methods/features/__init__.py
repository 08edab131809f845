"""Losses on features of student and teacher, with the modules that they learn, such as projectors.

``tutelage.config.FEATURE_LOSSES`` names the class of each.
"""

from tutelage.methods.features.base import FeatureContext, FeatureLoss, FeaturePair, token_positions
from tutelage.methods.features.contrastive import ContrastiveLoss
from tutelage.methods.features.learned import FactorTransferLoss, OverhaulLoss, ReviewLoss, VidLoss
from tutelage.methods.features.pairwise import PairwiseLoss, TokenPairwiseLoss

__all__ = [
    "ContrastiveLoss", "FactorTransferLoss", "FeatureContext", "FeatureLoss", "FeaturePair", "OverhaulLoss",
    "PairwiseLoss", "ReviewLoss", "TokenPairwiseLoss", "VidLoss", "token_positions",
]  # fmt: skip

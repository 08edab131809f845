"""From a student's features to its teacher's: what is learned for that, and what compares them."""

from tutelage.methods.features.base import FeatureContext, FeatureLoss, FeaturePair, Where, token_positions
from tutelage.methods.features.compared import PairwiseLoss
from tutelage.methods.features.registry import FEATURE_LOSSES, FeatureLossName

__all__ = [
    "FEATURE_LOSSES",
    "FeatureContext",
    "FeatureLoss",
    "FeatureLossName",
    "FeaturePair",
    "PairwiseLoss",
    "Where",
    "token_positions",
]

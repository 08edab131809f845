"""From a student's features to its teacher's: what is learned for that, and what compares them."""

from tutelage.methods.features.base import Link, Setting, Site, Where, token_positions
from tutelage.methods.features.compared import Compared
from tutelage.methods.features.registry import FEATURE_LOSSES, FeatureLossName

__all__ = [
    "FEATURE_LOSSES",
    "Compared",
    "FeatureLossName",
    "Link",
    "Setting",
    "Site",
    "Where",
    "token_positions",
]

"""Data: batches with stable sample ids, and views that can be drawn again."""

from tutelage.data.batch import IGNORE, Batch, WithIds, as_batch, causal_batch
from tutelage.data.images import ImageData, ImageSet, load_images
from tutelage.data.loader import Batches, InOrder, LoaderBatches, PlannedBatches, Rows, Share
from tutelage.data.views import view_seeds

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "ImageData",
    "ImageSet",
    "InOrder",
    "LoaderBatches",
    "PlannedBatches",
    "Rows",
    "Share",
    "WithIds",
    "as_batch",
    "causal_batch",
    "load_images",
    "view_seeds",
]

"""Data: batches with stable sample ids, and views that can be drawn again."""

from tutelage.data.batch import IGNORE, Batch, WithIds, as_batch, causal_batch
from tutelage.data.images import ImageData, ImageSet, load_images
from tutelage.data.loader import Batches, InOrder, LoaderBatches, PlannedBatches, RankSlice, Rows
from tutelage.data.texts import TextData, TextSet, load_texts, read_texts
from tutelage.data.views import view_seeds

Data = ImageData | TextData
"""What a recipe trains on."""

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "Data",
    "ImageData",
    "ImageSet",
    "InOrder",
    "LoaderBatches",
    "PlannedBatches",
    "RankSlice",
    "Rows",
    "TextData",
    "TextSet",
    "WithIds",
    "as_batch",
    "causal_batch",
    "load_images",
    "load_texts",
    "read_texts",
    "view_seeds",
]

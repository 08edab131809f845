"""Data sets, batches with stable sample ids, and reproducible augmentations."""

from tutelage.data.batch import IGNORE, Arguments, Batch, IndexedDataset, as_batch, causal_batch
from tutelage.data.image_set import ImageData, ImageSet
from tutelage.data.images import load_images
from tutelage.data.loader import Batches, LoaderBatches, PlannedBatches, RankSlice, Rows, SequentialBatches
from tutelage.data.positions import name_positions
from tutelage.data.text_sources import read_texts
from tutelage.data.texts import TextData, TextSet, load_texts
from tutelage.data.views import view_seeds

Data = ImageData | TextData
"""The data of a recipe."""

__all__ = [
    "IGNORE", "Arguments", "Batch", "Batches", "Data", "ImageData", "ImageSet", "IndexedDataset", "LoaderBatches",
    "PlannedBatches", "RankSlice", "Rows", "SequentialBatches", "TextData", "TextSet", "as_batch", "causal_batch",
    "load_images", "load_texts", "name_positions", "read_texts", "view_seeds",
]  # fmt: skip

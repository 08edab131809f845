"""Methods and teachers in other loops than our engine: your own, Hugging Face's Trainer, Lightning.

:class:`Distiller` is what all three share. ``tutelage.integrations.hf`` has a ``Trainer``, and
``tutelage.integrations.lightning`` a ``LightningModule``; each needs its library, which is imported there alone.
"""

from tutelage.integrations.distiller import Distiller

__all__ = ["Distiller"]

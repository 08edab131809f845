"""The lecture's claims, each an experiment with a verdict. Runs workflows and writes reports; nothing imports it."""

from tutelage.lab.bench import run_lab
from tutelage.lab.claims import CLAIMS
from tutelage.lab.page import measured

__all__ = ["CLAIMS", "measured", "run_lab"]

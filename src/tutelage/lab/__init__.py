"""Claims from the literature, each an experiment with a verdict. No other room imports this one."""

from tutelage.lab.claims import CLAIMS
from tutelage.lab.page import measurement
from tutelage.lab.runner import run_lab

__all__ = ["CLAIMS", "measurement", "run_lab"]

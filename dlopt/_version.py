"""The version of dlopt, and the folder of the package. Imports nothing of dlopt, so that every module may import it."""

from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).parent
"""The installed package; in a checkout, next to `conf/`."""

"""The comparisons that dlopt ships."""

from pathlib import Path

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"
SHIPPED = sorted(path.stem for path in GALLERY.glob("*.json"))

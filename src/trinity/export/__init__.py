"""Public `afmoe` model directories: written, proven equal and read."""

from trinity.export.afmoe import export_afmoe
from trinity.export.convert import convert_afmoe
from trinity.export.reading import import_afmoe

__all__ = ["convert_afmoe", "export_afmoe", "import_afmoe"]

"""Where examples come from: files of any format, folders, and datasets of the hub."""

from .places import Files, Split, files_of, fingerprint, size_of
from .reading import Item, Piece, items_of, read_items, read_pieces

__all__ = [
    "Files",
    "Item",
    "Piece",
    "Split",
    "files_of",
    "fingerprint",
    "items_of",
    "read_items",
    "read_pieces",
    "size_of",
]

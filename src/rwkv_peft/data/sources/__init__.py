"""Where examples come from: files of any format, folders, and datasets of the hub."""

from .reading import Files, Item, Split, files_of, fingerprint, read_file, read_items

__all__ = ["Files", "Item", "Split", "files_of", "fingerprint", "read_file", "read_items"]

"""Text to tokens once and for all, and back."""

from .run import prepare

__all__ = ["prepare"]

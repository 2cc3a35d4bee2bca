"""How conversations become text: templates by name, and Jinja files."""

from .base import Message, Segment, Template, find_template, template_of

__all__ = ["Message", "Segment", "Template", "find_template", "template_of"]

"""Transformers as researchers write them, with variations on how people hold and call their blocks."""

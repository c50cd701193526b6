"""Transformers in the style of research code, which hold and call their blocks in many different ways."""

"""An extension of griffe: a field that is declared with `option(default, doc=...)` has this default and this text.

Without it, the signature of `CacheConfig` in the API reference would show the declarations.
"""

from __future__ import annotations

import ast
import textwrap
from typing import Any

import griffe

WIDTH = 110


class Options(griffe.Extension):
    """Replaces the declarations by the defaults, and adds the texts to the docstring of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, dict[str, str]] = {}
        self.flat: list[tuple[griffe.Attribute, str, str]] = []  # Fields that spell the field of a rule.

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Replaces the declaration of a field."""
        declared = attr.value
        if not isinstance(declared, griffe.ExprCall) or attr.parent is None:
            return
        call = ast.parse(str(declared), mode="eval").body
        assert isinstance(call, ast.Call)
        if str(declared.function) == "flat_spelling":
            rule, field = call.args
            self.flat.append((attr, f"cachedit_fx.config.rules.{ast.unparse(rule)}", ast.literal_eval(field)))
        if str(declared.function) != "option":
            return
        given = {argument.arg: argument.value for argument in call.keywords}
        text = ast.literal_eval(given["doc"])
        if "structural" in given and ast.literal_eval(given["structural"]):
            text += " Another value recompiles."
        attr.value = declared.arguments[0]
        self.texts.setdefault(attr.parent.path, {})[attr.name] = text

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Adds the fields to the docstrings of the classes that declare or inherit them."""
        for attr, rule, field in self.flat:
            attr.value = pkg[rule.removeprefix("cachedit_fx.")][field].value
            self.texts["cachedit_fx.config.fields.Fields"][attr.name] = self.texts[rule][field]
        fields = self.texts.pop("cachedit_fx.config.fields.Fields", None)
        if fields is not None:
            self.texts["cachedit_fx.config.cache_config.CacheConfig"] = fields
        for path, texts in self.texts.items():
            described = pkg[path.removeprefix("cachedit_fx.")]
            if described.docstring is not None:
                described.docstring.value = with_fields(described.docstring.value, texts)


def with_fields(doc: str, texts: dict[str, str]) -> str:
    """A docstring with a section about the fields, in front of the section about errors."""
    entries = (textwrap.wrap(f"{name}: {text}", WIDTH, subsequent_indent="    ") for name, text in texts.items())
    listed = textwrap.indent("\n".join("\n".join(lines) for lines in entries), "    ")
    before, raises, after = doc.partition("Raises:\n")
    return f"{before.rstrip()}\n\nAttributes:\n{listed}\n\n{raises}{after}"

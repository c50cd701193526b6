"""While a model is compiled, a terminal shows how many of its pieces are finished."""

from __future__ import annotations

import io

import pytest
import torch

import cachedit_fx
from cachedit_fx.frontend.compile_progress import compile_progress
from tests import tiny


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _compile() -> None:
    model = tiny.build()
    cachedit_fx.enable_cache(model, tiny.config())
    with torch.no_grad():
        tiny.step(model, tiny.prompt(), 900.0, tiny.latents())


def test_a_terminal_shows_the_number_of_compiled_pieces(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    _compile()
    lines = [line.removeprefix("\x1b[K") for line in terminal.getvalue().split("\r")[1:]]
    count = len(lines) - 1
    assert count > 1 and lines == [*(f"compiling Transformer: {i} of {count} pieces" for i in range(count)), ""]


def test_nothing_is_written_elsewhere(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    monkeypatch.setattr("sys.stderr", file)
    _compile()
    assert file.getvalue() == ""


def test_the_line_is_erased_after_a_failure(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.raises(RuntimeError, match="no compiler"), compile_progress("Model", 2) as show:
        show(0)
        raise RuntimeError("no compiler")
    assert terminal.getvalue() == "\r\x1b[Kcompiling Model: 0 of 2 pieces\r\x1b[K"

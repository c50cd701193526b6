"""docs/models.md has a row for every transformer of the zoo.

`tests/test_zoo.py` runs the models and tests the content of each row.
"""

from __future__ import annotations

from tests.zoo import VARIANTS
from tests.zoo.table import PAGE, page


def test_the_page_has_exactly_one_row_for_every_variant():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.removeprefix("| ").split(" (")[0] for line in rows] == list(VARIANTS)
    assert text == page(rows)

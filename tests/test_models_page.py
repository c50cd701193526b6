"""docs/models.md has a row for every transformer of the zoo.

That each row is as it is found is tested where the models run: `tests/test_zoo_enable_cache.py`.
"""

from __future__ import annotations

from tests.zoo import VARIANTS
from tests.zoo.table import PAGE, page


def test_the_page_has_a_row_for_every_variant_and_says_nothing_else():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.removeprefix("| ").split(" (")[0] for line in rows] == list(VARIANTS)
    assert text == page(rows)

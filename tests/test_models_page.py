"""docs/models.md says what becomes of every transformer of the zoo."""

from __future__ import annotations

from tests.zoo import VARIANTS
from tests.zoo.runs import every_variant
from tests.zoo.table import PAGE, page, row
from tests.zoo.variant import Variant


@every_variant
def test_the_row_of_a_variant_is_as_it_is_found(variant: Variant):
    assert row(variant.name) in PAGE.read_text(encoding="utf-8").splitlines(), "stale: run `make models`"


def test_the_page_has_a_row_for_every_variant_and_says_nothing_else():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.removeprefix("| ").split(" (")[0] for line in rows] == list(VARIANTS)
    assert text == page(rows)

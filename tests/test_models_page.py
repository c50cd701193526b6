"""docs/models.md has a row for every transformer of the zoo.

`tests/test_zoo.py` runs the models and tests the content of each row.
"""

from __future__ import annotations

import json

from cachedit_fx.shell.installed_models import TABLE
from tests.zoo import VARIANTS
from tests.zoo.table import PAGE, UNCACHED, classes_and_needs, page


def test_the_page_has_exactly_one_row_for_every_variant():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line.removeprefix("| ").split(" (")[0] for line in rows] == list(VARIANTS)
    assert text == page(rows)


def test_the_table_of_the_package_has_the_classes_of_the_page():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found = table["models"]
    assert found == classes_and_needs(rows) and table["uncached"] == UNCACHED
    assert found.keys() == {variant.kind.__name__ for variant in VARIANTS.values()}

"""Every error and warning says on one screen what happened, what was expected, and what to do."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable

import accelerate
import pytest
import torch
from torch import nn

from cachedit_fx.frontend.uncached import (
    UncachedGraph,
    WhyUncached,
    why_another_cache,
    why_call_uncached,
    why_not_counted,
    why_not_without_hooks,
    why_of,
    why_sharded,
)
from cachedit_fx.patterns import BUILT_IN
from cachedit_fx.patterns.cause import Cause
from cachedit_fx.patterns.mismatch import Mismatch
from cachedit_fx.patterns.nodes import SourceLine
from tests import hybrid
from tests.messages import Told, sites, told_by
from tests.messages_of_runs import ROWS
from tests.messages_table import Row
from tests.troubleshooting import entries_for

MOST_LINES, LONGEST_LINE = 15, 200

# Their texts are parts of other texts: a mismatch, `reproduce.txt`, the error for a file that is not YAML.
PARTS = {
    ("cachedit_fx/inspect/graph_json.py", "_encode", "TypeError"),
    ("cachedit_fx/inspect/graph_json.py", "_node_to_json", "TypeError"),
    ("cachedit_fx/integrations/config_files.py", "_yaml", "ValueError"),
    ("passes/analysis/size_rule.py", "SizeRule.__init__", "UnknownSizeError"),
    ("passes/manager.py", "run_passes", "PassError"),
    # Attribute errors of the package itself have Python's text: see tests/test_public_names.py.
    ("cachedit_fx/__init__.py", "__getattr__", "warning"),
    ("cachedit_fx/__init__.py", "__getattr__", "AttributeError"),
    # The reason why every call of a module goes through Dynamo, which is logged as information and part of a warning.
    ("cachedit_fx/frontend/input_fetcher.py", "path_of", "ValueError"),
    ("cachedit_fx/frontend/input_fetcher.py", "Binder.__init__", "ValueError"),
    # Why a model runs with the hooks that move its weights: see `test_the_reason_for_an_uncached_call_...`.
    ("cachedit_fx/frontend/backend.py", "Backend._uncached", "RefusedError"),
    ("cachedit_fx/frontend/backend.py", "_check_offloaded", "RefusedError"),
    ("cachedit_fx/frontend/offloading.py", "HookFreeForwards.without_hooks", "RefusedError"),
    ("cachedit_fx/frontend/capture_strategies.py", "CaptureStrategies._run_within", "FailOnRecompileLimitHit"),
    ("cachedit_fx/frontend/fast_dispatch.py", "FastDispatcher.learn", "NotServed"),
    ("cachedit_fx/frontend/fast_dispatch.py", "fast_call_for", "NotServed"),
    ("cachedit_fx/frontend/fast_dispatch.py", "fast_call_for", "RuntimeError"),
    ("cachedit_fx/frontend/fast_dispatch.py", "OutputMap.of", "NotServed"),
    # Parts of the warnings of `save_compiled` and `load_compiled`: see tests/test_saved_graphs.py.
    ("cachedit_fx/frontend/call_records.py", "_record_call", "NotSavedError"),
    ("cachedit_fx/frontend/call_records.py", "_record_call.compile_graph", "NotSavedError"),
    ("cachedit_fx/frontend/call_records.py", "_restore", "NotSavedError"),
    ("cachedit_fx/frontend/call_records.py", "record_calls", "NotSavedError"),
    ("cachedit_fx/frontend/graph_records.py", "TensorRecord.of", "NotSavedError"),
    ("cachedit_fx/frontend/graph_records.py", "_example", "NotSavedError"),
    ("cachedit_fx/frontend/graph_records.py", "_record", "NotSavedError"),
    ("cachedit_fx/frontend/graph_records.py", "_recorded", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "Tracer._record", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "_Describer._eval", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "_Describer._text", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "_describe_code", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "_description", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "_make_guards", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "_name_of", "NotSavedError"),
    ("cachedit_fx/frontend/guard_records.py", "restore_guards", "NotSavedError"),
    ("cachedit_fx/saving/artifact_file.py", "ArtifactFile.read", "UnusableFileError"),
    ("cachedit_fx/saving/artifact_file.py", "_check_header", "UnusableFileError"),
    ("cachedit_fx/saving/compiled.py", "_enabled", "NotSavedError"),
    ("cachedit_fx/saving/compiled.py", "_recorded", "NotSavedError"),
    ("cachedit_fx/saving/compiled.py", "_use", "NotSavedError"),
    # It needs two processes: see tests/test_ranks.py.
    ("cachedit_fx/runtime/ranks.py", "vote", "RuntimeError"),
}
BANNED = re.compile(
    r"\b(invalid|unexpected|illegal|failed to|something went wrong)\b|Traceback \(|\bFile \"|\bself\.|\bfx\.|"
    r"\b(GraphModule|Declaration|Mismatch|CachedGraph|RegionPlan|SizeRule|Rewritten|BackendCompilerFailed)\b|"
    r"object at 0x| \.(?![\w.])",
    re.IGNORECASE,
)
HELPS = re.compile(
    r"\b(must|expected|allowed|takes|needs|what to do|installed|did you mean|give|pass|call|take out)\b", re.IGNORECASE
)

message_for = functools.cache(lambda row: told_by(row.provoke))


def is_readable(text: str) -> None:
    """Asserts the properties that every text has."""
    assert text.startswith("cachedit_fx: ") and text == text.strip()
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES and all(lines), text
    told = re.sub(r"^  line: .*", "", text, flags=re.MULTILINE)  # Without the line of the user's code.
    assert not BANNED.search(told), (BANNED.search(told), text)
    assert HELPS.search(text) and max(map(len, lines)) <= LONGEST_LINE, text
    assert entries_for(text), f"docs/troubleshooting.md has no entry for: {text}"


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_message_says_what_happened_and_what_to_do(row: Row):
    found: Told = message_for(row)
    is_readable(found.text)
    assert row.value in found.text, found.text
    assert row.says in found.text, found.text
    assert found.text in found.shown  # torch.compile writes text around it, but does not change it.


def test_every_error_and_warning_has_a_row():
    covered = {message_for(row).site for row in ROWS}
    assert None not in covered
    uncovered = [str(site) for site in sites() if site not in covered and site.key not in PARTS]
    assert not uncovered, "no row in tests/messages_table.py provokes:\n" + "\n".join(uncovered)
    assert {site.key for site in sites()} >= PARTS


def test_every_row_has_a_unique_name():
    assert max(Counter(row.name for row in ROWS).values()) == 1


@pytest.mark.parametrize("cause", Cause, ids=lambda cause: cause.value)
def test_every_cause_of_a_fallback_is_reported_with_its_cure(cause: Cause):
    without = (Cause.TRAINING, Cause.GRADIENTS, Cause.EMPTY, Cause.NO_CHAIN, Cause.NO_TRANSFORMER)
    template = None if cause in without else BUILT_IN[0]
    where = SourceLine("transformer.py", 214)
    mismatch = Mismatch(template, cause, "two streams", "one", "single_blocks_0", where, progress=19, total=57)
    text = why_of((mismatch,), None).text
    is_readable(text)
    for part in (
        "this graph runs without caching.",
        f"{cause.value}:\n  expected: two streams\n  found:    one\n",
        "  at:       `single_blocks_0` in transformer.py:214\n",
        f"What to do: {mismatch.cure}.",
        "See every verdict: cachedit_fx.explain(model, *inputs)",
    ):
        assert part in text


def test_the_message_for_a_model_with_graph_breaks_says_where_they_are():
    why = WhyUncached("no-chain", "no chain", "no chain")
    misses = [UncachedGraph(lambda: None, 3, why), UncachedGraph(lambda: None, 4, why)] * 2
    found = 'model.py:12, "Data-dependent branching"'
    text = why_call_uncached(hybrid.build(), misses, found, line="if mask.any():").text
    is_readable(text)
    for part in (
        "cachedit_fx: Hybrid runs without caching.\n",
        "  expected: one graph that contains the whole loop over the blocks\n",
        '  found:    Dynamo captured 2 graphs instead of one (the first graph ends at model.py:12, "Data-dependent '
        'branching")\n  line:     if mask.any():\n',
        "What to do: change the code at this place so that Dynamo can capture it, or write a patch functor",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            lambda model: why_call_uncached(model, [], ""),
            "found:    Dynamo ran no graph of it\nWhat to do: make sure",
        ),
        (lambda model: why_call_uncached(hooked(model), [], ""), "hooks:    AlignDevicesHook on its layers\n"),
        (lambda model: why_not_without_hooks(hooked(model), "x"), "found:    x\n  hooks:    AlignDevicesHook on its"),
        (why_sharded, "found:    fully_shard was applied to its layers"),
        (why_another_cache, "found:    a cache of diffusers is also enabled for it\n"),
        (lambda model: why_call_uncached(model, [], "", 10), "expected: at most 10 graphs for one function"),
        (lambda model: why_not_counted(model, "decode"), 'enable_cache(model, method="decode") to cache this method'),
    ],
    ids=["no-graph", "hooks", "hooks-of-weights", "sharded", "another-cache", "limit", "method"],
)
def test_the_reason_for_an_uncached_call_is_reported_with_its_cure(text: Callable[[nn.Module], WhyUncached], says: str):
    why = text(hybrid.build())
    is_readable(why.text)
    assert says in why.text and "Hybrid" in why.text
    assert why.reason and "\n" not in why.reason


def hooked(model: nn.Module) -> nn.Module:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model

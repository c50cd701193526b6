"""Fields for masks, refreshing, guidance and pruning; partial configurations; configurations as values."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import string
from collections.abc import Sequence

import pytest
import torch

import cachedit_fx
from cachedit_fx import Backend, CacheConfig, DBCacheConfig, DBPruneConfig, ParamsModifier
from cachedit_fx.config import BasicCacheConfig, CacheType
from cachedit_fx.config.cache_config import FIELD_NAMES, check_together
from cachedit_fx.config.fields import OPTIONS
from cachedit_fx.config.options import option, options_of, settle
from cachedit_fx.errors import ConfigError
from tests import hybrid
from tests.hybrid import generate
from tests.sessions import every_session


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(
            (name, value, "an int >= 1")
            for name in ("num_inference_steps", "force_refresh_step_hint")
            for value in (0, -1)
        ),
        ("num_inference_steps", 28.0, "an int >= 1"),
        ("num_inference_steps", "28", "an int >= 1"),
        ("num_inference_steps", True, "an int >= 1"),
        ("force_refresh_step_hint", 2.5, "an int >= 1"),
        ("steps_computation_mask", (), "a list of 0 and 1"),
        ("steps_computation_mask", (1, 2), "a list of 0 and 1"),
        ("steps_computation_mask", (1, None), "a list of 0 and 1"),
        ("steps_computation_mask", 1, "a list of 0 and 1"),
        ("steps_computation_mask", {1: 0}, "a list of 0 and 1"),
        ("steps_computation_policy", "fixed", "'dynamic', 'static'"),
        ("steps_computation_policy", None, "'dynamic', 'static'"),
        ("force_refresh_step_policy", "always", "'once', 'repeat'"),
        ("enable_separate_cfg", 1, "True or False"),
        ("enable_separate_cfg", "yes", "True or False"),
        ("cfg_compute_first", None, "True or False"),
        ("cfg_compute_first", 0, "True or False"),
        ("cfg_diff_compute_separate", "False", "True or False"),
        ("guidance_reuse", "diff", "'off', 'difference'"),
        ("guidance_reuse", True, "'off', 'difference'"),
        ("max_continuous_guidance_steps", -2, "an int >= -1"),
        ("guidance_computation_mask", (), "a list of 0 and 1"),
        ("guidance_reuse_threshold", 0, "a number > 0"),
        ("cache_type", "prune", "'DBCache', 'DBPrune'"),
        ("cache_type", None, "'DBCache', 'DBPrune'"),
        ("enable_dynamic_prune_threshold", 1, "True or False"),
        ("fast_dispatch", "yes", "True or False"),
        ("fast_dispatch", 1, "True or False"),
        *(("max_state_bytes", value, "an int >= 0") for value in (-1, 1e9, True, "4GB")),
        ("max_dynamic_prune_threshold", math.nan, "a finite number"),
        ("max_dynamic_prune_threshold", "0.2", "a finite number"),
        ("dynamic_prune_threshold_relax_ratio", None, "a finite number"),
        ("dynamic_prune_threshold_relax_ratio", math.inf, "a finite number"),
        ("non_prune_block_ids", (-1,), "a list of ints >= 0"),
        ("non_prune_block_ids", (1.0,), "a list of ints >= 0"),
        ("non_prune_block_ids", 3, "a list of ints >= 0"),
        ("non_prune_block_ids", None, "a list of ints >= 0"),
    ],
)
def test_an_invalid_value_raises_an_error_with_the_field_and_the_allowed_values(field, value, allowed):
    for make in (CacheConfig, DBPruneConfig, CacheConfig().override, CacheConfig().reset):
        with pytest.raises(ConfigError) as caught:
            make(**{field: value})
        message = str(caught.value)
        assert message.startswith(f"cachedit_fx: {field} must be ")
        assert allowed in message
        assert f"got {value!r}" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", None),
        ("num_inference_steps", 1),
        ("force_refresh_step_hint", 1),
        ("steps_computation_mask", (0,)),
        ("steps_computation_policy", "static"),
        ("force_refresh_step_policy", "repeat"),
        ("enable_separate_cfg", None),
        ("enable_separate_cfg", False),
        ("cfg_compute_first", True),
        ("cfg_diff_compute_separate", False),
        ("cache_type", "DBPrune"),
        ("cache_type", CacheType.DBPrune),
        ("max_dynamic_prune_threshold", 0),
        ("max_dynamic_prune_threshold", None),
        ("dynamic_prune_threshold_relax_ratio", 1),
        ("non_prune_block_ids", ()),
        ("non_prune_block_ids", (0, 7)),
        ("max_accumulated_residual_diff_threshold", 0),
        ("fast_dispatch", False),
        ("max_state_bytes", 0),
        ("max_state_bytes", None),
    ],
)
def test_values_at_the_edge_are_allowed(field, value):
    config = CacheConfig(**{field: value})
    assert getattr(config, field) == value
    assert config.given == {field}


@pytest.mark.parametrize("field", ["steps_computation_mask", "non_prune_block_ids"])
def test_changing_a_given_list_later_does_not_change_the_configuration(field):
    given = [1, 0]
    config = CacheConfig(**{field: given})
    given.append(1)
    assert getattr(config, field) == (1, 0)
    assert config == CacheConfig(**{field: (1, 0)})


def test_the_class_names_of_cache_dit_are_related_as_there():
    assert DBCacheConfig is BasicCacheConfig
    assert issubclass(DBCacheConfig, CacheConfig) and issubclass(DBPruneConfig, BasicCacheConfig)


def test_a_pruning_configuration_sets_the_cache_type():
    config = DBPruneConfig(Fn_compute_blocks=2)
    assert isinstance(config, CacheConfig)
    assert config.cache_type == CacheType.DBPrune == "DBPrune"
    assert config.given == {"Fn_compute_blocks", "cache_type"}
    assert dataclasses.asdict(config) == dataclasses.asdict(DBCacheConfig(2, cache_type="DBPrune"))


# Given fields.


def test_fields_given_by_position_and_by_name_are_recorded_as_given():
    assert CacheConfig().given == frozenset()
    assert CacheConfig(4, 2, max_warmup_steps=8).given == {"Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps"}


def test_override_sets_only_the_given_fields_of_the_other():
    base = CacheConfig(Fn_compute_blocks=3, max_warmup_steps=2)
    found = base.override(CacheConfig(max_warmup_steps=8, max_cached_steps=1))
    assert found == CacheConfig(Fn_compute_blocks=3, max_warmup_steps=8, max_cached_steps=1)
    assert found.given == {"Fn_compute_blocks", "max_warmup_steps", "max_cached_steps"}
    assert base == CacheConfig(Fn_compute_blocks=3, max_warmup_steps=2)


def test_keyword_arguments_of_override_take_precedence_over_the_other():
    found = CacheConfig(1).override(CacheConfig(2, max_cached_steps=5), Fn_compute_blocks=3)
    assert (found.Fn_compute_blocks, found.max_cached_steps) == (3, 5)


def test_override_without_fields_changes_nothing():
    base = DBPruneConfig(3)
    for found in (base.override(), base.override(None), base.override(CacheConfig())):
        assert (found, found.given, type(found)) == (base, base.given, DBPruneConfig)


def test_a_pruning_configuration_overrides_the_cache_type():
    assert CacheConfig(3).override(DBPruneConfig(max_cached_steps=2)) == CacheConfig(
        3, max_cached_steps=2, cache_type="DBPrune"
    )


def test_override_raises_an_error_for_an_unknown_field():
    with pytest.raises(ConfigError, match=r"option 'num_steps' \(given 28\) is unknown"):
        CacheConfig().override(num_steps=28)


def test_reset_discards_the_fields_of_the_original():
    partial = CacheConfig(Fn_compute_blocks=1, max_warmup_steps=3).reset(max_cached_steps=2)
    assert partial == CacheConfig(max_cached_steps=2)
    assert partial.given == {"max_cached_steps"}
    assert DBPruneConfig(3).reset(max_cached_steps=2).given == {"max_cached_steps", "cache_type"}


# Configurations as values.


@pytest.fixture(params=[CacheConfig, DBCacheConfig, DBPruneConfig])
def config(request):
    return request.param(2, max_warmup_steps=8, steps_computation_mask=[1, 0], non_prune_block_ids=[3])


def test_equal_configurations_have_equal_hashes(config):
    same = type(config)(**{name: getattr(config, name) for name in FIELD_NAMES})
    assert same == config
    assert hash(same) == hash(config)
    for field, value in {"steps_computation_mask": (1, 1), "non_prune_block_ids": (), "max_warmup_steps": 9}.items():
        assert config.override(**{field: value}) != config


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_is_equal_and_has_the_same_given_fields(config, copied):
    found = copied(config)
    assert (found, type(found), found.given) == (config, type(config), config.given)
    assert found.override(max_cached_steps=3) == config.override(max_cached_steps=3)


def test_replace_changes_only_the_given_field(config):
    found = dataclasses.replace(config, max_cached_steps=3)
    assert found == config.override(max_cached_steps=3)
    assert type(found) is type(config)
    assert dataclasses.asdict(found) == dataclasses.asdict(config) | {"max_cached_steps": 3}


def test_fields_are_those_of_the_dataclass():
    assert list(FIELD_NAMES) == [field.name for field in dataclasses.fields(DBPruneConfig)]


# Fields that require other fields.


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="no-mask"),
        pytest.param({"steps_computation_mask": [1, 0]}, id="dynamic-mask"),
        pytest.param({"steps_computation_policy": "static"}, id="static-without-a-mask"),
    ],
)
def test_a_static_mask_is_required_without_fn_blocks(fields):
    config = CacheConfig(Fn_compute_blocks=0, **fields)  # Valid as a partial configuration.
    for use in (
        check_together,
        Backend,
        lambda config: cachedit_fx.enable_cache(hybrid.build(), config),
        lambda config: cachedit_fx.enable_cache(hybrid.build(), params_modifiers=ParamsModifier(config)),
    ):
        with pytest.raises(ConfigError) as caught:
            use(config)
        message = str(caught.value)
        assert message.startswith("cachedit_fx: Fn_compute_blocks=0 leaves no residual to measure, so it needs ")
        assert f"got {config.steps_computation_mask!r} and {config.steps_computation_policy!r}." in message


@pytest.mark.parametrize(
    "config",
    [
        CacheConfig(0, steps_computation_mask=[1, 0], steps_computation_policy="static"),
        DBPruneConfig(0),
    ],
)
def test_a_static_mask_and_pruning_need_no_fn_blocks(config):
    check_together(config)
    Backend(config)


def test_a_refresh_that_is_refused_changes_nothing():
    model = cachedit_fx.enable_cache(hybrid.build(), hybrid.config())
    with pytest.raises(ConfigError, match="Fn_compute_blocks=0"):
        cachedit_fx.refresh_context(model, Fn_compute_blocks=0)
    generate(model)
    assert every_session(model)


def test_a_required_static_mask_cannot_be_removed():
    static = dict(Fn_compute_blocks=0, steps_computation_mask=[1, 0, 0], steps_computation_policy="static")
    model = cachedit_fx.enable_cache(hybrid.build(), hybrid.config(**static))
    with pytest.raises(ConfigError, match="Fn_compute_blocks=0"):
        cachedit_fx.refresh_context(model, steps_computation_policy="dynamic")


def test_a_refresh_to_a_default_value_takes_effect():
    model = cachedit_fx.enable_cache(hybrid.build(), hybrid.config(max_continuous_cached_steps=1))
    cachedit_fx.refresh_context(model)
    generate(model)
    cachedit_fx.refresh_context(model, max_continuous_cached_steps=-1)
    generate(model)
    assert [stats.cached_steps for stats in every_session(model)] == [[1, 3, 5, 7], [1, 2, 3, 4, 5, 6, 7]]


def test_a_modifier_that_sets_a_default_value_takes_effect():
    model, found = hybrid.build(), []
    for modifier in (ParamsModifier(), ParamsModifier(max_continuous_cached_steps=-1)):
        base = hybrid.config(max_continuous_cached_steps=1)
        cachedit_fx.enable_cache(model, base, params_modifiers=[modifier, None])
        generate(model)
        found.append(every_session(model)[-2].cached_steps)
    assert found == [[1, 3, 5, 7], [1, 2, 3, 4, 5, 6, 7]]


# The declaration of a field.


@pytest.mark.parametrize("name", FIELD_NAMES)
def test_every_field_declares_its_meaning_and_a_valid_default(name):
    declared = OPTIONS[name]
    assert declared.doc.endswith((".", ".)")) and declared.doc[0] in string.ascii_uppercase + '"0'
    assert declared.settled(name, declared.default) == declared.default
    knows_type = declared.type.removeprefix("Sequence[").removesuffix("]") in ("int", "float", "bool")
    assert declared.accepts or declared.choices or knows_type


def test_the_docstring_of_a_configuration_lists_every_field():
    text = " ".join(inspect.getdoc(CacheConfig).split())
    for name, declared in OPTIONS.items():
        assert f"{name}: {declared.doc}" in text


def test_the_fields_that_determine_the_graph_are_declared():
    structural = dict(CacheConfig().structure)
    assert {*structural} == {
        *("Fn_compute_blocks", "Bn_compute_blocks", "cache_type", "non_prune_block_ids"),
        *("inner_backend", "on_no_match", "regions", "compile_blocks", "mode", "shadow", "debug_dir"),
        *("reach", "probe", "batch_decision"),
    }
    assert not {*structural} & {*dict(CacheConfig().runtime_fields)}
    assert {*structural, *dict(CacheConfig().runtime_fields)} == {*FIELD_NAMES}


def test_the_fields_that_cannot_differ_between_block_lists_are_declared():
    for name, declared in OPTIONS.items():
        if declared.whole_model:
            with pytest.raises(ConfigError, match=f"{name} applies to a whole model"):
                ParamsModifier(**{name: declared.default})
        else:
            assert ParamsModifier(**{name: declared.default}).cache_config.given == {name}


def test_a_subclass_with_another_default_keeps_the_declaration():
    options = options_of(DBCacheConfig)
    assert options["Fn_compute_blocks"] == dataclasses.replace(OPTIONS["Fn_compute_blocks"], default=8)
    assert options["reach"] == OPTIONS["reach"]


@dataclasses.dataclass(frozen=True)
class Declared:
    count: int = option(1, doc="A count.", minimum=1)
    share: float | None = option(None, doc="A share.", above=0)
    names: str = option("a", doc="A name.", choices=lambda: ("a", "b"))
    marks: Sequence[int] = option((0,), doc="Marks.", choices=(0, 1), not_empty=True)
    even: int = option(2, doc="An even number.", accepts=lambda v: v % 2 == 0, allowed="an even number", see="even()")
    path: str = option("/", doc="A path.", convert=lambda label, value: f"{label}:{value}", accepts=bool)

    def __post_init__(self) -> None:
        settle(self, "Declared.")


def test_a_declared_field_is_converted_and_checked():
    made = Declared(2, 0.5, "b", [1, 0], 4, "tmp")
    assert (made.count, made.share, made.names, made.marks, made.even) == (2, 0.5, "b", (1, 0), 4)
    assert made.path == "Declared.path:tmp"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("count", 0, "an int >= 1, got 0."),
        ("count", True, "an int >= 1, got True."),
        ("count", None, "an int >= 1, got None."),
        ("share", 0, "a number > 0, or None, got 0."),
        ("share", math.inf, "a number > 0, or None, got inf."),
        ("names", "c", "one of 'a', 'b', got 'c'."),
        ("marks", (), "a list of 0 and 1 that is not empty, got ()."),
        ("marks", "01", "a list of 0 and 1 that is not empty, got '01'."),
        ("marks", [2], "a list of 0 and 1 that is not empty, got (2,)."),
        ("even", 3, "an even number, got 3.\nSee all names: even()"),
    ],
)
def test_a_declared_field_raises_an_error_with_the_allowed_values(field, value, says):
    with pytest.raises(ConfigError) as caught:
        Declared(**{field: value})
    assert str(caught.value) == f"cachedit_fx: Declared.{field} must be {says}"

"""`policy`: a rule with its settings, in every spelling and at every entry point."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from typing import Any

import pytest
import torch
from markupsafe import escape

import cachedit_fx
from cachedit_fx import Backend, BlockAdapter, CacheConfig, DBCacheConfig, ParamsModifier, load_configs
from cachedit_fx.config.cache_config import check_together, split_options
from cachedit_fx.config.fields import FIELD_NAMES, OPTIONS
from cachedit_fx.config.reference import POLICY, meaning
from cachedit_fx.errors import ConfigError
from cachedit_fx.integrations.pipelines import enabled_settings
from cachedit_fx.policies import Budget, History, Magnitude, Rule, Threshold, decide
from cachedit_fx.shell.command_arguments import fields_of
from tests import tiny
from tests.sessions import every_session

RATIOS = (1.0, 0.9, 0.8)

# Spellings of the same configuration; the last one uses no `policy`.
SPELLINGS: dict[str, list[dict[str, Any]]] = {
    "threshold": [
        dict(policy=Threshold(0.2)),
        dict(policy=Threshold(), residual_diff_threshold=0.2),
        dict(policy="threshold", residual_diff_threshold=0.2),
        dict(policy={"type": "threshold", "threshold": 0.2}),
        dict(decision_rule="threshold", residual_diff_threshold=0.2),
    ],
    "budget": [
        dict(policy=Budget(0.3, [2, 0])),
        dict(policy=Budget(0.3, (2.0, 0.0)), rescale_coefficients=[2.0, 0.0]),
        dict(policy=Budget(coefficients=(2.0, 0.0)), residual_diff_threshold=0.3),
        dict(policy="budget", residual_diff_threshold=0.3, rescale_coefficients=(2.0, 0.0)),
        dict(policy={"type": "budget", "budget": 0.3, "coefficients": [2.0, 0.0]}),
        dict(decision_rule="budget", residual_diff_threshold=0.3, rescale_coefficients=(2.0, 0.0)),
    ],
    "magnitude": [
        dict(policy=Magnitude(RATIOS, 0.4)),
        dict(policy=Magnitude(RATIOS), probe="timestep", residual_diff_threshold=0.4),
        dict(policy="magnitude", magnitude_ratios=RATIOS, residual_diff_threshold=0.4),
        dict(policy={"type": "magnitude", "ratios": [*RATIOS], "threshold": 0.4}),
        dict(decision_rule="budget", probe="timestep", magnitude_ratios=RATIOS, residual_diff_threshold=0.4),
    ],
}
RULES = {"threshold": Threshold(0.2), "budget": Budget(0.3, (2.0, 0.0)), "magnitude": Magnitude(RATIOS, 0.4)}
EVERY = [pytest.param(name, fields, id=f"{name}-{i}") for name in RULES for i, fields in enumerate(SPELLINGS[name])]


def enabled_with(**fields: Any) -> CacheConfig:
    module = cachedit_fx.enable_cache(tiny.build(), **fields)
    settings = enabled_settings(module)
    assert settings is not None
    return settings.config


WAYS_IN = {
    "constructor": lambda **fields: CacheConfig(**fields),
    "override": lambda **fields: CacheConfig().override(**fields),
    "override-by-another": lambda **fields: CacheConfig().override(CacheConfig(**fields)),
    "reset": lambda **fields: CacheConfig(max_cached_steps=3).reset(**fields),
    "enable_cache": enabled_with,
    "enable_cache-options": lambda **fields: enabled_with(options=fields),
    "torch.compile": lambda **fields: split_options(fields)[0],
    "backend": lambda **fields: Backend(options=fields).config,
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_every_spelling_makes_the_same_configuration_at_every_entry_point(way, name, fields):
    config, flat = WAYS_IN[way](**fields), CacheConfig(**SPELLINGS[name][-1])
    assert (config, hash(config), config.policy) == (flat, hash(flat), RULES[name])
    assert config.structure == flat.structure and config.runtime_fields == flat.runtime_fields
    assert dataclasses.asdict(config) == dataclasses.asdict(flat)
    check_together(config)


@pytest.mark.parametrize(("name", "fields"), EVERY)
def test_a_configuration_with_a_policy_survives_copies_and_files(name, fields):
    config = CacheConfig(**fields)
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert (copied, copied.given, copied.policy) == (config, config.given, config.policy)
    assert CacheConfig(**json.loads(json.dumps(dict(config.plain_changes)))) == config
    assert CacheConfig(policy=config.policy) == config
    assert CacheConfig(**json.loads(json.dumps(config.shown_changes))) == config


def test_a_file_names_a_rule_with_its_settings(tmp_path):
    path = tmp_path / "cache.yaml"
    path.write_text("cache_config:\n  policy: {type: budget, budget: 0.3}\n  max_warmup_steps: 2\n")
    assert load_configs(path) == {"cache_config": DBCacheConfig(policy=Budget(0.3), max_warmup_steps=2)}
    assert load_configs({"policy": "budget"}) == {"cache_config": DBCacheConfig(decision_rule="budget")}


def test_the_shell_takes_a_name_or_a_mapping():
    assert split_options(fields_of(["policy=budget"]))[0] == CacheConfig(policy=Budget())
    fields = fields_of(['policy={"type": "budget", "budget": 0.3}'])
    assert split_options(fields)[0] == CacheConfig(policy=Budget(0.3))


@pytest.mark.parametrize("make", [CacheConfig, DBCacheConfig])
@pytest.mark.parametrize("rule", [Threshold(), Budget(), Magnitude(RATIOS)])
def test_a_rule_without_a_threshold_does_not_change_the_default_threshold(make, rule):
    config = make(policy=rule)
    assert config.residual_diff_threshold == make().residual_diff_threshold
    assert "residual_diff_threshold" not in config.given
    set_by_it = {name: getattr(config, name) for name in config.given}
    assert {n: getattr(config, n) for n in FIELD_NAMES} == {n: getattr(make(), n) for n in FIELD_NAMES} | set_by_it


def test_the_default_policy_is_the_threshold_rule():
    assert CacheConfig().policy == Threshold(0.2)
    assert DBCacheConfig().policy == Threshold(0.08)
    assert CacheConfig(policy=Threshold()) == CacheConfig()


def test_a_policy_may_be_given_beside_positional_fields():
    assert CacheConfig(2, 1, policy=Budget(0.3)) == CacheConfig(2, 1, 0.3, decision_rule="budget")
    with pytest.raises(ConfigError, match=r"sets residual_diff_threshold=0\.3, got residual_diff_threshold=0\.2"):
        CacheConfig(2, 1, 0.2, policy=Budget(0.3))


# Changing the policy.


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("base", RULES)
def test_another_policy_replaces_the_whole_rule(base, name):
    before = CacheConfig(policy=RULES[base], max_warmup_steps=2)
    expected = CacheConfig(policy=RULES[name], max_warmup_steps=2)
    for found in (
        before.override(policy=RULES[name]),
        before.override(CacheConfig(policy=RULES[name])),
        before.override(ParamsModifier(policy=RULES[name]).cache_config) if name != "magnitude" else expected,
        dataclasses.replace(before, policy=RULES[name]),
        split_options({"policy": RULES[name]}, before)[0],
    ):
        assert (found, found.policy) == (expected, RULES[name])
        check_together(found)


@pytest.mark.parametrize(
    ("change", "policy"),
    [
        (dict(residual_diff_threshold=0.5), Budget(0.5, (2.0, 0.0))),
        (dict(rescale_coefficients=()), Budget(0.3)),
        (dict(policy="budget"), Budget(0.3, (2.0, 0.0))),
        (dict(policy="budget", residual_diff_threshold=0.5), Budget(0.5, (2.0, 0.0))),
        (dict(policy=Budget()), Budget(0.3)),
        (dict(policy="threshold"), Threshold(0.3)),
        (dict(max_cached_steps=3), Budget(0.3, (2.0, 0.0))),
    ],
)
def test_a_flat_field_or_a_name_changes_one_setting(change, policy):
    before = CacheConfig(policy=Budget(0.3, (2.0, 0.0)))
    assert before.override(**change).policy == policy
    assert before.override(CacheConfig(**change)).policy == policy
    assert dataclasses.replace(before, **change).policy == policy


def test_a_policy_replaces_the_one_of_a_configuration_given_beside_it():
    found = CacheConfig(max_warmup_steps=2).override(CacheConfig(policy=Magnitude(RATIOS)), policy=Budget(0.3))
    assert found == CacheConfig(max_warmup_steps=2, policy=Budget(0.3))


def test_a_probe_that_was_given_stays_when_the_policy_changes():
    before = CacheConfig(policy=Budget(0.3), probe="modulated_input")
    for found in (before.override(policy=Threshold()), dataclasses.replace(before, policy="threshold")):
        assert found == CacheConfig(policy=Threshold(0.3), probe="modulated_input")


def test_a_policy_changes_while_the_model_is_enabled():
    module = cachedit_fx.enable_cache(tiny.build(), tiny.config(max_warmup_steps=1), policy=Budget(0.12))
    with torch.no_grad():
        tiny.generate(module, tiny.prompt(), tiny.latents())
        assert {"budget-below", "budget-above"} <= {*every_session(module)[-1].decisions}
        cachedit_fx.refresh_context(module, policy=Threshold(1.0))
        tiny.generate(module, tiny.prompt(), tiny.latents())
    assert {*every_session(module)[-1].decisions[1:]} == {"threshold-one"}


def test_a_block_list_may_have_a_separate_policy():
    adapter = BlockAdapter(transformer=tiny.build(), params_modifiers=ParamsModifier(policy=Budget(0.3)))
    (declared,) = adapter.declarations().values()
    (override,) = declared.overrides
    assert CacheConfig().override(override) == CacheConfig(policy=Budget(0.3))


def test_a_policy_that_sets_the_probe_applies_to_the_whole_model():
    with pytest.raises(ConfigError, match="probe applies to a whole model"):
        ParamsModifier(policy=Magnitude(RATIOS))
    ratios = ParamsModifier(magnitude_ratios=(1.0, 0.5)).cache_config
    assert CacheConfig(policy=Magnitude(RATIOS)).override(ratios).policy == Magnitude((1.0, 0.5), 0.2)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        (Threshold(0.3), "diff-below"),
        (Threshold(0.05), "diff-above"),
        (Budget(0.3), "budget-below"),
        (Budget(0.3, (4.0, 0.0)), "budget-above"),
        (Magnitude((1.0, 0.9), 0.2), "ratios-below"),
        (Magnitude((1.0, 0.5), 0.2), "ratios-above"),
    ],
)
def test_the_rule_decides_with_its_settings(policy, reason):
    history = History(num_steps=1, has_moved=True)
    assert decide(CacheConfig(policy=policy, max_warmup_steps=0), history, 0.1, is_cached=True).reason == reason


# The output of explain.


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, {}),
        ({"residual_diff_threshold": 0.3}, {"residual_diff_threshold": 0.3}),
        ({"policy": Threshold()}, {"policy": {"type": "threshold", "threshold": 0.2}}),
        (
            {"policy": Budget(0.3), "Fn_compute_blocks": 2},
            {"Fn_compute_blocks": 2, "policy": {"type": "budget", "budget": 0.3}},
        ),
        (SPELLINGS["magnitude"][-1], {"policy": {"type": "magnitude", "ratios": RATIOS, "threshold": 0.4}}),
    ],
)
def test_explain_shows_the_rule_with_its_settings_and_what_an_option_means(fields, shown, tmp_path):
    assert CacheConfig(**fields).shown_changes == shown
    module = tiny.build()
    call = dict(hidden_states=tiny.latents(), encoder_hidden_states=tiny.prompt(), timestep=torch.ones(1))
    explanation = cachedit_fx.explain(module, cache_config=CacheConfig(**fields), **call)
    assert explanation.modules[0].config == shown
    page = explanation.to_html(tmp_path / "page.html").read_text()
    for name in shown:
        assert f'title="{escape(meaning(OPTIONS[name]) if name in OPTIONS else POLICY)}">{name}=' in page


# Errors.


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            dict(policy=Budget(0.3), residual_diff_threshold=0.2),
            "policy=Budget(budget=0.3, coefficients=()) sets residual_diff_threshold=0.3, got "
            "residual_diff_threshold=0.2 as well",
        ),
        (
            dict(policy=Budget(), rescale_coefficients=(2.0, 0.0)),
            "sets rescale_coefficients=(), got rescale_coefficients=(2.0, 0.0) as well",
        ),
        (
            dict(policy="budget", decision_rule="threshold"),
            "policy='budget' sets decision_rule='budget', got decision_rule='threshold' as well",
        ),
        (
            dict(policy=Magnitude(RATIOS), probe="modulated_input"),
            "sets probe='timestep', got probe='modulated_input' as well",
        ),
        (
            dict(policy="threshold", magnitude_ratios=RATIOS),
            "policy='threshold' sets magnitude_ratios=(), got magnitude_ratios=(1.0, 0.9, 0.8) as well",
        ),
        (
            dict(policy={"type": "budget", "budget": 0.3}, residual_diff_threshold=0.2),
            "policy={'type': 'budget', 'budget': 0.3} sets residual_diff_threshold=0.3",
        ),
    ],
)
def test_two_spellings_with_different_values_are_both_named(fields, says):
    for make in (CacheConfig, CacheConfig().override, CacheConfig().reset, split_options_of, enabled_with):
        with pytest.raises(ConfigError) as caught:
            make(**fields)
        assert str(caught.value).startswith("cachedit_fx: policy=")
        assert says in str(caught.value)


def split_options_of(**fields: Any) -> CacheConfig:
    return split_options(fields)[0]


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (None, "got None."),
        (0.3, "got 0.3."),
        ("bugdet", "got 'bugdet'. Did you mean 'budget'?"),
        ({"budget": 0.3}, "a mapping with one of them under 'type', got {'budget': 0.3}."),
        (Budget, "got <class "),
    ],
)
def test_an_invalid_policy_raises_an_error_that_lists_the_valid_ones(policy, says):
    with pytest.raises(ConfigError) as caught:
        CacheConfig(policy=policy)
    message = str(caught.value)
    assert message.startswith("cachedit_fx: policy must be a rule of cachedit_fx.policies, one of the names ")
    assert "'threshold', 'budget', 'magnitude'" in message and says in message


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Threshold(math.nan), "Threshold.threshold must be a finite number, or None, got nan."),
        (lambda: Budget("0.3"), "Budget.budget must be a finite number, or None, got '0.3'."),
        (lambda: Budget(coefficients="x"), "Budget.coefficients must be a list of finite numbers, got 'x'."),
        (lambda: Magnitude((1, 0)), "Magnitude.ratios must be a list of numbers > 0 that is not empty, got (1, 0)."),
        (lambda: Magnitude(), "Magnitude.ratios must be a list of numbers > 0 that is not empty, got ()."),
        (
            lambda: Budget(bugdet=0.3),
            "field 'bugdet' (given 0.3) of Budget is unknown. Did you mean 'budget'?\nAllowed: budget, coefficients.",
        ),
        (
            lambda: CacheConfig(policy={"type": "threshold", "budget": 0.3}),
            "field 'budget' (given 0.3) of Threshold is unknown.\nAllowed: threshold.",
        ),
    ],
)
def test_an_invalid_setting_of_a_rule_raises_an_error(make, says):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == f"cachedit_fx: {says}"


def test_a_magnitude_rule_without_ratios_raises_an_error_when_it_is_used():
    with pytest.raises(ConfigError, match=r"give policy=Magnitude\(ratios=\.\.\.\)"):
        check_together(CacheConfig(policy="magnitude"))


# Rules as values.


def test_rules_are_frozen_values():
    assert Budget(0.3, [2, 0]) == Budget(0.3, (2, 0)) and hash(Budget(0.3, [2, 0])) == hash(Budget(0.3, (2, 0)))
    assert Threshold(0.3) != Budget(0.3)
    assert pickle.loads(pickle.dumps(Budget(0.3))) == copy.deepcopy(Budget(0.3)) == Budget(0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Budget(0.3).budget = 0.2


def test_every_setting_of_a_rule_is_a_field_of_the_configuration():
    for rule in (Threshold, Budget, Magnitude):
        assert issubclass(rule, Rule)
        assert {option.metadata["option"].flat for option in dataclasses.fields(rule)} <= {*FIELD_NAMES}
    assert {name: declared.flat_of for name, declared in OPTIONS.items() if declared.flat_of} == {
        "rescale_coefficients": "Budget.coefficients",
        "magnitude_ratios": "Magnitude.ratios",
    }

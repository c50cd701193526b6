"""Configurations that are loaded from files and dicts, as `enable_cache` accepts them."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

import cachedit_fx
from cachedit_fx import DBCacheConfig, DBPruneConfig, load_configs, steps_mask
from cachedit_fx.errors import ConfigError
from tests import hybrid
from tests.hybrid import generate
from tests.sessions import every_session

FIELDS = {"Fn_compute_blocks": 1, "residual_diff_threshold": 0.12, "max_warmup_steps": 4, "regions": "per_list"}


def written(folder, name, text):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


SOURCES = {
    "dict": lambda folder, content: content,
    "json": lambda folder, content: written(folder, "cache.json", content),
    "yaml": lambda folder, content: written(folder, "cache.yaml", yaml.safe_dump(content)),
    "yml": lambda folder, content: written(folder, "cache.yml", yaml.safe_dump(content)),
    "path-as-string": lambda folder, content: str(written(folder, "cache.json", content)),
}


@pytest.fixture(params=SOURCES)
def loaded(request, tmp_path):
    """A function that loads the given content from a file or from a dict."""
    return lambda content: load_configs(SOURCES[request.param](tmp_path, content))


def config_of(loaded):
    (name,) = loaded
    assert name == "cache_config"
    return loaded[name]


@pytest.mark.parametrize("level", [True, False])
def test_only_the_fields_of_the_file_count_as_given(loaded, level):
    config = config_of(loaded({"cache_config": FIELDS} if level else FIELDS))
    assert config == DBCacheConfig(**FIELDS)
    assert config.given == set(FIELDS)


@pytest.mark.parametrize("content", [{}, {"cache_config": {}}, {"cache_config": None}])
def test_without_fields_the_defaults_of_cache_dit_apply(loaded, content):
    config = config_of(loaded(content))
    assert config == DBCacheConfig()
    assert not config.given


@pytest.mark.parametrize("policy", ["slow", "ultra"])
def test_a_mask_can_be_given_by_the_name_of_its_policy(loaded, policy):
    config = config_of(loaded({"num_inference_steps": 28, "steps_computation_mask": policy}))
    assert config.steps_computation_mask == tuple(steps_mask(mask_policy=policy, total_steps=28))
    assert config.given == {"num_inference_steps", "steps_computation_mask"}


def test_a_mask_can_be_given_as_a_list(loaded):
    assert config_of(loaded({"steps_computation_mask": [1, 0, 1]})).steps_computation_mask == (1, 0, 1)


def test_pruning_loads_as_a_pruning_configuration(loaded):
    config = config_of(loaded({"cache_type": "DBPrune", "non_prune_block_ids": [0, 3]}))
    assert config == DBPruneConfig(non_prune_block_ids=(0, 3))
    assert isinstance(config, DBPruneConfig)


def test_a_dict_is_not_modified():
    fields = {"num_inference_steps": 8, "steps_computation_mask": "fast"}
    given = {"cache_config": dict(fields)}
    load_configs(given)
    assert given == {"cache_config": fields}


def test_enable_cache_accepts_a_loaded_configuration(tmp_path):
    path = written(
        tmp_path,
        "cache.yaml",
        """
        cache_config:
          Fn_compute_blocks: 1
          max_warmup_steps: 2
          residual_diff_threshold: 1.0
          inner_backend: eager
        """,
    )
    model = hybrid.build()
    cachedit_fx.enable_cache(model, **load_configs(path))
    generate(model)
    (stats,) = every_session(model)
    assert stats.cached_steps == [2, 3, 4, 5, 6, 7]


def test_parts_of_a_file_that_are_not_about_caching_are_left_out_and_named(caplog):
    content = {
        "cache_config": FIELDS,
        "parallelism_config": {"ulysses_size": 2},
        "attention_backend": "sage",
        "quantize_config": None,
    }
    assert load_configs(content) == load_configs({"cache_config": FIELDS})
    (record,) = caplog.records
    assert "found: parallelism_config, attention_backend\n" in record.getMessage()
    assert "for attention_backend, call transformer.set_attention_backend(...) of diffusers" in record.getMessage()


# Invalid input.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            {"max_warmup_step": 4},
            "option 'max_warmup_step' (given 4) is unknown. Did you mean 'max_warmup_steps'?",
            id="unknown",
        ),
        pytest.param(
            {"cache_config": {"Fn": 1}},
            "option 'Fn' (given 1) is unknown.",
            id="unknown-below-the-level",
        ),
        pytest.param(
            {"cache_config": FIELDS, "paralelism_config": {"ulysses_size": 2}},
            "'paralelism_config' (given {'ulysses_size': 2}) is no part of a configuration file. Did you mean ",
            id="next-to-the-level",
        ),
        pytest.param({"cache_config": [1]}, "cache_config must be a mapping of fields, got [1]", id="a-list"),
        pytest.param(
            {"max_warmup_steps": "8"}, "max_warmup_steps must be an int >= 0, or None, got '8'", id="bad-value"
        ),
        pytest.param(
            {"steps_computation_mask": "fast"},
            "num_inference_steps must be given with steps_computation_mask='fast', got None",
            id="no-steps",
        ),
        pytest.param(
            {"num_inference_steps": 28, "steps_computation_mask": "fats"},
            "mask_policy must be one of slow, medium, fast, ultra, got 'fats'. Did you mean 'fast'?",
            id="no-such-policy",
        ),
        pytest.param(
            {"steps_computation_mask": [1, 2]},
            "steps_computation_mask must be a list of 0 and 1 that is not empty, or None, got (1, 2).",
            id="mask",
        ),
        pytest.param(
            {"cache_type": "DBprune"}, "cache_type must be one of 'DBCache', 'DBPrune', got 'DBprune'.", id="cache-type"
        ),
    ],
)
def test_an_invalid_field_is_named_in_the_error(loaded, content, message):
    with pytest.raises(ConfigError) as caught:
        loaded(content)
    assert str(caught.value).startswith(f"cachedit_fx: {message}")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        pytest.param("cache.json", "{", "cannot be parsed: ", id="broken-json"),
        pytest.param("cache.yaml", "a: [1", "cannot be parsed: ", id="broken-yaml"),
        pytest.param("cache.json", "[1, 2]", "must contain a mapping, got [1, 2]", id="a-list"),
        pytest.param("cache.yaml", "fast", "must contain a mapping, got 'fast'", id="a-word"),
        pytest.param("cache.yaml", "", "must contain a mapping, got None", id="empty-yaml"),
        pytest.param("cache.json", "", "cannot be parsed: ", id="empty-json"),
        pytest.param("cache.yaml", "a: !!python/object/apply:os.getcwd []", "cannot be parsed: ", id="code"),
    ],
)
def test_a_file_with_invalid_content_is_named_in_the_error(tmp_path, name, text, message):
    path = written(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        load_configs(path)
    assert str(caught.value).startswith(f"cachedit_fx: configuration file {str(path)!r} {message}")


@pytest.mark.parametrize("name", ["missing.yaml", "missing.json", ""])
def test_a_missing_file_is_named_in_the_error(tmp_path, name):
    path = tmp_path / name  # An empty name gives the folder itself.
    with pytest.raises(ConfigError) as caught:
        load_configs(path)
    assert f"configuration file {str(path)!r} cannot be read: " in str(caught.value)


def test_yaml_without_its_package_raises_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(
        ImportError, match=r"cachedit_fx: YAML needs PyYAML, which is not installed: pip install pyyaml, or pass a JSON"
    ):
        load_configs(written(tmp_path, "cache.yaml", "{}"))
    assert config_of(load_configs(written(tmp_path, "cache.json", "{}"))) == DBCacheConfig()

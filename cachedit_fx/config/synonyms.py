"""Names that other caches give to our options. They are suggested for unknown options, and accepted nowhere."""

from __future__ import annotations

from collections.abc import Mapping

_TAYLORSEER = "forecaster=TaylorSeerCalibratorConfig(taylorseer_order=...)"

# What to write here -> names of it in cache-dit, TeaCache, MagCache, the caches of diffusers and the nodes of ComfyUI,
# and other names that a user may try first.
_NAMES: Mapping[str, str] = {
    "Fn_compute_blocks": "F Fn blocks num_blocks compute_blocks front_blocks first_blocks num_first_blocks",
    "Bn_compute_blocks": "B Bn back_blocks last_blocks num_last_blocks",
    "residual_diff_threshold": "threshold thresh rdt r_thresh diff_threshold tolerance sensitivity rel_l1 "
    "rel_l1_thresh teacache_thresh magcache_thresh fbcache_threshold reuse_threshold easycache_threshold "
    "l1_hidden_states_diff_threshold",
    "max_warmup_steps": "warmup warmup_steps num_warmup_steps skip_first skip_first_steps start_step cache_start_step "
    "ret_steps use_ret_steps retention_steps disable_cache_before_step",
    "warmup_interval": "warmup_every",
    "max_cached_steps": "max_steps max_skips max_total_skips max_cache_hits",
    "max_continuous_cached_steps": "max_skip_steps max_consecutive max_consecutive_cache_hits "
    "max_consecutive_cached_steps max_skip K magcache_K",
    "start_percent": "start start_at start_percentage retention_ratio",
    "end_percent": "end end_at end_percentage end_step",
    "final_compute_steps": "skip_last skip_last_steps cooldown_steps last_steps disable_cache_after_step",
    "num_inference_steps": "steps num_steps total_steps num_timesteps",
    "steps_computation_mask": "interval cache_interval skip_interval fresh_interval fresh_threshold step_interval "
    "every mask steps_mask cache_schedule schedule scm_mask scm_steps_mask",
    "steps_computation_policy": "mask_policy scm_policy scm_steps_policy",
    "force_refresh_step_hint": "refresh refresh_step refresh_interval",
    "enable_separate_cfg": "cfg separate_cfg do_separate_cfg is_separate_cfg",
    "cache_type": "prune pruning dbprune cache_method",
    "inner_backend": "backend compiler compile_backend",
    "mode": "compile_mode",
    "on_no_match": "strict raise_on_no_match ignore_errors",
    "forecaster": "calibrator calibrator_config extrapolation extrapolator predictor taylorseer enable_taylorseer "
    "enable_calibrator",
    _TAYLORSEER: "order max_order taylorseer_order n_derivatives num_derivatives taylor_order",
    "cache_device": "offload cpu_offload offload_device offload_cache cache_on_cpu device",
    "max_state_bytes": "max_memory memory_limit max_cache_size cache_size vram_limit max_bytes",
    "rescale_coefficients": "coefficients use_coefficients poly_coefficients",
    "magnitude_ratios": "ratios mag_ratios",
    "guidance_reuse": "cfg_reuse cfg_cache unconditional_batch_skip_range",
    "shadow": "dry_run measure_only evaluate",
    "debug_dir": "debug dump_dir dump log_dir",
}

SYNONYMS: Mapping[str, str] = {name: ours for ours, names in _NAMES.items() for name in names.split()}

# Options that other caches have, and why there is none here.
NO_COUNTERPART: Mapping[str, str] = {
    **dict.fromkeys(
        ("dtype", "cache_dtype", "taylor_factors_dtype", "torch_dtype"),
        "There is no such option: cached values have the dtype of the model.",
    ),
    "verbose": "There is no such option: logging.getLogger('cachedit_fx').setLevel('INFO') logs more.",
    "downsample_factor": "There is no such option: the residual diff is measured on all elements.",
    "model_type": "There is no such option: the blocks are found in the graph.",
    "force_reduce_calibrator_vram": "There is no such option: cache_device='cpu' moves the cached values off the GPU.",
}

"""Keys that had another name: the error for an old one names the new one. Nothing is read under an old name."""

from __future__ import annotations

# Keys, and groups or sections with all keys below them.
RENAMED = {
    "uplink": "update_compression",
    "gradients": "gradient_compression",
    "cohort": "client_sampling",
    "cohort.size": "client_sampling.clients_per_round",
    "preprocess": "transforms",
    "skew": "client_shift",
    "sinks": "loggers",
    "report": "metrics",
    "report.peak_rate": "metrics.peak_flops",
    "report.measure_rate": "metrics.measure_flops",
    "round.synchronous": "round.sync_rounds",
    "round.seconds": "round.deadline_seconds",
    "round.late": "round.stragglers",
    "stop.target": "stop.metric_target",
    "stop.patience": "stop.patience_evaluations",
    "stop.seconds": "stop.max_training_seconds",
    "eval.every": "eval.every_rounds",
    "checkpoint.every": "checkpoint.every_rounds",
    "checkpoint.keep": "checkpoint.keep_last",
    "clip_norm": "clip.max_norm",
    "clip_norm_order": "clip.norm_type",
    "clip_value": "clip.max_value",
    "max_bad_rounds": "max_nonfinite_rounds",
    "bad_loss": "on_nonfinite_loss",
    "ema": "ema_decay",
    "compile": "compile_backend",
    "run_dir_shared": "require_shared_run_dir",
    "launch.nproc": "launch.nproc_per_node",
    "launch.meet": "launch.rdzv_endpoint",
    "launch.threads": "launch.threads_per_worker",
    "launch.between_backend": "launch.inter_silo_backend",
    "launch.between_timeout_seconds": "launch.inter_silo_timeout_seconds",
    "data.on_device": "data.cache_on_gpu",
    "optimizer.rates": "optimizer.lr_multipliers",
    "optimizer.no_decay": "optimizer.exclude_norm_bias_decay",
    "schedule.warmup": "schedule.warmup_fraction",
    "schedule.final": "schedule.final_lr_fraction",
    "algorithm.weight": "algorithm.weighting",
    "algorithm.cap": "algorithm.max_weight",
    "algorithm.shared": "algorithm.shared_params",
    "algorithm.inner_state": "algorithm.client_optimizer_state",
    "algorithm.batch_statistics": "algorithm.batchnorm_stats",
    "algorithm.pull": "algorithm.proximal_mu",
    "algorithm.norm_bound": "algorithm.max_update_norm",
    "algorithm.trim": "algorithm.rule.trim",
    "algorithm.byzantine": "algorithm.rule.byzantine",
    "algorithm.selected": "algorithm.rule.selected",
    "task.auc_bins": "task.auc",
    "model.checkpointing": "silo.recompute",
}
# Values that had another name too.
VALUES = {
    "round.late": {"count": "keep"},
    "run_dir_shared": {"auto": "false"},
    "task.auc_bins": {"0": "false", "1024": "true"},
}


def renamed(override: str) -> str | None:
    """Write the error for an override of an old key; None where the key never had another name.

    Of several old names above the key the longest counts: cohort.size before cohort.
    """
    key, equals, value = override.partition("=")
    sign, name = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    old = max((old for old in RENAMED if name == old or name.startswith(f"{old}.")), key=len, default=None)
    if old is None:
        return None
    new = RENAMED[old] + name.removeprefix(old)
    # The new key exists, and needs no sign; what lies below it may be added, or taken out.
    typed = f"{'' if name == old else sign}{new}{equals}{VALUES.get(name, {}).get(value, value)}"
    return f"{name} is no key: it is called {new}\n  set {typed}"

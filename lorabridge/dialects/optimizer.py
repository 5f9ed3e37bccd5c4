"""Training state in checkpoints: tensors that belong to an optimizer or a training loop, not to the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..tensors import TensorSpec

# One slot per parameter is called PREFIX.NAME. Sources: the ``clone(prefix=...)`` calls of mindspore 2.10 nn/optim
# (Adam moment1 moment2 vhat, AdamWeightDecay adam_m adam_v, Momentum moments, LAMB lamb_m lamb_v, Adagrad and FTRL
# accum linear, Adadelta accum_update, Rprop prev step_size, RMSProp mean_grad mean_square moment, SGD stat,
# Adafactor and mint exp_avg*, ASGD ax_) and the gradient accumulation of nn/wrap.
SLOTS = (
    "moment1", "moment2", "moment", "moments", "vhat", "adam_m", "adam_v", "lamb_m", "lamb_v", "accum", "accum_update",
    "linear", "prev", "step_size", "mean_grad", "mean_square", "stat", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "ax_",
    "accu_grads", "accu_grad",
)  # fmt: skip

JOINED = ("exp_avg_sq_row_", "exp_avg_sq_col_", "exp_avg_sq_")
"""Adafactor's slots, joined to the parameter's name without a dot."""

COUNTERS = frozenset({
    "global_step", "learning_rate", "beta1_power", "beta2_power", "momentum", "weight_decay", "epoch_num", "step_num",
    "scale_sense", "loss_scale", "current_iterator_step", "last_overflow_iterator_step", "afactor_step", "cov_step",
    "fake_lr", "graceful_init", "graceful_exit", "loss", "lr", "epoch", "step", "global_batch_size", "consumed_samples",
})  # fmt: skip


def training_state(specs: Mapping[str, TensorSpec]) -> list[tuple[str, str]]:
    """Return (tensor name, reason) for every tensor that is training state.

    A slot counts only when the parameter it belongs to is in the file too, a counter only when it has at most one axis,
    so that a network's own ``linear.weight`` is never taken for one.
    """
    return list(_found(specs))


def _found(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, str]]:
    for name, spec in specs.items():
        slot, _, parameter = name.partition(".")
        if slot in SLOTS and parameter in specs:
            yield name, f"optimizer state of {parameter}"
            continue
        joined = next((p for p in JOINED if name.startswith(p) and name.removeprefix(p) in specs), None)
        if joined is not None:
            yield name, f"optimizer state of {name.removeprefix(joined)}"
        elif name in COUNTERS and len(spec.shape) <= 1:
            yield name, "training state"

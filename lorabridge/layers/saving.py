"""TrainableParamsCheckPoint: MindPet's callback, which saves what trains and nothing else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import MappingError, OutputError, UsageError
from .binding import Cell, Parameter

if TYPE_CHECKING:

    class Callback:
        """The part of ``mindspore.train.Callback`` that is used."""

    class CheckpointConfig:
        """The part of ``mindspore.train.CheckpointConfig`` that is used."""

        save_checkpoint_steps: int
        save_checkpoint_seconds: int
        keep_checkpoint_max: int
        keep_checkpoint_per_n_minutes: int
        integrated_save: bool
        async_save: bool
        saved_network: Cell | None
        enc_key: bytes | None
        crc_check: bool
        append_dict: dict[str, object] | None

    class RunContext:
        """The part of ``mindspore.train.RunContext`` that is used."""

        def original_args(self) -> Arguments: ...  # noqa: D102

    class Arguments:
        """What a callback is told."""

        cur_step_num: int
        cur_epoch_num: int
        batch_num: int
        train_network: Cell

    Optimizers: tuple[type[Cell], ...]

    def save_checkpoint(save_obj: Cell, ckpt_file_name: str, **options: object) -> None:
        """Stand for ``mindspore.save_checkpoint``."""
else:
    from mindspore import save_checkpoint
    from mindspore.experimental.optim import Optimizer as ExperimentalOptimizer
    from mindspore.nn import Optimizer
    from mindspore.train import Callback, CheckpointConfig, RunContext

    Optimizers = (Optimizer, ExperimentalOptimizer)


class TrainableParamsCheckPoint(Callback):
    """Save the parameters that train while ``mindspore.train.Model`` trains: MindPet 1.0.4's callback.

    ``directory``: made where it is missing; not a symbolic link. Files are called ``{prefix}-{epoch}_{step}.ckpt``
    as MindPet calls them, appear complete or not at all, and are written at the end of training too. ``config``:
    steps or seconds between files, how many of this run's files to keep, ``integrated_save``, ``append_info``,
    ``crc_check``, ``saved_network``. ``optimizer``: MindPet's files also hold the optimizer's state; here it is left
    out, or with "separate" written beside as ``{prefix}-{epoch}_{step}.optimizer.ckpt``.

    Raises UsageError for options that are not supported, OutputError for the directory, MappingError where nothing
    trains.
    """

    def __init__(
        self,
        directory: Path | str,
        prefix: str = "DELTA_CKP",
        config: CheckpointConfig | None = None,
        *,
        optimizer: Literal["leave out", "separate"] = "leave out",
    ) -> None:
        super().__init__()
        if not str(directory) or not prefix or "/" in prefix:
            raise UsageError("a directory and a prefix without slashes are needed", where=f"{directory}, {prefix!r}")
        if optimizer not in ("leave out", "separate"):
            raise UsageError(f"optimizer must be 'leave out' or 'separate', not {optimizer!r}")
        self.directory = Path(directory).absolute()
        if self.directory.is_symlink():
            raise OutputError("the directory is a symbolic link", where=str(directory), hint="name the real directory")
        self.prefix, self.optimizer = prefix, optimizer
        self.config = config or CheckpointConfig()
        _check(self.config)
        self.written: list[Path] = []
        self._last_step, self._last_time = 0, time.monotonic()

    def step_end(self, run_context: RunContext) -> None:
        """Save where the configured number of steps or seconds has passed."""
        args = run_context.original_args()
        steps, seconds = self.config.save_checkpoint_steps, self.config.save_checkpoint_seconds
        due = bool(steps) and args.cur_step_num >= self._last_step + steps
        if due or (seconds and time.monotonic() - self._last_time >= seconds):
            self._save(args)

    def end(self, run_context: RunContext) -> None:
        """Save the last state."""
        self._save(run_context.original_args())

    def _save(self, args: Arguments) -> None:
        step = int(args.cur_step_num)
        if step == self._last_step:
            return
        self._last_step, self._last_time = step, time.monotonic()
        network = self.config.saved_network or args.train_network
        trained, state = _trained(network), _state(network)
        if not trained:
            raise MappingError(
                "no parameter of the network trains", where=type(network).__name__, hint="freeze the base alone"
            )
        within = (step - 1) % args.batch_num + 1
        name = f"{self.prefix}-{args.cur_epoch_num}_{within}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self._write(network, f"{name}.ckpt", trained, self.config.append_dict)
        if self.optimizer == "separate" and state:
            self._write(network, f"{name}.optimizer.ckpt", state, None)
        self._forget(2 if self.optimizer == "separate" and state else 1)

    def _write(self, network: Cell, name: str, chosen: set[str], more: dict[str, object] | None) -> None:
        staged = self.directory / f".{name}"
        save_checkpoint(
            network, str(staged), integrated_save=self.config.integrated_save, append_dict=dict(more) if more else None,
            crc_check=self.config.crc_check, choice_func=chosen.__contains__,
        )  # fmt: skip
        target = self.directory / name
        staged.replace(target)
        if target in self.written:
            self.written.remove(target)
        self.written.append(target)

    def _forget(self, files: int) -> None:
        """Delete this run's oldest files beyond the number to keep."""
        most = self.config.keep_checkpoint_max
        while most and len(self.written) > most * files:
            self.written.pop(0).unlink(missing_ok=True)


def _check(config: CheckpointConfig) -> None:
    refused = {
        "enc_key": config.enc_key,
        "async_save": config.async_save,
        "keep_checkpoint_per_n_minutes": config.keep_checkpoint_per_n_minutes,
    }
    given = [name for name, value in refused.items() if value]
    if given:
        raise UsageError("the checkpoint config asks for what is not supported", where=given, hint="leave it out")


def _optimizers(network: Cell) -> list[Cell]:
    return [cell for _, cell in network.cells_and_names() if isinstance(cell, Optimizers)]


def _trained(network: Cell) -> set[str]:
    """Return the names that an optimizer updates; without one, those that require a gradient."""
    listed = [parameter for cell in _optimizers(network) for parameter in _listed(cell)]
    found = listed or [parameter for _, parameter in network.parameters_and_names()]
    return {parameter.name for parameter in found if parameter.requires_grad}


def _listed(optimizer: Cell) -> list[Parameter]:
    return list(optimizer.parameters)  # type: ignore[attr-defined]


def _state(network: Cell) -> set[str]:
    names = {
        parameter.name
        for cell in _optimizers(network)
        for _, inner in cell.cells_and_names()
        for _, parameter in inner.parameters_and_names()
    }
    return names - {parameter.name for cell in _optimizers(network) for parameter in _listed(cell)}

"""The training loop: steps, log rows, evaluations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ...utils.messages import count_of
from ..data.dataset import build_loader
from ..data.sampler import EpochSampler
from ..seeding import DROPOUT, derived_seed
from .average import WeightAverage
from .checkpoints import Checkpoints
from .logs import RunLog
from .processes import Processes, without_gradient_sync
from .recipe import Batch, Recipe
from .run_folder import RunFolder
from .schedule import Plan, Schedule
from .settings import EngineSettings


def train(
    recipe: Recipe,
    settings: EngineSettings,
    processes: Processes,
    conditions: Mapping[str, Any],
    on_begin: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Train to the end, or from the last checkpoint to the end; all processes call it.

    Args:
        recipe: The model, the data and the loss.
        settings: How to train, with learning rates.
        processes: The processes of the run.
        conditions: Facts to record with the run: versions and hardware.
        on_begin: Called by the main process once the folder is that of this run, before the first step.

    Returns:
        The rows of the log in the main process, an empty list in the others.

    Raises:
        ValueError: If the output holds another run, or there are fewer images than one step takes.
        RuntimeError: If the loss is not finite.
    """
    folder = RunFolder(settings.output)
    recorded = recorded_settings(settings, recipe.settings, processes)
    processes.on_main(lambda: folder.check(recorded, settings.overwrite))
    run = _Run(recipe, settings, processes, folder)
    try:
        processes.on_main(lambda: folder.begin(recorded, conditions, settings.overwrite))
        if on_begin is not None:
            processes.on_main(on_begin)
        return run.run()
    finally:
        folder.close()


def recorded_settings(settings: EngineSettings, extra: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """Return what must not differ when a run is resumed.

    The number of processes may differ if the images of a step do not.
    """
    return {**settings.recorded(), **extra, "images_per_step": settings.images_per_step(processes.count)}


class _Run:
    """One run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        settings: EngineSettings,
        processes: Processes,
        folder: RunFolder,
    ) -> None:
        self.recipe, self.settings, self.processes, self.folder = recipe, settings, processes, folder
        self.sampler = EpochSampler(
            len(recipe.dataset),  # type: ignore[arg-type]
            settings.batch_size,
            seed=settings.seed,
            num_processes=processes.count,
            process_index=processes.rank,
            groups=recipe.dataset_groups,
        )
        self.plan = self._plan()
        model = recipe.model.to(processes.device).train()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if settings.compile:
            model.compile()
        self.model = processes.wrap(model, settings.fsdp, recipe.has_unused_parameters)
        self.optimizer = torch.optim.AdamW(
            recipe.parameter_groups(), betas=settings.opt_betas, eps=settings.opt_eps, fused=True
        )
        self.schedule = Schedule(settings, self.plan, self.optimizer.param_groups)
        decay = settings.model_ema_decay
        self.average = None if decay is None else WeightAverage(recipe.model, decay)
        self.checkpoints = Checkpoints(folder.checkpoints, settings.keep_checkpoints, processes)
        self.window = _Window()
        self.known_unreadable: set[str] = set()
        self.log: RunLog | None = None  # of the main process

    def _plan(self) -> Plan:
        """Count the steps of the run.

        Raises:
            ValueError: If an epoch has no step.
        """
        settings, count = self.settings, self.processes.count
        steps = self.sampler.steps_per_epoch // settings.gradient_accumulation
        if steps == 0:
            raise ValueError(
                f"there are {count_of(len(self.recipe.dataset), 'image')}, but a step takes "  # type: ignore[arg-type]
                f"{settings.images_per_step(count)} (expected a smaller batch_size or gradient_accumulation, or fewer "
                "processes)"
            )
        scheduled = steps * settings.epochs
        return Plan(steps, settings.epochs, min(scheduled, settings.max_steps or scheduled))

    def run(self) -> list[dict[str, Any]]:
        """Run to the last step."""
        done = self.checkpoints.restore(self.recipe.model, self.optimizer, self.average)
        self.processes.on_main(lambda: self._open_log(done))
        try:
            if done > 0:
                self._note(f"resumed after step {done} of {self.plan.last_step}")
            if done >= self.plan.last_step:
                self._export()  # the process may have been killed between the checkpoint and the model
            for step, batches in self._steps(done):
                self._step(step, batches)
                self._after(step + 1)
        finally:
            if self.log is not None:
                self.log.close()
        return [] if self.log is None else self.log.rows

    def _open_log(self, step: int) -> None:
        tensorboard = self.folder.tensorboard if self.settings.tensorboard else None
        self.log = RunLog(self.folder.log, tensorboard, step, self.plan.last_step)
        self.known_unreadable.update(text for row in self.log.rows for text in row.get("unreadable", []))

    def _steps(self, first: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield each step and its batches, beginning at step `first`."""
        settings, per_epoch = self.settings, self.plan.steps_per_epoch
        loader = build_loader(self.recipe.dataset, self.sampler, self.recipe.collate, settings.num_workers)
        while first < self.plan.last_step:
            epoch, done = divmod(first, per_epoch)
            end = min((epoch + 1) * per_epoch, self.plan.last_step)
            self.sampler.set_position(epoch, done * settings.gradient_accumulation)
            batches = iter(loader)
            for step in range(first, end):
                yield step, [next(batches) for _ in range(settings.gradient_accumulation)]
            first = end

    def _step(self, step: int, batches: list[Batch]) -> None:
        """Compute gradients and change the weights."""
        settings, device = self.settings, self.processes.device
        for part, batch in enumerate(batches):
            # Drop path and dropout are functions of the step, so a resumed run repeats them.
            torch.manual_seed(derived_seed(settings.seed, DROPOUT, step, part, self.processes.rank))
            self.window.unreadable += batch.pop("unreadable")
            batch = _moved(batch, device)
            with (
                without_gradient_sync(self.model, part == len(batches) - 1),
                torch.autocast(device.type, torch.bfloat16, settings.precision == "bfloat16"),
            ):
                loss, numbers = self.recipe.loss(self.model, batch)
                (loss / len(batches)).backward()
            self.window.add({"loss": loss.detach(), **numbers})
        limit = math.inf if settings.clip_grad is None else settings.clip_grad
        norm = nn.utils.clip_grad_norm_(self.recipe.model.parameters(), limit)
        self.window.add({"grad_norm": _whole(norm)})
        self.schedule.apply(self.optimizer, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        self.window.images += settings.batch_size * len(batches) * self.processes.count

    def _after(self, step: int) -> None:
        """Write what is due after a number of steps."""
        settings, per_epoch = self.settings, self.plan.steps_per_epoch
        is_last = step == self.plan.last_step
        is_epoch = step % per_epoch == 0
        saves_epoch = is_epoch and (step // per_epoch) % settings.save_every_epochs == 0
        saves = is_last or saves_epoch or (settings.save_every_steps and step % settings.save_every_steps == 0)
        if self.log is not None:
            self.log.advance()
        # A window ends with a checkpoint, so that the rows of a resumed run are those of an undisturbed one.
        if saves or is_epoch or step % settings.log_every == 0:
            self._log(step)
        if is_epoch or is_last:
            self._evaluate(step)
        if saves:
            self.checkpoints.save(step, self.recipe.model, self.optimizer, self.average)
            self._export()

    def _log(self, step: int) -> None:
        """Write the means since the last row."""
        row = self.window.row(self.processes)
        gathered = dict.fromkeys(self.processes.gather(self.window.unreadable))
        new = [text for text in gathered if text not in self.known_unreadable]
        self.known_unreadable.update(new)
        self.window = _Window()
        if not math.isfinite(row["loss"]):
            raise RuntimeError(
                f"the loss is {row['loss']} before step {step}; the last checkpoint is whole (expected a smaller lr, a "
                "longer warmup, or clip_grad; rerun with --overwrite or another output)"
            )
        for text in new:
            self._note(f"unreadable, skipped: {text}")
        rate = self.schedule.peak * self.schedule.factor(step - 1)
        row = {"step": step, "epoch": step / self.plan.steps_per_epoch, **row, "lr": rate}
        if self.log is not None:
            self.log.add({**row, "unreadable": new} if new else row)

    def _evaluate(self, step: int) -> None:
        """Evaluate the weights, and their averages."""
        numbers = self._evaluated()
        if numbers and self.average is not None:
            with self.average.applied():
                numbers |= {f"ema_{name}": value for name, value in self._evaluated().items()}
        if numbers and self.log is not None:
            self.log.add({"step": step, "epoch": step / self.plan.steps_per_epoch, **numbers})

    def _evaluated(self) -> dict[str, float]:
        self.recipe.model.eval()
        try:
            with torch.no_grad():
                return self.recipe.evaluate()
        finally:
            self.recipe.model.train()

    def _export(self) -> None:
        """Write the model as `from_pretrained` reads it, and the averaged one."""
        self._save(self.folder.model)
        if self.average is not None:
            with self.average.applied():
                self._save(self.folder.average)

    def _save(self, folder: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: dict[str, Any] = get_model_state_dict(self.recipe.model, options=options)
        self.processes.on_main(lambda: self._write(folder, weights))

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        self.recipe.model.save_pretrained(folder, state_dict=weights)
        self.recipe.processor.save_pretrained(folder)

    def _note(self, text: str) -> None:
        if self.log is not None:
            self.log.note(text)


class _Window:
    """Sums since the last row of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.unreadable: list[str] = []
        self.images = 0
        self.started = time.perf_counter()

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add scalars, without waiting for the device."""
        for name, value in numbers.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def row(self, processes: Processes) -> dict[str, float]:
        """Average over the steps and the processes."""
        means = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        values = dict(zip(self.sums, processes.mean(means).tolist(), strict=True))
        return {**values, "images_per_second": self.images / (time.perf_counter() - self.started)}


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _whole(norm: Tensor) -> Tensor:
    full = getattr(norm, "full_tensor", None)  # a DTensor's
    return norm if full is None else full()

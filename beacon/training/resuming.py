"""The half of the trainer that writes checkpoints and goes on from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from beacon.model import BeaconModel
from beacon.saving import load_weights, save_adapter
from beacon.training.checkpoints import (
    STAGING,
    abandon_after,
    check_facts,
    last_checkpoint,
    read_facts,
    written_whole,
)
from beacon.training.lora import has_lora, load_lora, save_lora
from beacon.training.records import EVALUATIONS, drop_after
from beacon.weights import beacon_parameters, is_spread

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Host: TypeAlias = Any
else:
    Host = object  # any Trainer, see the classes that are made of this one


def beacon_model(model: Any) -> Any:
    """The wrapped model itself, also of a PEFT model around it.

    Raises:
        TypeError: There is none.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not isinstance(inner, BeaconModel):
        raise TypeError(f"BeaconTrainer takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")
    return inner


class Resuming(Host):
    """Whole checkpoints of beacons alone, and runs that go on from them; mixed in before a Trainer."""

    control: Any
    model_wrapped: Any
    _output_dir: str | None

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint`` is a folder, or True for the last complete one (anew where there is none).

        Raises:
            FileExistsError: The output folder holds checkpoints of another run and none is resumed.
            FileNotFoundError: No such checkpoint.
            ValueError: The checkpoint is damaged, or was written by another number of processes or batch size.
        """
        output = Path(self.args.output_dir)
        checkpoint = self._chosen(output, resume_from_checkpoint)
        if checkpoint is not None:
            step = int(read_facts(checkpoint)["step"])
            core = beacon_model(self.accelerator.unwrap_model(self.model))
            load_weights(core, checkpoint)  # before the model is sharded: every process has read them whole
            if has_lora(core):
                load_lora(core, checkpoint)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                drop_after(output / EVALUATIONS, step)
                abandon_after(output, step)
            kwargs["resume_from_checkpoint"] = str(checkpoint)
        with self._told_of_memory():
            result = super().train(**kwargs)
        self._check_loss()
        return result

    def _chosen(self, output: Path, wanted: str | Path | bool | None) -> Path | None:
        """The checkpoint to go on from: the first process chooses, and all of them have to be able to."""
        choice: list[Any] = [None, None]
        if self.args.process_index == 0:
            found = last_checkpoint(output)
            choice[0] = found if wanted is True else Path(wanted) if wanted else None
            if not wanted and found is not None:
                choice[1] = FileExistsError(
                    f"{output} holds checkpoints of an earlier run (up to {found.name}); go on from them with --resume "
                    "or name another training.output_dir."
                )
        from accelerate.utils import broadcast_object_list, gather_object

        broadcast_object_list(choice)
        checkpoint, problem = choice
        if checkpoint is not None and problem is None:
            try:
                check_facts(checkpoint, self._run_facts())
            except (OSError, ValueError) as err:
                problem = err
        problems = [found for found in gather_object([problem]) if found is not None]
        if problems:
            raise problems[0]
        if wanted and checkpoint is None:
            logger.warning("there is no checkpoint in %s: training begins anew", output)
        return checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (with LoRA layers, if any) and the tokenizer; sharded weights are gathered one by one."""
        self._check_loss()
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        core = beacon_model(self.accelerator.unwrap_model(self.model_wrapped))
        if self.args.should_save or any(map(is_spread, beacon_parameters(core).values())):
            save_adapter(core, folder, None if _internal_call else self._saved_dtype)
        if has_lora(core):
            save_lora(core, folder, writes=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _run_facts(self) -> dict[str, Any]:
        names = [
            *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "learning_rate"),
            *("train_sampling_strategy", "optim", "lr_scheduler_type", "weight_decay", "dataloader_num_workers"),
        ]
        mine = {name: getattr(self.args, name) for name in names}
        mine = {name: getattr(value, "value", value) for name, value in mine.items()}
        return {"processes": self.args.world_size, **mine, **self._facts}

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._output_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """The Trainer's, into a folder aside that is renamed when it is complete."""
        self._check_loss()
        self._drain_tokens()
        output, step = Path(super()._get_output_dir(trial)), self.state.global_step
        wait, writes = self.accelerator.wait_for_everyone, self.args.should_save
        several = self.args.world_size > 1 and not self.args.save_only_model
        parts = [f"rng_state_{process}.pth" for process in range(self.args.world_size)] if several else []
        whole = written_whole(output, step, self._run_facts(), writes=writes, wait=wait, parts=parts)
        with self.meter.paused(), whole as staging:
            self._output_dir = str(staging)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._output_dir = None
            best = self.state.best_model_checkpoint
            if best is not None and STAGING in best:
                self.state.best_model_checkpoint = str(output / Path(best).name)
                if writes:
                    self.state.save_to_json(str(staging / f"checkpoint-{step}" / "trainer_state.json"))
        if writes:
            self._rotate(output)

    def _rotate(self, output: Path) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        rotate_checkpoints(
            output_dir=str(output),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP the optimizer's shards alone: the frozen base is in no checkpoint."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's; then the learning rate that the schedule gives now, for ``max_steps`` may have changed."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if checkpoint is not None and isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            rates = [
                base * factor(schedule.last_epoch)
                for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def _load_best_model(self) -> None:
        """Take the best checkpoint's adapter."""
        best = Path(str(self.state.best_model_checkpoint))
        core = beacon_model(self.accelerator.unwrap_model(self.model))
        load_weights(core, best)
        if has_lora(core):
            load_lora(core, best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: :meth:`train` has read the weights."""

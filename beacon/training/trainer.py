"""Transformers' Trainer for wrapped models: ratios per batch, additional losses, whole checkpoints, honest progress."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from transformers import Trainer

from beacon.config import BeaconConfig
from beacon.model import BeaconModel
from beacon.reading import checkpoints
from beacon.saving import load_weights, save_adapter
from beacon.training.arguments import adapted, beacons_count
from beacon.training.batches import Stream, counted, document_lengths
from beacon.training.checkpoints import STAGING, check_facts, last_checkpoint, written_whole
from beacon.training.collator import BeaconCollator
from beacon.training.evaluation import LongContextEvaluation
from beacon.training.flops import ModelShape, StepFlops, peak_flops
from beacon.training.lora import has_lora, load_lora, save_lora
from beacon.training.objectives import (
    ObjectiveConfig,
    add_reconstruction,
    divergence,
    separator_token,
    stock_logits,
    taught_columns,
)
from beacon.training.plots import draw
from beacon.training.progress import Meter, ProgressBar, peak_memory_gb
from beacon.training.ratios import Draw, RatioConfig, RatioSampler, check_drawn
from beacon.training.records import EVALUATIONS, append_record, drop_after
from beacon.weights import beacon_parameters, is_spread

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "out of memory in step {step} with documents of {lengths} tokens on one process; lower data.max_length or "
    "training.per_device_train_batch_size (raise training.gradient_accumulation_steps for it), set "
    "training.gradient_checkpointing: true, training.optim: adamw_bnb_8bit, model.quantization: 4bit or "
    "model.beacon_dtype: bfloat16, or spread the model with FSDP2"
)


if TYPE_CHECKING:
    Host: TypeAlias = Any
else:
    Host = object  # any Trainer, see the classes that are made of this one


class BeaconTraining(Host):
    """What training a wrapped model asks of a Trainer; mixed in before one (:class:`BeaconTrainer`, TRL's likewise).

    Args:
        model: A wrapped model, or a PEFT model around one.
        args: ``TrainingArguments``; a copy is adapted (columns are kept, checkpointing is not reentrant, ...).
        ratios: A :class:`RatioConfig`, or a function from :class:`Draw` to one ratio per window; None for the defaults.
        objective: Additional losses; None for none.
        evaluation: Long-context evaluation, at every evaluation of the Trainer's; None for none.
        peak_tflops: Peak of one device in TFLOP/s, for HFU and MFU; None takes that of known GPUs.
        saved_dtype: Of the adapter that :meth:`save_model` writes; None keeps the parameters'. Checkpoints always do.
        facts: What a run resumed from this one's checkpoints has to agree with, beside processes and batch sizes.
        **kwargs: The Trainer's.

    Raises:
        TypeError: The model is not wrapped.
        ValueError: Reentrant checkpointing, several GPUs in one process, ratios that do not divide the stride, beacons
            of another dtype than the base without mixed precision.
    """

    control: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        ratios: RatioConfig | RatioSampler | None = None,
        objective: ObjectiveConfig | None = None,
        evaluation: LongContextEvaluation | None = None,
        peak_tflops: float | None = None,
        saved_dtype: torch.dtype | None = None,
        facts: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        core = beacon_model(model)
        self.ratios = RatioConfig() if ratios is None else ratios
        if isinstance(self.ratios, RatioConfig):
            self.ratios.check(core.beacon_config)
        self.objective = ObjectiveConfig() if objective is None else objective
        self.long_context = evaluation
        if evaluation is not None:
            evaluation.check(core.beacon_config)
            if kwargs.get("eval_dataset") is None:
                kwargs["eval_dataset"] = []  # evaluates all the same
        self._facts, self._saved_dtype = dict(facts or {}), saved_dtype
        self.meter = Meter()
        self._shape = ModelShape.of(core)
        self._number, self._step, self._within = 0, -1, 0
        self._pending: tuple[int, list[str], torch.Tensor] | None = None
        self._output_dir: str | None = None
        dataset = kwargs.get("train_dataset")
        if hasattr(dataset, "n_shards"):
            kwargs["train_dataset"] = dataset = Stream(dataset)
        with beacons_count(core):
            super().__init__(model=model, args=adapted(args, core, dataset), **kwargs)
        name = torch.cuda.get_device_name(self.args.device) if self.args.device.type == "cuda" else ""
        self._peak = peak_tflops * 1e12 if peak_tflops else peak_flops(name)
        self.model_accepts_loss_kwargs = True
        if not self.args.disable_tqdm:
            _show_bar(self)

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over one batch; stops at a loss that is no number.

        Raises:
            FloatingPointError: NaN or inf; names the step and the batch.
            MemoryError: The device is full; names settings to change.
        """
        self._check_loss()
        self._count_batch()
        self.meter.start()
        origins = list(inputs.get("origins", ()))
        try:
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError as err:
            if self.args.auto_find_batch_size:
                raise
            lengths = inputs.get("lengths") or document_lengths(inputs)
            raise MemoryError(OUT_OF_MEMORY.format(step=self.state.global_step + 1, lengths=lengths)) from err
        self._pending = self.state.global_step + 1, origins, loss
        if loss.device.type == "cpu":
            self._check_loss()  # on a GPU the next step asks, for which the device need not stop
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean next-token loss and what the objective adds, at ratios drawn for this batch."""
        inputs = {name: value for name, value in inputs.items() if name != "origins"}
        lengths = inputs.pop("lengths", None) or document_lengths(inputs)
        core = beacon_model(self.accelerator.unwrap_model(model))
        config: BeaconConfig = core.beacon_config
        draw = Draw(
            self._number if core.training else 0,
            max(0, (max(lengths) - config.window) // config.step + 1),
            self.state.global_step / max(1, self.state.max_steps),
            config,
        )
        ratios = inputs.pop("ratios", None) or check_drawn(self.ratios(draw), draw)
        if core.training:
            checkpointing = checkpoints(core)
            flops = StepFlops.of(self._shape, config, lengths, ratios, checkpointing=checkpointing)
            self.meter.add(sum(lengths), flops.model, flops.hardware)
        loss, outputs = self._losses(model, core, inputs, lengths, ratios, num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # parallel engines take the mean over processes
        return (loss, outputs) if return_outputs else loss

    def _losses(
        self, model: Any, core: Any, inputs: dict[str, Any], lengths: list[int], ratios: list[int], items: Any
    ) -> tuple[torch.Tensor, Any]:
        objective, rows = self.objective, len(inputs["input_ids"])
        extra = core.training and (objective.distillation or objective.reconstruction)
        if extra and "attention_mask" not in inputs:
            raise NotImplementedError(
                "distillation and reconstruction need a row per document, got packed ones; set data.packing: false."
            )
        if extra and items is None:
            items = counted(inputs).sum()
        batch = inputs
        if extra and objective.reconstruction:
            rng = random.Random(f"reconstruction-{objective.seed}-{self._number}")
            separator = separator_token(core)
            batch = add_reconstruction(inputs, lengths, core.beacon_config, separator, objective.reconstruction, rng)
            windows = core.beacon_config.window * 2
            ratios = ratios if windows <= max(lengths) else [*ratios, ratios[-1] if ratios else 0]
        columns = None
        if extra and objective.distillation:
            native = core.beacon_wrapping.native_context
            columns = taught_columns(core.beacon_config, native, inputs["input_ids"].shape[1])
        outputs = model(
            **batch,
            ratios=ratios,
            num_items_in_batch=items,
            use_cache=False,
            **({} if columns is None else {"logits_to_keep": columns}),
        )
        loss = outputs["loss"]
        if columns is not None:
            teacher = stock_logits(core, inputs, columns)
            counting = F.pad(counted(inputs), (0, 1))[:, columns.to(inputs["input_ids"].device)]
            student = outputs["logits"][:rows]
            extra_loss = divergence(
                student.flatten(0, 1), teacher.flatten(0, 1), counting.flatten(), objective.temperature
            )
            loss = loss + objective.distillation * extra_loss / items
        return loss, outputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Counted labels (or their weights) of all batches of a step, over all processes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        total = torch.stack([counted(batch).sum() for batch in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total.reshape(1)).sum()
        return torch.where(total > 0, total, torch.ones_like(total))

    def _count_batch(self) -> None:
        """Number this batch over all processes and accumulated batches, as a run on one process would."""
        step = self.state.global_step
        self._within = self._within + 1 if step == self._step else 0
        self._step = step
        batch = step * self.args.gradient_accumulation_steps + self._within
        spread = not (isinstance(self.ratios, RatioConfig) and self.ratios.same_on_all_ranks)
        self._number = batch * self.args.world_size + self.args.process_index if spread else batch

    def _check_loss(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None or bool(pending[2].isfinite()):
            return
        step, origins, loss = pending
        batch = f" (batch of {', '.join(origins[:4])}{' ...' if len(origins) > 4 else ''})" if origins else ""
        kept = last_checkpoint(Path(self.args.output_dir))
        raise FloatingPointError(
            f"the loss must be a number, got {loss.item()} in step {step}{batch}; "
            f"{f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'}. Lower "
            "training.learning_rate or training.max_grad_norm, or look at that batch."
        )

    # -- reports -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Report; a training report gets speed, utilisation and peak memory."""
        if "loss" in logs and self.is_in_train:
            logs.update(self._speed())
        super().log(logs, *args, **kwargs)

    def _speed(self) -> dict[str, float]:
        """Of all processes since the last report.

        HFU and MFU are :class:`StepFlops`'s ``hardware`` and ``model`` over seconds, processes and a device's peak.
        """
        tokens, model_flops, hardware_flops, seconds = self.meter.read()
        peak = peak_memory_gb(self.args.device)
        mine = torch.tensor([[tokens, model_flops / 1e12, hardware_flops / 1e12, seconds, peak]], dtype=torch.float32)
        every = self.accelerator.gather(mine.to(self.args.device)).cpu().double()
        totals, seconds = every.sum(0).tolist(), every[:, 3].max().item()
        self.state.num_input_tokens_seen += int(totals[0])
        report = {"tokens": self.state.num_input_tokens_seen, "peak_memory_gb": every[:, 4].max().item()}
        if seconds > 0:
            report["tokens_per_second"] = totals[0] / seconds
            report["tflops_per_second"] = totals[2] / seconds
            if self._peak is not None:
                whole = self._peak / 1e12 * seconds * len(every)
                report |= {"hfu": totals[2] / whole, "mfu": totals[1] / whole}
        return report

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The Trainer's evaluation, then perplexity by length and passkey recall, recorded and drawn."""
        metrics: dict[str, float] = {}
        with self.meter.paused():
            given = self.eval_dataset if eval_dataset is None else eval_dataset
            if self.long_context is None or not isinstance(given, list) or given:
                metrics |= super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if self.long_context is not None and eval_dataset is None:
                scores = self.long_context(self.model_wrapped)
                named = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
                self.log(dict(named))
                metrics |= named
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
                if self.is_world_process_zero():
                    self._record(scores)
        return metrics

    def _record(self, scores: dict[str, float]) -> None:
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        append_record(folder / EVALUATIONS, self.state.global_step, self.state.num_input_tokens_seen, scores)
        draw(folder, self.state.log_history)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint`` is a folder, or True for the last complete one (anew where there is none).

        Raises:
            FileExistsError: The output folder holds checkpoints of another run and none is resumed.
            FileNotFoundError: No such checkpoint.
            ValueError: The checkpoint is damaged, or was written by another number of processes or batch size.
        """
        output = Path(self.args.output_dir)
        found = last_checkpoint(output)
        checkpoint = found if resume_from_checkpoint is True else resume_from_checkpoint or None
        if not resume_from_checkpoint and found is not None:
            raise FileExistsError(
                f"{output} holds checkpoints of an earlier run (up to {found.name}); go on from them with --resume, or "
                "name another training.output_dir."
            )
        if checkpoint is None:
            if resume_from_checkpoint:
                logger.warning("there is no checkpoint in %s: training begins anew", output)
            return super().train(**kwargs)
        checkpoint = Path(checkpoint)
        check_facts(checkpoint, self._run_facts())
        core = beacon_model(self.accelerator.unwrap_model(self.model))
        load_weights(core, checkpoint)  # before the model is sharded: every process has read them whole
        if has_lora(core):
            load_lora(core, checkpoint)
        if self.is_world_process_zero():
            drop_after(output / EVALUATIONS, int(checkpoint.name.rpartition("-")[2]))
        return super().train(resume_from_checkpoint=str(checkpoint), **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (with LoRA layers, if any) and the tokenizer; sharded weights are gathered one by one."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        core = beacon_model(self.accelerator.unwrap_model(self.model_wrapped))
        if self.args.should_save or any(map(is_spread, beacon_parameters(core).values())):
            save_adapter(core, folder, None if _internal_call else self._saved_dtype)
        if has_lora(core):
            save_lora(core, folder, writes=self.args.should_save)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _run_facts(self) -> dict[str, Any]:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed")
        mine = {name: getattr(self.args, name) for name in names}
        return {"processes": self.args.world_size, **mine, **self._facts}

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._output_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """The Trainer's, into a folder aside that is renamed when it is complete."""
        self._check_loss()
        output, step = Path(super()._get_output_dir(trial)), self.state.global_step
        wait, writes = self.accelerator.wait_for_everyone, self.args.should_save
        with self.meter.paused(), written_whole(output, step, self._run_facts(), writes=writes, wait=wait) as staging:
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

    def _load_best_model(self) -> None:
        """Take the best checkpoint's adapter; sharded weights stay as they are, and the log names the folder."""
        best = Path(str(self.state.best_model_checkpoint))
        core = beacon_model(self.accelerator.unwrap_model(self.model))
        if any(map(is_spread, beacon_parameters(core).values())):
            logger.warning("sharded weights stay those of the last step; the best adapter is %s", best)
            return
        load_weights(core, best)
        if has_lora(core):
            load_lora(core, best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: :meth:`train` has read the weights."""


class BeaconTrainer(BeaconTraining, Trainer):
    """Transformers' Trainer for a wrapped model; arguments as for :class:`BeaconTraining`.

    The collator is a :class:`BeaconCollator` unless another is given.
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = BeaconCollator(kwargs.get("processing_class"))
        super().__init__(model, args, **kwargs)


def beacon_model(model: Any) -> Any:
    """The wrapped model itself, also of a PEFT model around it.

    Raises:
        TypeError: There is none.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not isinstance(inner, BeaconModel):
        raise TypeError(f"BeaconTrainer takes a wrapped model, got {type(model).__name__}; call beacon.wrap first.")
    return inner


def _show_bar(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar())

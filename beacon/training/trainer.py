"""Transformers' Trainer for wrapped models: ratios per batch, additional losses, whole checkpoints, honest progress."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer

from beacon import loss as loss_module
from beacon.config import BeaconConfig
from beacon.reading import checkpoints
from beacon.training.arguments import adapted, beacons_count
from beacon.training.batches import LengthGrouped, Stream, counted, document_lengths, in_turn
from beacon.training.checkpoints import (
    last_checkpoint,
)
from beacon.training.collator import BeaconCollator
from beacon.training.evaluation import LongContextEvaluation
from beacon.training.flops import ModelShape, StepFlops, peak_flops
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
from beacon.training.records import EVALUATIONS, append_record
from beacon.training.resuming import Resuming, beacon_model

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "out of memory in step {step} with documents of {lengths} tokens on one process; lower data.max_length or "
    "training.per_device_train_batch_size (raise training.gradient_accumulation_steps for it), set "
    "training.gradient_checkpointing: true, training.optim: adamw_bnb_8bit, model.quantization: 4bit or "
    "model.beacon_dtype: bfloat16, or spread the model with FSDP2"
)


# Of our collator, of Liger-Kernel, of collators that pack for flash-attn (position ids tell us the same).
OTHERS = ("origins", "skip_logits", "cu_seq_lens_", "max_length_", "seq_idx")


class BeaconTraining(Resuming):
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
        self._unreported = 0
        self._output_dir = None
        dataset = kwargs.get("train_dataset")
        if hasattr(dataset, "n_shards"):
            kwargs["train_dataset"] = dataset = Stream(dataset)
        for name in ("compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(
                    f"{name} is not called: the loss is the model's own and logits are not kept; use `evaluation`, or "
                    "override compute_loss."
                )
        with beacons_count(core):
            super().__init__(model=model, args=adapted(args, core, dataset), **kwargs)
        if self._spreads and core.beacon_config.segment is not None:
            raise NotImplementedError(
                "processes that share a model must make as many passes, which beacon.segment leaves to the length of "
                "their texts; leave it out under FSDP and ZeRO-3."
            )
        name = torch.cuda.get_device_name(self.args.device) if self.args.device.type == "cuda" else ""
        self._peak = peak_tflops * 1e12 if peak_tflops else peak_flops(name)
        self.model_accepts_loss_kwargs = True
        if not self.args.disable_tqdm:
            _show_bar(self)

    @property
    def _spreads(self) -> bool:
        """Whether processes hold the model together, so that each needs all others for a pass."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        head = beacon_model(self.accelerator.unwrap_model(self.model)).lm_head
        if hasattr(head, "set_reshard_after_backward"):  # else FSDP2 gathers it anew for every chunk of the loss
            head.set_reshard_after_backward(False, recurse=False)
        return prepared

    def _in_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments that make processes which hold a model together call its parts equally often."""
        if not self._spreads:
            return {}
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        chunks = torch.tensor([-(-tokens // loss_module.CHUNK)], device=self.args.device)
        torch.distributed.all_reduce(chunks, torch.distributed.ReduceOp.MAX)
        return {"one_pass": True, "chunks": int(chunks)}

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        columns = getattr(dataset, "column_names", None) or ()
        if self.args.train_sampling_strategy != "group_by_length" or self.args.length_column_name not in columns:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = [int(length) for length in dataset[self.args.length_column_name]]
        return LengthGrouped(lengths, together, seed, lambda: int((self.state.epoch or 0.0) + 1e-6))

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over one batch; stops at a loss that is no number.

        Raises:
            FloatingPointError: NaN or inf; names the step and the batch.
        """
        self._check_loss()
        self._count_batch()
        self.meter.start()
        origins = list(inputs.get("origins", ()))
        self._lengths = list(inputs.get("lengths", ()))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._pending = self.state.global_step + 1, origins, loss
        if loss.device.type == "cpu":
            self._check_loss()  # on a GPU the next step asks, which waits for the device anyway
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean next-token loss and what the objective adds, at ratios drawn for this batch."""
        inputs = {name: value for name, value in inputs.items() if not name.startswith(OTHERS)}
        lengths = inputs.pop("lengths", None) or document_lengths(inputs)
        core = beacon_model(self.accelerator.unwrap_model(model))
        config: BeaconConfig = core.beacon_config
        draw = Draw(
            self._number if core.training else 0,
            max(0, (max(lengths) - config.window) // config.step + 1),
            self.state.global_step / max(1, self.state.max_steps) if core.training else 1.0,
            config,
        )
        ratios = inputs.pop("ratios", None) or check_drawn(self.ratios(draw), draw)
        if core.training:
            flops = StepFlops.of(self._shape, config, lengths, ratios, checkpointing=self._recomputes(core))
            self.meter.add(sum(lengths), flops.model, flops.hardware)
            self._unreported += sum(lengths)
        loss, outputs = self._losses(model, core, inputs, lengths, ratios, num_items_in_batch)
        if core.training and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # parallel engines take the mean over processes
        return (loss, outputs) if return_outputs else loss

    def _recomputes(self, core: Any) -> bool:
        """Whether layers are checkpointed, by transformers or by FSDP."""
        return checkpoints(core) or bool(
            self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing
        )

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
            **self._in_step(batch),
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
            f"{f'the last good checkpoint is {kept}' if kept else 'there is no checkpoint yet'}. Look at that batch or "
            f"begin a new run{' from its weights (model.adapter)' if kept else ''} with a lower training.learning_rate."
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
        self._drain_tokens()
        report = {"tokens": self.state.num_input_tokens_seen, "peak_memory_gb": every[:, 4].max().item()}
        if seconds > 0:
            report["tokens_per_second"] = totals[0] / seconds
            report["tflops_per_second"] = totals[2] / seconds
            if self._peak is not None:
                whole = self._peak / 1e12 * seconds * len(every)
                report |= {"hfu": totals[2] / whole, "mfu": totals[1] / whole}
        return report

    def _drain_tokens(self) -> None:
        """Add the tokens read since the last time, by all processes, to the state that checkpoints hold."""
        mine = torch.tensor([self._unreported], dtype=torch.int64, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(mine).sum())
        self._unreported = 0

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss over held-out texts, then perplexity by length and passkey recall, recorded and drawn.

        The loss is the mean over all counted labels of all texts, at ratios of one fixed draw, however many processes
        and texts per batch there are.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        named = dataset if isinstance(dataset, dict) else {"": dataset}
        metrics: dict[str, float] = {}
        model = self._prepared()
        with self.meter.paused(), self._told_of_memory():
            try:
                for name, texts in named.items():
                    prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                    if texts is not None and not (isinstance(texts, list) and not texts):
                        metrics |= {f"{prefix}_{key}": value for key, value in self._held_out(model, texts).items()}
                if self.long_context is not None and eval_dataset is None:
                    scores = self.long_context(model)
                    metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
                    if self.is_world_process_zero():
                        self._record(scores)
            finally:
                for module in model.modules():  # as after a training step: the optimizer knows the parts, not the whole
                    if hasattr(module, "reshard"):
                        module.reshard()
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _prepared(self) -> Any:
        """The model as engines run it, also before any training."""
        if self.model_wrapped is self.model and not self.is_in_train and not self.is_fsdp_enabled:
            self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return self.model_wrapped

    def _held_out(self, model: Any, dataset: Any) -> dict[str, float]:
        """Mean loss and counted labels of a data set."""
        total = torch.zeros(2, dtype=torch.float64)
        began, training = time.perf_counter(), model.training
        model.eval()
        try:
            turns = in_turn(
                dataset, self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
            )
            for examples, fresh in turns:
                inputs = self._prepare_inputs(self.data_collator(examples))
                one = torch.ones((), device=self.args.device)
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss = self.compute_loss(model, inputs, num_items_in_batch=one)
                if fresh:
                    total += torch.tensor([loss.item(), counted(inputs).sum().item()], dtype=torch.float64)
        finally:
            model.train(training)
        total = self.accelerator.gather(total.float().to(self.args.device)[None]).double().sum(0).cpu()
        loss = (total[0] / total[1]).item() if total[1] else float("nan")
        return {"loss": loss, "labels": total[1].item(), "runtime": time.perf_counter() - began}

    @contextmanager
    def _told_of_memory(self) -> Iterator[None]:
        """Say what to change when a device is full."""
        try:
            yield
        except torch.OutOfMemoryError as err:
            if self.args.auto_find_batch_size:
                raise
            step, lengths = self.state.global_step + 1, getattr(self, "_lengths", [])
            raise MemoryError(OUT_OF_MEMORY.format(step=step, lengths=lengths)) from err

    def _record(self, scores: dict[str, float]) -> None:
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        append_record(folder / EVALUATIONS, self.state.global_step, self.state.num_input_tokens_seen, scores)
        draw(folder, self.state.log_history)


class BeaconTrainer(BeaconTraining, Trainer):
    """Transformers' Trainer for a wrapped model; arguments as for :class:`BeaconTraining`.

    The collator is a :class:`BeaconCollator` unless another is given.
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = BeaconCollator(kwargs.get("processing_class"))
        super().__init__(model, args, **kwargs)


def _show_bar(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressBar())

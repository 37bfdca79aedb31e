"""What a wrapped model asks of ``TrainingArguments`` and of the Trainer's own checks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from beacon.training.lora import has_lora
from beacon.weights import beacon_parameters


@contextmanager
def beacons_count(core: Any) -> Iterator[None]:
    """Let a quantised base pass the Trainer's check that something beside it is trained: beacons are, PEFT or not."""
    if not getattr(core, "is_quantized", False) or has_lora(core):
        yield
        return
    core._hf_peft_config_loaded = True
    try:
        yield
    finally:
        core._hf_peft_config_loaded = False


def adapted(args: Any, core: Any, dataset: Any) -> Any:
    """A copy of the arguments with what a wrapped model needs."""
    from transformers import TrainingArguments

    args = TrainingArguments() if args is None else copy.copy(args)
    for name in ("activation_checkpointing", "gradient_checkpointing"):  # its new and its old name
        if getattr(args, name, False):
            options = dict(getattr(args, f"{name}_kwargs", None) or {})
            if options.get("use_reentrant", False):
                raise ValueError(
                    f"{name}_kwargs must have use_reentrant=False, got True, which loses gradients into memory; leave "
                    "it out."
                )
            setattr(args, f"{name}_kwargs", {**options, "use_reentrant": False})
    if args.n_gpu > 1:
        raise ValueError(
            f"one process trains on one GPU, got {args.n_gpu} GPUs in one process; start one per GPU with "
            f"`torchrun --nproc-per-node {args.n_gpu} -m beacon.training ...` (or `accelerate launch`), or choose one "
            "with CUDA_VISIBLE_DEVICES=0."
        )
    for name, why in (
        ("label_smoothing_factor", "the loss is the model's own"),
        ("torch_compile", "a wrapped model's plans change with every text"),
        ("bf16_full_eval", "it would round the master weights"),
        ("fp16_full_eval", "it would round the master weights"),
    ):
        if getattr(args, name, False):
            raise NotImplementedError(f"training.{name} is not supported ({why}); leave it out.")
    if args.load_best_model_at_end and (args.fsdp or args.deepspeed):
        raise NotImplementedError(
            "load_best_model_at_end is not supported where the model is sharded; take the best checkpoint's folder, "
            "which trainer_state.json names."
        )
    dtypes = {p.dtype for p in beacon_parameters(core).values()} | {core.model.embed_tokens.weight.dtype}
    if len(dtypes) > 1 and not (args.bf16 or args.fp16):
        raise ValueError(
            f"beacons of another dtype than the base need mixed precision, got {sorted(map(str, dtypes))}; set "
            "training.bf16: true, or model.beacon_dtype to the base's."
        )
    if getattr(args, "use_liger_kernel", False):  # its norms and MLPs; the head's loss and rotations are ours
        own = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy"), False)
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), **own}
    args.remove_unused_columns = False  # ratios, weights, origins
    args.include_num_input_tokens_seen = "no"  # counted by ourselves
    args.logging_nan_inf_filter = False  # it would hide what stops a run, and wait for every loss
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every beacon parameter has a gradient in every step
    if isinstance(dataset, torch.utils.data.IterableDataset) and args.accelerator_config.dispatch_batches is None:
        args.accelerator_config = copy.copy(args.accelerator_config)
        args.accelerator_config.dispatch_batches = False  # batches of several lengths cannot be joined and sent out
    return args

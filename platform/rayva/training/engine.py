"""The DeepSpeed engine behind a small interface: forward, backward, step, save, load, gather."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayva.errors import TrainingError
from rayva.model.batch import Batch
from rayva.model.compiling import compile_layers
from rayva.model.vlm import VisionLanguageModel
from rayva.recipes.schema import Stage
from rayva.training.universal import converted

PATIENCE = timedelta(hours=1)
"""How long ranks wait for one that writes the model or converts a checkpoint: more than NCCL's 10 minutes."""
_TAG = "engine"
"""Folder of DeepSpeed's own files inside a checkpoint."""


def init_distributed(device: torch.device) -> None:
    """Joins the process group that torchrun or Ray Train describes, or makes one of this process alone.

    DeepSpeed's choice of accelerator is made on its import, so this comes before any.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Before the group is joined: defaults of DeepSpeed's functions would keep it alive for ever.
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=PATIENCE)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            store = dist.HashStore()  # type: ignore[attr-defined]  # its stub is not exported
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    # DeepSpeed calls torch by names that are about to change; users can do nothing about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    deepspeed_logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce (about a minute of g++) that only its
        # tensor-parallel inference calls. An op that is not listed as compatible is left out; gloo does
        # all collectives of training either way. (Reading the list would run the compiler for each op.)
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def leave_distributed() -> None:
    """Waits for all ranks and leaves the process group; a process that `init_distributed` put in one ends so.

    A thread of gloo that still lets go of a tensor while Python ends would abort the process.
    """
    import deepspeed.comm

    dist.barrier()
    deepspeed.comm.destroy_process_group()


class Engine:
    """A model under DeepSpeed: ZeRO, mixed precision and the optimizer.

    Learning rates are set from outside at each step; loss scaling by sample or token counts is the
    caller's: gradients are summed over micro-batches and ranks, never averaged.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        stage: Stage,
        micro_batches: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        import deepspeed

        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.device = device
        # In bf16, DeepSpeed's optimizer of stage 0 takes a step of its own on start, which shifts Adam's
        # bias correction; that of stage 2, which computes the same, does not.
        self.zero = 2 if stage.zero == 0 and dtype == torch.bfloat16 else stage.zero
        self._max_grad_norm = stage.max_grad_norm
        # Without ZeRO DeepSpeed clips but does not tell the norm.
        self._clips_itself = self.zero == 0
        if stage.gradient_checkpointing:
            model.language.gradient_checkpointing_enable({"use_reentrant": False})
            if model.last_mlp:
                model.last_mlp.keep_activations()
        if stage.compile:
            compile_layers(model.language)
        model.train()
        groups = _parameter_groups(model, stage)
        self._base_lrs = [float(group["lr"]) for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=stage.betas, eps=stage.eps, fused=not stage.offload)
        config = _config(stage, self.zero, micro_batches, dtype, device)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(dtype), optimizer=optimizer, config=config
        )
        # It would copy a script into every checkpoint, past the writer that keeps errors of the disk.
        self._engine._copy_recovery_script = lambda save_path: None

    @property
    def model(self) -> VisionLanguageModel:
        """The model itself; under ZeRO 3 its parameters are partitioned."""
        module: VisionLanguageModel = self._engine.module
        return module

    def modules_without_others(self) -> list[nn.Module]:
        """Parts of the model, none inside another, in whose forward passes this rank waits for no other.

        The whole model; under ZeRO 3, whose ranks meet before every module with parameters, these modules.
        """
        if self.zero < 3:
            return [self.model]
        return [module for module in self.model.modules() if next(module.children(), None) is None]

    def loss_sum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`VisionLanguageModel.loss_sum` under the engine's hooks."""
        result: tuple[Tensor, Tensor] = self._engine(batch.to(self.device))
        return result

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to those of all micro-batches and ranks of this step."""
        # DeepSpeed averages over ranks; the factor turns that into a sum.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def accumulate(self) -> None:
        """To be called after the backward pass of every micro-batch of a step but the last."""
        self._engine.step()

    def update(self, lr_factor: float) -> float:
        """To be called after the last backward pass of a step: clips, updates, returns the grad norm."""
        for group, base in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * lr_factor
        if self._clips_itself:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            norm = nn.utils.clip_grad_norm_(trained, self._max_grad_norm)
            self._engine.step()
            return float(norm)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def reduce_sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks; the same numbers on every rank."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        summed: list[float] = tensor.tolist()
        return summed

    def save(self, folder: Path) -> OSError | None:
        """Writes this rank's part of weights and optimizer state; frozen weights are left out.

        Returns what kept a file from being written, instead of raising it: the ranks meet in between.
        """
        writer = _Writer(self._engine.checkpoint_engine)
        self._engine.checkpoint_engine = writer
        # DeepSpeed leaves out frozen parameters too, but not the second name of a tied one.
        hook = self._engine.module.register_state_dict_post_hook(_remove_frozen)
        try:
            self._engine.save_checkpoint(
                str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
            )
        finally:
            hook.remove()
            self._engine.checkpoint_engine = writer.inner
        return writer.error

    def load(self, folder: Path, saved_by: int) -> None:
        """Loads what `save` wrote on `saved_by` ranks; ZeRO's states are converted where that differs.

        It unpickles: `folder` must have been verified before.
        """
        # A universal checkpoint gives the settings of the first group to all.
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups]
        if self.zero and saved_by != self.world_size:
            with converted(folder, _TAG) as universal:
                self._engine._config.load_universal_checkpoint = True
                self._load(universal)
                self._engine._config.load_universal_checkpoint = False
            # It also gives one step counter to all, which each of them would then advance.
            for state in self._optimizer.state.values():
                state["step"] = torch.as_tensor(state["step"]).clone()
        else:
            self._load(folder)
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own)

    def _load(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if loaded is None:
            raise TrainingError(
                f"DeepSpeed finds no state in the checkpoint {folder}",
                "Delete this checkpoint; training then goes on from the one before.",
            )

    def gather(self, module: nn.Module) -> dict[str, Tensor] | None:
        """The whole state of a part of the model, on the CPU: on rank 0; None on the others.

        Every rank has to call it. Tied parameters share one tensor.
        """
        import deepspeed

        gathered: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            parts = [tensor] if self.zero == 3 and isinstance(tensor, nn.Parameter) else []
            with deepspeed.zero.GatheredParameters(parts, enabled=bool(parts)):
                if self.rank == 0:
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().cpu().clone()
                    gathered[name] = copies[id(tensor)]
        return gathered if self.rank == 0 else None

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model."""
        self._engine.destroy()


class _Writer:
    """DeepSpeed's writer of files, which keeps an error of the disk instead of raising it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            with open(path, "wb") as raw:
                torch.save(state_dict, _Tee(raw, self))  # type: ignore[arg-type]  # write and flush will do
        except OSError as error:
            self.error = error
        except RuntimeError:
            if self.error is None:
                raise

    def note(self, error: OSError) -> None:
        """Keeps what torch turns into a RuntimeError without its reason."""
        self.error = error


class _Tee:
    """A file whose errors are told to a `_Writer` too."""

    def __init__(self, file: IO[bytes], writer: _Writer) -> None:
        self._file, self._writer = file, writer

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._writer.note(error)
            raise

    def flush(self) -> None:
        self._file.flush()


def _remove_frozen(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def _parameter_groups(model: VisionLanguageModel, stage: Stage) -> list[dict[str, Any]]:
    """Projector, language model and, on request, embeddings have their learning rates; vectors no decay."""
    rates = {"projector": stage.projector_lr or stage.lr, "language": stage.lr}
    embeddings: set[int] = set()
    if stage.embedding_lr is not None:
        rates["embedding"] = stage.embedding_lr
        ends = (model.language.get_input_embeddings(), model.language.get_output_embeddings())
        embeddings = {id(parameter) for module in ends for parameter in module.parameters()}
    grouped: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "embedding" if id(parameter) in embeddings else name.split(".")[0]
            decay = stage.weight_decay if parameter.ndim >= 2 else 0.0
            grouped.setdefault((part, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": decay}
        for (part, decay), parameters in grouped.items()
    ]


def _config(
    stage: Stage, zero: int, micro_batches: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    # Copies every gradient, which saves a GPU's memory from fragments; a CPU only pays for it.
    contiguous = device.type == "cuda"
    zero_config: dict[str, Any] = {"stage": zero, "contiguous_gradients": contiguous, "overlap_comm": False}
    if stage.offload:
        zero_config["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": stage.max_grad_norm if zero else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero_config,
        # torch's AdamW instead of DeepSpeed's, which would be compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }

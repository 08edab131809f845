"""Distillation in Hugging Face's ``Trainer``: its arguments, callbacks and checkpoints, our methods and teachers."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data import Batch, as_batch
from tutelage.data.batch import PROBABILITIES, has_labels
from tutelage.errors import CapabilityError, CheckpointError, DataError, require
from tutelage.integrations.distiller import EXAMPLE, Distiller
from tutelage.methods import Method
from tutelage.models import load_weights
from tutelage.students import arguments_of

require("transformers", "text", "tutelage.integrations.hf")

from safetensors.torch import load_file, save_file, save_model  # noqa: E402
from transformers import (  # noqa: E402
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

METHOD_WEIGHTS = "method.safetensors"
"""The method's weights, next to the student in a checkpoint's folder."""


class DistillationTrainer(Trainer):
    """``transformers.Trainer`` for any student, teacher and method.

    Data, collator, arguments and callbacks are Trainer's. The loss is the method's, averaged over all micro-batches
    of ``gradient_accumulation_steps`` and all processes, as in our engine. A checkpoint holds the student, as
    ``save_pretrained`` writes it, and ``method.safetensors`` if the method has weights.

    ``evaluate`` returns the method's loss; ``compute_metrics`` gets the student's logits and the labels of
    those positions, already shifted for causal language models.

    Args:
        student: a model of transformers, or any module that takes the data's columns.
        teacher: see :class:`tutelage.integrations.Distiller`.
        method: default :class:`tutelage.methods.LogitMethod` at T = 4, alpha = 0.9.
        args: Trainer's.
        train_dataset: Trainer's; its first samples are used for the dry run.
        data_collator: Trainer's. Default: Trainer's own choice.
        processing_class: Trainer's.
        to_batch: converts what the collator returns to a batch; for causal language models
            :func:`tutelage.data.causal_batch`.
        batch: the names of the positions of tuples that the collator returns; see :func:`tutelage.distill`.
        ids: sample ids of the training data, for a method that needs them.
        peers: modules that are trained with the student, for a method with peers.
        phases_done: the phases that the method needs first are trained.
        outputs: the key, attribute or position of the scores in the models' outputs.
        class_axis: the axis of the classes in the scores of both models; see :func:`tutelage.distill`.
        more: other arguments of Trainer, except ``model`` and those that define a loss.

    Raises:
        CapabilityError: see :class:`tutelage.integrations.Distiller`; or an unsupported argument.
        DataError: no training data.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Any,
        method: Method | None = None,
        *,
        args: TrainingArguments,
        train_dataset: Any,
        data_collator: Callable[[list[Any]], Any] | None = None,
        processing_class: Any = None,
        to_batch: Callable[[Any], Batch] = as_batch,
        batch: Sequence[str] | None = None,
        ids: Tensor | None = None,
        peers: Sequence[nn.Module] = (),
        phases_done: bool = False,
        outputs: str | int | None = None,
        class_axis: int | None = None,
        **more: Any,
    ) -> None:
        for refused in ("model", "model_init", "compute_loss_func"):
            if refused in more:
                raise CapabilityError(
                    f"DistillationTrainer takes no {refused}", remedy="give student, teacher and method instead"
                )
        if getattr(args, "label_smoothing_factor", 0.0):
            raise CapabilityError(
                "label_smoothing_factor changes Trainer's own loss, which is not used",
                remedy="method=SupervisedMethod(label_smoothing=...)",
            )
        collator = data_collator or (
            DataCollatorWithPadding(processing_class) if processing_class is not None else default_data_collator
        )
        theirs = arguments_of(teacher) if isinstance(teacher, nn.Module) else None
        columns = [
            *inspect.signature(student.forward).parameters,
            *(theirs or ()),
            "labels",
            "label",
            "label_ids",
            PROBABILITIES,
        ]
        columns_used = columns if args.remove_unused_columns else None
        example = collator(_few(train_dataset, columns_used))
        self.distiller = Distiller(
            student, teacher, method, example=example, to_batch=to_batch, batch=batch, seed=args.seed, ids=ids,
            peers=peers, phases_done=phases_done, outputs=outputs, class_axis=class_axis,
        )  # fmt: skip
        if args.gradient_checkpointing:
            enable = getattr(student, "gradient_checkpointing_enable", None)
            if enable is None:
                raise CapabilityError(
                    f"{type(student).__name__} does not support gradient checkpointing",
                    remedy="gradient_checkpointing=False",
                )
            enable({"use_reentrant": False})
            args.gradient_checkpointing = False  # done; Trainer would call it on the distiller
        super().__init__(
            model=self.distiller, args=args, train_dataset=train_dataset, data_collator=collator,
            processing_class=processing_class, **more,
        )  # fmt: skip
        self._signature_columns = columns
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # our losses are scaled for the full step
        self._scale: dict[str, Tensor] = {}
        self._ready: list[Batch] = []
        self.add_callback(_StepEnds(self.distiller))

    # Training ----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, counted before any of them runs; and a number that Trainer only passes on."""
        samples = list(islice(epoch_iterator, num_batches))
        if not samples:
            return samples, None
        self._ready = [self.distiller.batch(self._prepare_inputs(raw)) for raw in samples]
        self._scale = self.distiller.scales(self._ready)
        return samples, torch.tensor(len(samples), device=device)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss for the step's next micro-batch."""
        with self.accelerator.autocast():
            loss = self.distiller.loss(self._ready.pop(0), self._scale, through=model)
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log lines, with each term of the last step."""
        if "loss" in logs:
            logs = {**logs, **{f"term/{name}": value for name, value in self.distiller.values().items()}}
        super().log(logs, start_time)

    # Evaluation --------------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The method's loss on a batch, the student's logits and their labels; the logits alone without labels."""
        with torch.no_grad(), self.accelerator.autocast():
            batch = self.distiller.batch(self._prepare_inputs(inputs))
            if not has_labels(inputs):  # of predict
                return None, self.distiller.logits(batch).float(), None
            loss = self.distiller.evaluated(batch)
            if prediction_loss_only:
                return loss, None, None
            logits = self.distiller.logits(batch).float()
        return loss, logits, batch.labels if batch.targets is None else batch.targets

    # Checkpoints -------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        student = self.distiller.student
        if callable(getattr(student, "save_pretrained", None)):
            student.save_pretrained(folder, max_shard_size="1TB")  # type: ignore[operator]
        else:
            save_model(student, str(folder / "model.safetensors"))
        learned = {k: v.detach().cpu().clone() for k, v in self.distiller.method.state_dict().items()}
        if learned:
            save_file(learned, folder / METHOD_WEIGHTS)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_weights(self.distiller.student, folder)
        own = self.distiller.method.state_dict()
        if not own:
            return
        if not (folder / METHOD_WEIGHTS).is_file():
            raise CheckpointError(
                f"has no {METHOD_WEIGHTS}, and {type(self.distiller.method).__name__} has weights",
                where=str(folder),
                remedy="resume from a checkpoint of this trainer with the same method",
            )
        self.distiller.method.load_state_dict(load_file(folder / METHOD_WEIGHTS))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _few(dataset: Any, columns_used: Iterable[str] | None) -> list[Any]:
    """The first samples, with the columns that the model uses."""
    if dataset is None:
        raise DataError("DistillationTrainer(train_dataset=None)", remedy="give the training data")
    rows = list(islice(iter(dataset), EXAMPLE))
    if not rows:
        raise DataError("the training data is empty", remedy="give at least two samples")
    if columns_used is None or not all(isinstance(row, dict) for row in rows):
        return rows
    return [{k: v for k, v in row.items() if k in set(columns_used)} for row in rows]


class _StepEnds(TrainerCallback):
    """Reports the training's progress to the method."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.distiller.begin(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.distiller.after_step()

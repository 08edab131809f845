"""DeepSpeed's ZeRO, stages 1 and 2: gradients and the state of the optimizer are partitioned over processes.

Checkpoints are not partitioned and have the same names as without DeepSpeed, so a run can continue with or without
it, on any number of processes.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tutelage.config import TrainConfig
from tutelage.data.loader import current_rank
from tutelage.errors import CapabilityError, MissingDependencyError

UNSUPPORTED_OPTIMIZERS = ("adafactor", "adagrad")
"""Adafactor needs the rows and columns of a weight, which ZeRO flattens; DeepSpeed replaces Adagrad by its own."""


def uses_deepspeed() -> bool:
    """Whether the launcher uses DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_installed() -> None:
    """Raise :class:`MissingDependencyError` if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(
            "the launcher's configuration uses DeepSpeed, which is not installed",
            remedy="pip install deepspeed, or `accelerate config` with FSDP (version 2)",
        )


class Zero:
    """The parts of a training that DeepSpeed does instead of the engine.

    Raises:
        CapabilityError: an option of the recipe or of the launcher is not supported with DeepSpeed.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainConfig, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        plugin = accelerator.state.deepspeed_plugin
        settings = plugin.deepspeed_config
        stage = settings.get("zero_optimization", {}).get("stage")
        offload = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
        kind = config.optimizer.kind
        for given, what, remedy in (
            (
                stage not in (1, 2),
                f"ZeRO stage {stage}",
                "use stage 1 or 2; or FSDP (version 2), to shard weights",
            ),
            (offload != "none", f"offload_optimizer: {offload}", "remove offload_optimizer"),
            (config.ema is not None, "train.ema", "remove it"),
            (kind in UNSUPPORTED_OPTIMIZERS, f"train.optimizer.kind: {kind}", "use adamw"),
            (accelerator.mixed_precision == "fp16", "train.precision: fp16", "use bf16"),
        ):
            if given:
                raise CapabilityError(f"{what} is not supported with DeepSpeed", remedy=remedy)
        self.precision = accelerator.mixed_precision
        self.settings = settings
        settings.update(
            train_micro_batch_size_per_gpu=1,  # unused: our batches are planned
            gradient_accumulation_steps=config.accumulate,
            train_batch_size=config.accumulate * accelerator.num_processes,
            gradient_clipping=config.clip or 0.0,
            zero_allow_untested_optimizer=True,
        )
        settings.pop("optimizer", None)
        settings.pop("scheduler", None)
        self.device = accelerator.device
        if self.precision == "bf16":
            module.forward = self.autocast()(module.forward)
        names = {p: name for name, p in module.named_parameters()}
        self.groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.optimizer, self.module = optimizer, module
        self.outer: Any = None
        """DeepSpeed's wrapper of ``optimizer``; the training loop sets it."""

    def autocast(self) -> torch.autocast:
        """Mixed precision, which accelerate does not apply with DeepSpeed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def hide_bf16(self) -> Iterator[None]:
        """Hide bf16 from DeepSpeed while it wraps the model, so that weights stay in float32."""
        before = self.settings.pop("bf16", None)
        self.settings["bf16"] = {"enabled": False}
        try:
            yield
        finally:
            self.settings["bf16"] = before or {"enabled": False}  # the next training's accelerator reads it here

    def model(self) -> dict[str, Tensor]:
        """All weights and buffers on the CPU, trained weights in float32.

        Every process must call it; only the main process gets the weights.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state = {k: v.detach() for k, v in self.module.state_dict().items() if isinstance(v, Tensor)}
        main, whole = current_rank().rank == 0, dict[nn.Parameter, Tensor]()
        weights = {k: v.cpu().clone() for k, v in state.items()} if main else {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad and name in state:
                if parameter not in whole:
                    exact = safe_get_full_fp32_param(parameter).detach()
                    whole[parameter] = exact.cpu().clone() if main else exact.new_empty(0)
                if main:
                    weights[name] = whole[parameter]
        return weights

    def state(self) -> dict[str, Any]:
        """The unpartitioned state of the optimizer, by parameter.

        Every process must call it; only the main process gets the state.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        keys, steps = self._state_keys()
        states: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._trained().items():
            parts = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
            if current_rank().rank == 0:
                states[name] = {k: v.detach().cpu().clone() for k, v in (parts | steps).items()}
        groups = [
            {**{k: v for k, v in group.items() if k != "params"}, "params": names}
            for group, names in zip(self.optimizer.param_groups, self.groups, strict=True)
        ]
        return {"state": states if keys or steps else {}, "param_groups": groups}

    def restore(self, captured: Mapping[str, Any]) -> None:
        """Restore the results of :meth:`model` and :meth:`state`; every process must call it with the same values."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        trained = self._trained()
        self.module.load_state_dict(captured["model"])
        for name, parameter in trained.items():
            safe_set_full_fp32_param(parameter, captured["model"][name].float().to(parameter.device))
        known = captured["optimizer"]["state"]
        if known:
            self._make_state()
            keys, _ = self._state_keys()
            for name, parameter in trained.items():
                for key in keys:
                    if key in known.get(name, {}):
                        safe_set_full_optimizer_state(parameter, known[name][key].to(parameter.device), key)
            first: Mapping[str, Any] = next(iter(known.values()))
            for state in self.optimizer.state.values():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim() == 0 and key in first:
                        value.copy_(first[key])
        for group, saved in zip(self.optimizer.param_groups, captured["optimizer"]["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _state_keys(self) -> tuple[list[str], dict[str, Tensor]]:
        """The names of the tensors that the optimizer has for each weight, and its step counts."""
        if self.optimizer.state:
            # DeepSpeed has linked this state to parameters after the first group's step, when other groups had none.
            self.outer._hp_optimizer_states_linked = False
            self.outer._lazy_init_hp_params_optimizer_state()
        first: Mapping[str, Any] = next(iter(self.optimizer.state.values()), {})
        tensors = {key: value for key, value in first.items() if isinstance(value, Tensor)}
        return [k for k, v in tensors.items() if v.dim()], {k: v.cpu() for k, v in tensors.items() if not v.dim()}

    def _make_state(self) -> None:
        """Make the optimizer create its state, by a step with a learning rate of 0."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for flat in group["params"]:
                flat.grad = torch.zeros_like(flat)
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            for flat in group["params"]:
                flat.grad = None

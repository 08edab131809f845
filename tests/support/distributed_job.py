"""Run by several processes: three steps on an uneven data set, weights after each, to a file.

``python -m torch.distributed.run --nproc_per_node 2 distributed_job.py OUT ACCUMULATE PRECISION KIND``
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support import language_worlds as worlds
from support import served_worlds
from tutelage.config import OptimizerConfig, ScheduleConfig, TrainConfig
from tutelage.data import IGNORE, Batch, PlannedBatches
from tutelage.data.tokens import tokenize
from tutelage.engine import Accelerator, RunDirectory, Training, build_accelerator, fit, leave
from tutelage.engine.checkpoint import full_model_state
from tutelage.losses import kd
from tutelage.methods import (
    FeatureMethod,
    LogitMethod,
    Method,
    MutualMethod,
    OnPolicyMethod,
    Term,
    TokenMethod,
    prepare_method,
)
from tutelage.taps import Needs, Observation
from tutelage.teachers import LiveTeacher, Signal

ROWS, BATCH, CLASSES = 71, 32, 5


class Rows:
    """71 rows, of which every third has no label: the last batch has 7 rows, and the terms count differently."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 12, generator=generator)
        self.labels = torch.randint(CLASSES, (ROWS,), generator=generator)
        self.labels[::3] = -100
        self.ids = torch.arange(ROWS)

    is_augmented = False

    def __len__(self) -> int:
        return ROWS

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        return Batch(self.x[rows], self.labels[rows], ids=self.ids[rows])


def network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, CLASSES))


class WithProjector(Method):
    """Logit distillation plus a projected hidden state: has weights of its own."""

    needs = Needs(hidden=("0",))
    student_needs = Needs(hidden=("0",))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.project = nn.Linear(8, 16)
        self.weights = {"kd": 0.5, "ce": 0.5, "hint": 2.0}
        self.logit = LogitMethod(alpha=0.5)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {**self.logit.counts(batch), "hint": batch.counted().sum()}

    def forward(self, student: Observation, batch: Batch, signal: Signal) -> dict[str, Term]:
        assert signal is not None
        projected = kd(self.project(student.hidden["0"]), signal.hidden["0"], mask=batch.mask, reduction="sum")
        return {**self.logit(student, batch, signal), "hint": Term(projected, batch.counted().sum())}


class Sentences:
    """13 texts of several lengths and of as many kinds of tokens; all of them make up each step, packed or not."""

    is_augmented = False

    def __init__(self, pack: bool) -> None:
        rows = [f"{'Well. ' * (i % 4)}{text}" for i, text in enumerate(worlds.texts(13))]
        self.tokens = tokenize([rows], worlds.tokenizer(), max_length=128, learn="answers", pack=pack)
        self.ids = torch.arange(len(self.tokens))

    def __len__(self) -> int:
        return len(self.tokens)

    def fetch(self, rows: Tensor, views: Tensor | None = None) -> Batch:
        labels = self.tokens.next_tokens(rows.numpy())
        mask = labels != IGNORE
        labels[labels % 5 == 0] = IGNORE  # of some the teacher alone says what they are
        return Batch(self.tokens.inputs(rows.numpy()), labels, ids=self.ids[rows], mask=mask)


def language_model(width: int, layers: int, seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(worlds.tokenizer()), hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=2 * width, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    found: nn.Module = transformers.LlamaForCausalLM(config)
    return found


def written_by(accelerator: Accelerator) -> str:
    """The address of a server of the main process, whose weights are another student's."""
    found = [""]
    if accelerator.is_main_process:
        server = served_worlds.Server(language_model(16, 2, seed=9), worlds.tokenizer())
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = [f"{server.url}/v1"]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def check_parts(live: LiveTeacher, processes: int) -> None:
    """Each process has its share of the blocks and no more, all of the rest, and the whole model as it was."""
    from torch.distributed.tensor import DTensor

    assert not any(isinstance(p, DTensor) for p in live.model.parameters())
    (runs,) = {id(o.model): o.model for o in live._observers.values()}.values()
    for name, parameter in runs.named_parameters():
        whole = live.model.get_parameter(name)
        assert isinstance(parameter, DTensor) == ("layers." in name), name
        held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        share = processes if isinstance(parameter, DTensor) else 1
        assert held.numel() <= -(-whole.shape[0] // share) * whole[0].numel(), name


class Snapshots:
    """A watcher that keeps the weights after every step."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.module: nn.Module | None = None

    def on_start(self, name: str, step: int, total: int) -> None: ...

    def on_log(self, line: dict[str, Any]) -> None: ...

    def on_step(self, step: int) -> None:
        assert self.module is not None
        self.kept.update({f"{step}/{k}": v for k, v in full_model_state(self.module).items()})


def sharded(accelerator: Accelerator, units: int) -> Accelerator:
    """``accelerator``, preparing models as accelerate does for FSDP2 on GPUs; it leaves that off on CPUs itself."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=units, cpu_ram_efficient_loading=False
    )
    accelerator.state.fsdp_plugin = plugin
    type(accelerator).is_fsdp2 = property(lambda self: True)  # type: ignore[method-assign]
    return accelerator


def deepspeed_on_cpus() -> None:
    """Let accelerate see the processes of a launcher under DeepSpeed, which it does on GPUs alone itself."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState()
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    PartialState._shared_state.update(
        num_processes=world, process_index=rank, local_process_index=rank, backend="gloo",
        distributed_type=DistributedType.DEEPSPEED,
    )  # fmt: skip


def main(out: Path, accumulate: int, kind: str, steps: int = 3) -> None:
    if kind.startswith("zero"):
        deepspeed_on_cpus()
    accelerator = build_accelerator()
    if kind.startswith("fsdp"):  # in units of 20 parameters, or all in the root
        sharded(accelerator, 20 if kind == "fsdp" else 10**9)
    watcher, student = Snapshots(), network(8, seed=1)
    teacher = network(16, seed=2)
    method: Method = WithProjector()
    if kind == "feature":  # relations compare the rows of a micro-batch, so they are not among the pairs
        pairs = [{"student": "0", "teacher": "0"}, {"student": "2", "teacher": "2", "weight": 0.5}]
        feature = FeatureMethod(pairs=pairs, projector="mlp", weight=2.0)
        method = prepare_method(feature, student, teacher, Rows().fetch(
            torch.arange(2)
        ), seed=4)  # fmt: skip
    if kind == "crd":
        crd = FeatureMethod(
            pairs=[{"student": "2", "teacher": "2"}], loss="crd", options={"negatives": 9, "width": 6}
        )
        method = prepare_method(crd, student, teacher, Rows().fetch(torch.arange(2)), seed=4, ids=Rows().ids)
        before = method.hidden.losses[0].memory.student.clone()  # type: ignore[union-attr, operator]
    if kind.endswith("mutual"):
        method = MutualMethod(peers=1, refresh=2)
        method.add_peers([network(8, seed=6)])
        method.build(student, None, Rows().fetch(torch.arange(2)))
    data: Any = Rows()
    if kind.endswith("on-policy"):  # greedy, so that all write the same, and to ends at different places
        data = Sentences(pack=False)
        student, teacher = language_model(16, 2, seed=1), language_model(24, 3, seed=2)
        student.generation_config.eos_token_id = list(range(0, 300, 5))  # type: ignore[union-attr]
        rollouts = {"url": written_by(accelerator), "every": 1} if "served" in kind else None
        own = OnPolicyMethod(lmbda=1.0, sampling_temperature=0.0, max_new_tokens=9, rollouts=rollouts)
        method = prepare_method(own, student, teacher, data.fetch(data.ids), seed=4)
    if "token" in kind:
        data = Sentences(pack=kind.endswith("packed"))
        student, teacher = language_model(16, 2, seed=1), language_model(24, 3, seed=2)
        method = prepare_method(
            TokenMethod(divergence="js", temperature=2.0, alpha=0.7, hidden=0.5),
            student,
            teacher,
            data.fetch(data.ids),
            seed=4,
        )
    live = LiveTeacher(teacher, sharded=kind.endswith("sharded-teacher")).to("cpu")
    config = TrainConfig(
        steps=steps, batch_size=BATCH, accumulate=accumulate, clip=100.0,
        ema=0.9 if kind == "ema" else None, checkpoint_every=2, log_every=1,
        optimizer=OptimizerConfig(kind="sgd", lr=0.5, momentum=0.9), schedule=ScheduleConfig(kind="constant"),
    )  # fmt: skip
    training = Training(
        "job", student, method, PlannedBatches(data, BATCH, seed=3), config,
        RunDirectory(out, writes=accelerator.is_main_process), teacher=live,
        validation=[data.fetch(data.ids[:37])], callback=watcher,
    )  # fmt: skip
    prepare = accelerator.prepare

    def remember(*objects: Any) -> Any:
        prepared = prepare(*objects)
        watcher.module = prepared[0].module if kind.startswith("zero") else prepared[0]
        return prepared

    accelerator.prepare = remember  # type: ignore[method-assign]
    outcome = fit(training, accelerator)
    if live.sharded:
        check_parts(live, accelerator.num_processes)
    if kind.startswith("fsdp"):
        from torch.distributed.tensor import DTensor

        assert all(isinstance(p, DTensor) for p in watcher.module.parameters())  # type: ignore[union-attr]
    if kind == "crd":
        memory = method.hidden.losses[0].memory.student  # type: ignore[union-attr]
        (out / f"moved-{accelerator.process_index}").write_text(str(int((memory.cpu() != before).any(1).sum())))
        everybody = accelerator.gather(memory.unsqueeze(0))
        assert all(torch.equal(rank, everybody[0]) for rank in everybody), "memories differ between processes"
    if accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in watcher.kept.items()}, str(out / "steps.safetensors"))
        save_file(outcome.last, str(out / "student.safetensors"))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else 3)
    leave()

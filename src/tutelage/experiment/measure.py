"""Size, speed and class similarity of models."""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.data.batch import Batch
from tutelage.engine import RunDirectory
from tutelage.files import write_text
from tutelage.models.pretrained import CrossEncoder
from tutelage.models.sentence_modules import SentenceModules
from tutelage.taps import Needs, observe
from tutelage.teachers import FunctionModel


def parameters(model: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def reached_parameters(model: nn.Module, example: Batch) -> int:
    """Parameters that the logits depend on or that are frozen; for an early exit, none of a later layer."""
    free = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    with torch.enable_grad():
        logits = observe(model, example.inputs, Needs()).logits
        assert logits is not None
        gradients = torch.autograd.grad(logits.sum(), free, allow_unused=True)
    unused = sum(p.numel() for p, gradient in zip(free, gradients, strict=True) if gradient is None)
    return parameters(model) - unused


def class_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def short_hash(content: str | bytes) -> str:
    """The first 16 hex digits of a SHA-256."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """A model's class, size, digest of its weights, and what comes after a sentence encoder's hidden states."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    facts = {"class": class_name(type(model)), "parameters": parameters(model), "weights": digest.hexdigest()[:16]}
    after = getattr(model, "after", None)
    if isinstance(model, FunctionModel):
        facts |= {"function": model.name, "digest": model.digest}
    if isinstance(model, CrossEncoder):
        return facts | {"activation": str(model.activation)}
    return facts | ({"modules": after.describe()} if isinstance(after, SentenceModules) else {})


def latencies(
    models: Mapping[str, tuple[nn.Module, Batch]], device: torch.device, rounds: int = 30
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a forward pass for one sample, the models taking turns.

    Taking turns, because a machine's speed drifts: compare the figures with each other only.
    """
    one = {}
    for name, (model, example) in models.items():
        first = next(model.parameters(), None)
        one[name] = example.rows(0, 1).to(device if first is None else first.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for model, _ in models.values():
        model.eval()
    with torch.no_grad():
        for i in range(rounds + max(1, rounds // 10)):
            for name, (model, _) in models.items():
                start = time.perf_counter()
                observe(model, one[name].inputs, Needs())
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if i >= max(1, rounds // 10):
                    times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {"p50_ms": statistics.median(t), "p95_ms": sorted(t)[int(0.95 * (len(t) - 1))], "batch": 1}
        for name, t in times.items()
    }


TEMPERATURES = (1, 2, 4, 8, 20)
"""The temperatures at which a run writes class similarities."""

MOST_CLASSES = 200
"""With more classes, a run writes none."""


def class_similarity(logits: Tensor, temperature: float) -> Tensor:
    """``sim[i, j] = E[p_i p_j]`` over examples, with ``p = softmax(logits / temperature)``.

    Symmetric; its entries sum to 1, row ``i`` sums to ``E[p_i]``, and every entry goes to ``1 / C**2`` as the
    temperature grows. For one-hot probabilities only the diagonal is not zero.

    Args:
        logits: ``[N, C]`` with at least one row.
        temperature: > 0.

    Returns:
        ``[C, C]``, float64.
    """
    p = torch.softmax(logits.double() / temperature, dim=-1)
    return p.T @ p / len(p)


class Similarities:
    """:func:`class_similarity` at each of :data:`TEMPERATURES`, accumulated batch by batch."""

    def __init__(self) -> None:
        self.n = self.classes = 0
        self.sums: dict[int, Tensor] = {}

    def add(self, logits: Tensor) -> None:
        """Add examples: logits ``[N, C]``."""
        self.n, self.classes = self.n + len(logits), logits.shape[-1]
        if self.classes > MOST_CLASSES or not len(logits):
            return
        for temperature in TEMPERATURES:
            here = class_similarity(logits, temperature) * len(logits)
            self.sums[temperature] = self.sums[temperature] + here if temperature in self.sums else here

    def means(self) -> dict[int, Tensor]:
        """``[C, C]`` by temperature; empty with too many classes or no example."""
        return {temperature: total / self.n for temperature, total in self.sums.items()}

    def write(self, run: RunDirectory, name: str) -> None:
        """Write the upper triangle of each, row by row, for the model of that name."""
        if not run.writes:
            return
        upper = torch.triu_indices(self.classes, self.classes).unbind()
        sim = {t: [float(f"{v:.6g}") for v in mean.cpu()[upper].tolist()] for t, mean in self.means().items()}
        text = json.dumps({"classes": self.classes, "n": self.n, "sim": sim}, separators=(",", ":"))
        write_text(run.json_file("similarity", name), text + "\n")

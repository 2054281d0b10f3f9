"""What the ranks of the engine tests run, and the plain torch loop that they are compared with."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import attrs
import torch
import torch.multiprocessing
from torch import Tensor, nn

from underpaint.config.engine import EngineConfig, OptimizerConfig, PartOptimizer
from underpaint.errors import RunLockedError, UnderpaintError
from underpaint.training import checkpoint, state
from underpaint.training.checkpoint import CheckpointStore
from underpaint.training.engine import Engine
from underpaint.training.lock import RunLock
from underpaint.training.ranks import Ranks
from underpaint.training.schedule import rate_factor
from underpaint.weights import file_hash

STEPS = 20
BATCH = 8
OPTIMIZER = OptimizerConfig(
    lr=3e-3,
    parts={"head": PartOptimizer(lr=1e-2, betas=(0.6, 0.99), warmup=2), "body": PartOptimizer()},
    weight_decay=0.05,
    warmup=5,
    schedule="cosine",
    clip=0.5,
)
OF_THE_HEAD = {"peak": 1e-2, "betas": (0.6, 0.99), "warmup": 2}
OF_THE_REST = {"peak": 3e-3, "betas": (0.9, 0.95), "warmup": 5}
EMA = 0.9


@attrs.frozen
class Output:
    """As opaque to DeepSpeed as the outputs of the framework's components."""

    value: Tensor
    scale: Tensor


class Net(nn.Module):
    """Large enough for ZeRO 3 to partition a weight (above 100,000 elements), of sizes that two ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(7, 301), nn.GELU(), nn.Linear(301, 401), nn.LayerNorm(401))
        self.head = nn.Linear(401, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor([1.1, 0.9, 1.05]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.full((3,), 0.123456789))

    def forward(self, x: Tensor) -> Output:
        if self.training:
            self.seen += 1
        return Output(self.frozen(self.head(self.body(x)) * self.gain) + self.mean, self.gain)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, 7, generator=generator)
    return x, torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].abs()], 1)


def loss_of(output: Output, y: Tensor) -> Tensor:
    return (output.value - y).square().mean() + 0.01 * output.scale.square().sum()


def rate(group: dict, applied: int) -> float:
    """The learning rate of a group of a plain AdamW, after so many steps."""
    schedule = OptimizerConfig(warmup=group["warmup"], schedule="cosine")
    return group["peak"] * rate_factor(schedule, applied, STEPS)


def reference(
    steps: int = STEPS, skip: tuple[int, ...] = ()
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Train with torch alone.

    Returns:
        Losses, final weights, and the moving average in float64.
    """
    net = Net()
    groups = {"body": list(net.body.parameters()), "head": list(net.head.parameters()), "rest": [net.gain]}
    adam = torch.optim.AdamW(
        [{"params": params, **(OF_THE_HEAD if name == "head" else OF_THE_REST)} for name, params in groups.items()],
        weight_decay=OPTIMIZER.weight_decay,
    )
    average = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    losses = []
    applied = 0
    for step in range(steps):
        x, y = batch(step)
        loss = loss_of(net(x), y)
        losses.append(loss.item())
        if step in skip:
            continue
        for group in adam.param_groups:
            group["lr"] = rate(group, applied)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for params in groups.values() for p in params], OPTIMIZER.clip)
        adam.step()
        applied += 1
        for name, p in net.named_parameters():
            average[name] = EMA * average[name] + (1 - EMA) * p.detach().double()
    return losses, copy.deepcopy(net.state_dict()), average


def make_engine(ranks: Ranks, *, ema: float | None = EMA, module: nn.Module | None = None, **config: object) -> Engine:
    net = Net() if module is None else module
    settings = EngineConfig(**{"device": "cpu", **config})
    return Engine(
        net,
        parts={"body": net.body, "head": net.head},
        optimizer=OPTIMIZER,
        config=settings,
        steps=STEPS,
        micro_batch=BATCH // ranks.world_size // settings.accumulation,
        ema=ema,
        ranks=ranks,
    )


def train(
    engine: Engine, first: int, last: int, *, bad: tuple[int, int, str] | None = None, probe: bool = False
) -> list[float]:
    """Train on this rank's rows of each batch; `bad` is (step, rank, what is not finite there)."""
    ranks, accumulation = engine.ranks, engine._config.accumulation
    losses = []
    for step in range(first, last):
        x, y = batch(step)
        mine = slice(ranks.rank, None, ranks.world_size)
        total = 0.0
        pieces = list(zip(x[mine].chunk(accumulation), y[mine].chunk(accumulation), strict=True))
        for index, (xs, ys) in enumerate(pieces):
            loss = loss_of(engine(xs), ys)
            if bad is not None and bad[:2] == (step, ranks.rank):
                loss = loss + float("inf") if bad[2] == "loss" else spoiled(loss)
            if probe:
                torch.autograd.grad(loss, engine.module.head.bias, retain_graph=True)
            engine.backward(loss)
            result = engine.step()
            total += loss.item() / accumulation
            assert result.applied == (index == accumulation - 1 and not result.skipped)
        losses.append(sum(ranks.all_gather_object(total)) / ranks.world_size)
    return losses


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def spoiled(loss: Tensor) -> Tensor:
    """A finite loss with a gradient that is not."""
    return _Spoil.apply(loss)


def stages(ranks: Ranks) -> dict[int, tuple]:
    """Train at every ZeRO stage; also follow the moving average step by step, in float64, from gathered weights."""
    results = {}
    for zero in range(4):
        engine = make_engine(ranks, zero=zero)
        average = {name: tensor.double() for name, tensor in engine.state("raw").items()}
        losses = []
        for step in range(STEPS):
            losses += train(engine, step, step + 1)
            for name, tensor in engine.state("raw").items():
                average[name] = EMA * average[name] + (1 - EMA) * tensor.double()
        results[zero] = (losses, engine.state("raw"), engine.state("ema"), average, engine.train_state)
        engine.close()
    return results


def accumulated(ranks: Ranks) -> dict[int, tuple]:
    """Train with two micro-batches a step, and look at a gradient in between as adaptive loss weights do."""
    results = {}
    for zero in range(4):
        engine = make_engine(ranks, zero=zero, accumulation=2)
        results[zero] = (train(engine, 0, 6, probe=True), engine.state("raw"))
        engine.close()
    return results


def not_finite(ranks: Ranks) -> dict[int, tuple]:
    """Train with an infinite loss on the last rank at step 3, and a NaN gradient on the first at step 5."""
    results = {}
    for zero in range(4):
        engine = make_engine(ranks, zero=zero, max_bad_steps=2)
        train(engine, 0, 3)
        before = engine.state("raw"), engine.state("ema")
        train(engine, 3, 4, bad=(3, ranks.world_size - 1, "loss"))
        after = engine.state("raw"), engine.state("ema")
        train(engine, 4, 5)
        train(engine, 5, 6, bad=(5, 0, "gradient"))
        train(engine, 6, 8)
        state = engine.state("raw"), engine.state("ema"), engine.train_state
        train(engine, 8, 9, bad=(8, 0, "loss"))
        try:
            train(engine, 9, 10, bad=(9, ranks.world_size - 1, "gradient"))
            message = ""
        except UnderpaintError as error:
            message = str(error)
        results[zero] = (before, after, state, message)
        engine.close()
    return results


def low_precision(ranks: Ranks) -> dict[int, tuple]:
    results = {}
    for zero in range(4):
        engine = make_engine(ranks, zero=zero, precision="bf16", accumulation=2)
        start = engine.state("raw")
        dtypes = {name: p.dtype for name, p in engine.module.named_parameters()}
        results[zero] = (start, train(engine, 0, 8), engine.state("raw"), dtypes)
        engine.close()
    return results


def saved(ranks: Ranks, folder: str) -> dict[str, tuple]:
    """Train 20 steps with ZeRO 2, saving after 10, and go on from there in other ways."""
    results = {}
    path = Path(folder)
    for precision in ("fp32", "bf16"):
        engine = make_engine(ranks, zero=2, precision=precision)
        train(engine, 0, 10)
        if ranks.is_main:
            (path / precision).mkdir()
        ranks.barrier()
        engine.save(path / precision)
        losses = train(engine, 10, 20)
        results[f"{precision} straight"] = (losses, engine.state("raw"), engine.state("ema"))
        engine.close()
        for zero in (0, 1, 2, 3) if precision == "fp32" else (2, 3):
            engine = make_engine(ranks, zero=zero, precision=precision)
            engine.load(path / precision)
            loaded = engine.train_state
            losses = train(engine, 10, 20)
            results[f"{precision} {zero}"] = (losses, engine.state("raw"), engine.state("ema"), loaded)
            engine.close()
    return results


def failing_saves(ranks: Ranks, folder: str) -> tuple:
    """Save with a full disk on rank 1 only: in its own file, then again, then not, then with a mistake in the code."""
    store = CheckpointStore(Path(folder), 2, ranks, config_hash="c", plugins={"tiny": "1.0"})
    engine = make_engine(ranks, zero=1)
    real = state.save_tensors
    outcomes = []

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    for step, broken in enumerate([False, True, True, False], start=1):
        train(engine, step - 1, step)
        state.save_tensors = full if broken and ranks.rank == 1 else real
        made = store.save(step, engine.save, {"position": step * BATCH})
        outcomes.append(None if made is None else (made.step, dict(made.extra)))
    state.save_tensors = real

    def mistaken(path: Path) -> None:
        engine.save(path)
        if ranks.rank == 1:
            raise KeyError("a mistake")

    try:
        store.save(5, mistaken, {})
        raised = ""
    except (KeyError, UnderpaintError) as error:
        raised = f"{type(error).__name__}: {error}"
    latest = store.latest(verify=True)
    names = sorted(path.name for path in latest.folder.iterdir())
    engine.close()
    return outcomes, raised, latest.step, latest.world_size, names


def same_name(ranks: Ranks, folder: str) -> object:
    """Let both ranks write a file of one name, and hand it in at one time."""
    store = CheckpointStore(Path(folder), 2, ranks)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("underpaint").addHandler(handler)

    def together(path: Path) -> str:
        ranks.barrier()
        return file_hash(path)

    def write(path: Path) -> None:
        (path / "weights.bin").write_bytes(b"x")
        checkpoint.file_hash = together

    return store.save(1, write, {}), [record.getMessage() for record in records]


def locked(ranks: Ranks, folder: str) -> str:
    """Take a lock that this very process holds already, on rank 0 for all ranks."""
    with RunLock(Path(folder), ranks):
        ranks.barrier()
        try:
            with RunLock(Path(folder), ranks):
                return "taken twice"
        except RunLockedError as error:
            ranks.barrier()
            return str(error)

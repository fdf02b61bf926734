"""What a run says of its steps: their metrics, its speed, what it was fed, what its saves took."""

import time
from collections.abc import Callable, Mapping, Sequence

import attrs
from attrs import define, field, frozen
from torch import Tensor

from omnistep.bin.build import Data
from omnistep.bin.model import Model, RunError
from omnistep.bin.position import Position
from omnistep.core.batch import Batch
from omnistep.core.checkpoint.protocol import CheckpointStore
from omnistep.core.logs import Logger
from omnistep.core.meters import Meter, rates, tick
from omnistep.data.state import DataState
from omnistep.models import cost
from omnistep.parallel.mesh import Mesh

Say = Callable[[str], None]


@frozen(eq=False)
class Dispatched:
    """A step whose metrics nobody has read yet."""

    data: DataState
    metrics: Mapping[str, Tensor]
    batch: Batch
    waited: float

    @property
    def step(self) -> int:
        return self.data.step


@define
class Meters:
    """How fast a run is, and what its saves took."""

    data: Data
    model: Model
    mesh: Mesh
    peak: float | None
    """Of one device."""
    store: CheckpointStore
    say: Say
    meter: Meter = field(factory=Meter)
    told: int = 0
    """Saves that were told of."""

    def read(self, step: int, tokens: float, batch: Batch, waited: float) -> dict[str, float]:
        cfg = self.model.cfg
        # the other data ranks' samples and images are taken to be as large as this one's
        work = attrs.evolve(cost.work_of(cfg, batch, self.mesh.data_ranks), tokens=tokens)
        flops = cost.flops(cfg, self.model.tree, work)
        peak = None if self.peak is None else self.peak * self.mesh.world.size
        now = time.perf_counter()
        self.meter = tick(self.meter, now, tokens=tokens, flops=flops, waited=waited)
        return rates(self.meter, steps_left=self.data.total_steps - step, peak=peak)

    def saves(self) -> dict[str, float]:
        """Tells of the saves that were committed since the last call; what the last one took."""
        values: dict[str, float] = {}
        for saved in self.store.saved[self.told :]:
            self.told += 1
            self.say(
                f"step {saved.step}: saved {saved.size / 1e9:.3g} GB in {saved.seconds:.2f} s, "
                f"training waited {saved.stall:.2f} s"
            )
            values = {"saved_step": float(saved.step), "saved_bytes": float(saved.size)}
            values |= {"save_seconds": saved.seconds, "save_stall_seconds": saved.stall}
        return values


def report(
    done: Dispatched | None, position: Position, logger: Logger, meter: Meters, most_skipped: int
) -> Position:
    """Reads a step's metrics (which waits for it), logs them, counts; stops a run gone wrong."""
    if done is None:
        return position
    values = {name: float(value) for name, value in done.metrics.items() if not value.ndim}
    skipped = position.meters["skipped"] + 1 if values["skipped"] else 0.0
    meters = {"tokens": position.meters["tokens"] + values["weight"], "skipped": skipped}
    speed = meter.read(done.step, values["weight"], done.batch, done.waited)
    fed = fed_by(done.data, meter.data.loader.reader.names)
    used = {n: value.double().mean(0).tolist() for n, value in done.metrics.items() if value.ndim}
    row = {**values, **used, **speed, **fed, **meter.saves(), "tokens": meters["tokens"]}
    logger.log(done.step, row)
    if not meters["tokens"] and done.step >= min(most_skipped, meter.data.total_steps):
        raise RunError(
            f"{done.step} steps had no token to learn: the samples of data.train_path are empty"
        )
    if skipped:
        logger.say(f"step {done.step}: the gradient is not finite; the update is skipped")
    if skipped >= most_skipped:
        raise RunError(
            f"{skipped:.0f} steps in a row had a non-finite gradient (train.max_skipped_steps): "
            "the run stops. Try a smaller train.lr, or go back to an earlier checkpoint"
        )
    return attrs.evolve(position, meters=meters)


def fed_by(data: DataState, names: Sequence[str]) -> dict[str, float]:
    """What the data has given so far of each mixed source; and what was not taken whole."""
    counts = {
        "skipped_records": data.skipped,
        "unlearnt_records": data.unlearnt,
        "cut_samples": data.cut,
    }
    fed = {name: float(count) for name, count in counts.items() if count}
    if len(names) > 1:
        for name, (samples, tokens) in zip(names, data.given, strict=True):
            fed |= {f"samples/{name}": float(samples), f"tokens/{name}": float(tokens)}
    return fed

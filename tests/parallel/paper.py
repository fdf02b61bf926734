"""What must be sent in one step of a dense decoder, worked out on paper.

Nothing here is taken from the code that sends: what is known is the shape and the axes of each
weight, the sizes of the mesh, and what each kind of parallelism is. A rank of a mesh with tensor
parallelism T, Ulysses U, context parallelism C works on rows / data ranks x seq / (C U T) tokens.

Weights. A weight is needed whole, but for what tp and pp cut, where it is used; all other axes
of the mesh give gradients that must be summed. Its group is all of them; with HSDP without
dp_replicate, over which pieces are summed once a step.

    ddp      one all-reduce of the gradient a step
    zero1    one all-gather of the weight and one reduce-scatter of the gradient a step
    zero2    the same for every micro-batch, layer by layer, wherever the weight is used
    zero3    like zero2, and a second all-gather of what the backward pass reads: the weights of
             layers. The embedding and the head need none: the lookup's gradient does not depend on
             the weight, and the loss computes its gradient along with its value.

Weights travel in the compute dtype, gradients in fp32 (fp64 where the weights are). A weight of no
layer is used by one stage of a pipeline and rests on all: it travels once a step, as in zero1. A
vector is never cut: one all-reduce of its gradient a step is less than its gathers in every layer.

Activations, for each micro-batch, forward; the backward pass sends the transpose of each.

    tp       the embedding's partial sums are scattered over the sequence; each layer gathers the
             sequence and scatters partial sums twice; the head gathers it. The softmax needs the
             maximum, then two sums of each token: two all-reduces for every chunk of logits
    ulysses  each layer exchanges queries, keys and values in one message, and its output. Fewer
             key/value heads than ranks: every rank gets one that it needs, each goes to several
    cp       keys and values go round the ring, C - 1 hops; backward they go round again, and the
             sums of their gradients (fp32) one hop behind, home: two times C - 1
    pp       each stage sends its output to the next; its gradient comes back

Recomputation of whole blocks ("full") sends a layer's forward messages again, but for the last
scatter: no gradient depends on its result. "selective" keeps what arrived.

Once a step: one all-reduce of three numbers (fp64) over all ranks.
"""

import math
from collections import Counter
from collections.abc import Mapping

import torch
from attrs import field, frozen

from omnistep.core.param import Param
from omnistep.core.tree import leaves_with_names
from omnistep.models import decoder
from omnistep.models.loss import chunk_tokens
from omnistep.parallel.layout import Strategy
from omnistep.parallel.mesh import AXES
from omnistep.parallel.remat import Remat
from omnistep.parallel.traffic import Kind, Message, Traffic

CUT_BY = {"layers": "pp", "heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp"}


@frozen
class Setting:
    """One way to train one model. rows: of a micro-batch on this data rank."""

    cfg: decoder.Config
    sizes: Mapping[str, int] = field(factory=dict)
    strategy: Strategy = "zero3"
    mode: Remat = "none"
    accumulate: int = 1
    bucket: bool = False
    weights: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    rows: int = 2
    seq: int = 16

    def size(self, *axes: str) -> int:
        return math.prod(self.sizes.get(axis, 1) for axis in axes)


def minimum(s: Setting, stage: int = 0) -> Traffic:
    """The messages of one step; `stage` is this rank's along pp."""
    traffic: Traffic = Counter()
    _weights(s, traffic)
    _activations(s, traffic, stage)
    _add(s, traffic, "all_reduce", AXES, 3, torch.float64)
    return traffic


def _add(
    s: Setting,
    traffic: Traffic,
    kind: Kind,
    axes: tuple[str, ...],
    elements: float,
    dtype: torch.dtype,
    count: int = 1,
) -> None:
    """Nothing is sent along axes of size 1."""
    axes = tuple(axis for axis in AXES if axis in axes and s.size(axis) > 1)
    if not axes or not count:
        return
    assert elements == int(elements), f"{elements} elements do not divide"
    name = str(dtype).removeprefix("torch.")
    traffic[Message(kind, axes, s.size(*axes), int(elements), name)] += count


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _weights(s: Setting, traffic: Traffic) -> None:
    named = leaves_with_names(decoder.params(s.cfg), is_leaf=lambda x: isinstance(x, Param))
    for_layer: Counter[tuple[str, ...]] = Counter()
    layers, wide = s.cfg.layers // s.size("pp"), _wide(s.weights)
    for name, p in named.items():
        cut = {CUT_BY[axis] for axis in p.axes if axis in CUT_BY}
        numel = math.prod(p.shape) // s.size(*cut)
        group = tuple(axis for axis in AXES if axis not in cut)
        shared = tuple(axis for axis in group if axis != "dp_replicate")
        vector = sum(axis != "layers" for axis in p.axes) == 1
        if s.strategy == "ddp" or vector:
            _add(s, traffic, "all_reduce", group, numel, wide)
            continue
        piece, of_layer = numel / s.size(*shared), "layers" in p.axes
        _add(s, traffic, "all_reduce", ("dp_replicate",), piece, wide)
        if s.strategy == "zero1" or (not of_layer and s.size("pp") > 1):
            _add(s, traffic, "all_gather", shared, piece, s.compute)
            _add(s, traffic, "reduce_scatter", shared, numel, wide)
        elif of_layer and s.bucket:
            for_layer[shared] += numel // layers
        elif of_layer:
            _used_by_layers(s, traffic, shared, numel // layers, layers)
        else:
            uses = s.accumulate * (2 if name == "embed" and s.cfg.tied else 1)
            _add(s, traffic, "all_gather", shared, piece, s.compute, uses)
            _add(s, traffic, "reduce_scatter", shared, numel, wide, uses)
    joined: Counter[tuple[str, ...]] = Counter()
    for axes, numel in for_layer.items():
        joined[tuple(axis for axis in axes if s.size(axis) > 1)] += numel
    for axes, numel in joined.items():
        _used_by_layers(s, traffic, axes, numel, layers)


def _used_by_layers(
    s: Setting, traffic: Traffic, axes: tuple[str, ...], numel: int, layers: int
) -> None:
    uses = layers * s.accumulate
    gathers = 2 if s.strategy == "zero3" else 1
    _add(s, traffic, "all_gather", axes, numel / s.size(*axes), s.compute, gathers * uses)
    _add(s, traffic, "reduce_scatter", axes, numel, _wide(s.weights), uses)


def _activations(s: Setting, traffic: Traffic, stage: int) -> None:
    cfg, tp = s.cfg, ("tp",)
    layers = s.accumulate * cfg.layers // s.size("pp")
    again = layers if s.mode == "full" else 0
    tokens = s.rows * s.seq / s.size("cp", "ulysses")
    """That a rank holds between the gather and the scatter of tp."""
    whole, mine = tokens * cfg.embed, tokens * cfg.embed / s.size("tp")
    first, last = stage == 0, stage == s.size("pp") - 1

    # backward, a gather is a scatter and the other way round
    ends = s.accumulate * (first + last)
    _add(s, traffic, "all_gather", tp, mine, s.compute, 4 * layers + 2 * again + ends)
    _add(s, traffic, "reduce_scatter", tp, whole, s.compute, 4 * layers + again + ends)
    if last:
        most = chunk_tokens(int(tokens), cfg.vocab // s.size("tp"))
        full, rest = divmod(int(tokens), most)
        for size, chunks in ((most, full), (rest, min(rest, 1))):
            for values in (1, 2):
                count = s.accumulate * chunks
                _add(s, traffic, "all_reduce", tp, values * size, _wide(s.compute), count)

    heads, kv_heads = cfg.heads // s.size("tp"), cfg.kv_heads // s.size("tp")
    sent = kv_heads if kv_heads % s.size("ulysses") == 0 else s.size("ulysses")
    for width in (heads + 2 * sent, heads):
        count = 2 * layers + again
        _add(
            s, traffic, "all_to_all", ("ulysses",), tokens * width * cfg.head_dim, s.compute, count
        )

    # what ulysses has exchanged: all tokens of a rank of cp, and a share of the heads
    block = 2 * tokens * sent * cfg.head_dim
    hops = s.size("cp") - 1
    _add(s, traffic, "permute", ("cp",), block, s.compute, hops * (2 * layers + again))
    _add(s, traffic, "permute", ("cp",), block, _wide(s.compute), hops * layers)

    if not last:
        _add(s, traffic, "send", ("pp",), mine, s.compute, s.accumulate)
        _add(s, traffic, "receive", ("pp",), mine, s.compute, s.accumulate)
    if not first:
        _add(s, traffic, "send", ("pp",), mine, s.compute, s.accumulate)
        _add(s, traffic, "receive", ("pp",), mine, s.compute, s.accumulate)

"""What must be sent in one step of a decoder, worked out on paper.

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
Experts are cut by ep while they are used; their group is what else holds different tokens, ep_shard
(and dp_replicate). The router is a weight like others, its bias has no gradient. The dense layers
of a model with experts are on all stages of a pipeline, so they travel like a weight of no layer.

Activations, for each micro-batch, forward; the backward pass sends the transpose of each.

    tp       the embedding's partial sums are scattered over the sequence; each layer gathers the
             sequence and scatters partial sums twice (a mixture of experts only for its shared
             expert: the tokens of a rank go to experts as they are); the head gathers it. The
             softmax needs the maximum, then two sums of each token: two all-reduces for every chunk
             of logits
    ulysses  each layer exchanges queries, keys and values in one message, and its output. Fewer
             key/value heads than ranks: every rank gets one that it needs, each goes to several
    cp       keys and values go round the ring, C - 1 hops; backward they go round again, and the
             sums of their gradients (fp32) one hop behind, home: two times C - 1
    pp       each stage sends its output to the next; its gradient comes back. With experts what is
             summed along the layers goes with it: how often each expert of each layer was chosen
             and how many pairs of a token and an expert were worked on (int64); for the
             load-balancing loss of each row the counts (int32) and the scores' sums, whose
             gradient comes back

Latent attention makes small vectors of a rank's own tokens. tp gathers these, of queries, keys and
the keys' rotated part in one message, not the hidden state; ulysses exchanges queries and the
output as ever, but gathers the small vectors of keys and values, which each rank expands for its
heads. The ring of cp passes keys and values as in other attention, values as wide as keys (padded).

Experts that the ranks of ep share, in each layer; t tokens of a rank, each to k of X experts.

    gather      each rank gets the tokens of all [t, embed], the ids of their experts (int32) and
                the experts' weights (fp32) [t, k]; sums are scattered. Backward the transposes, not
                of the ids
    all_to_all  each rank has C slots for each other, C the smallest multiple of 8 that has room for
                1.25 times its share t k / ep of pairs, but no more than the t min(k, X / ep) there
                can be: rows [ep C, embed] and weights [ep C] (fp32) go, with how many are for each
                expert (int32, X numbers), and rows come back. Where there can be more pairs than
                slots, one all-reduce says how many rounds there will be. Backward the transposes,
                not of the counts. Further rounds (none where experts are used about evenly, and
                none is counted here) each send the same, and run again for their backward pass

Recomputation of whole blocks ("full") sends a layer's forward messages again, but for the last
scatter or, of experts, the way back: no gradient depends on its result (but for a gated shared
expert's). "selective" keeps what arrived.

The load-balancing loss: one all-reduce for each micro-batch of [rows, experts] counts (fp32) over
the ranks that share rows, on the last stage.

Once a step: one all-reduce over all ranks, in fp64, of the loss, its weight and the squares of
gradients; with experts also of the load-balancing loss, the [layers, experts] counts of tokens, and
how many pairs there were and were worked on.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from attrs import field, frozen

from omnistep.core.param import Param
from omnistep.core.tree import leaves_with_names
from omnistep.models import decoder
from omnistep.models.loss import chunk_tokens
from omnistep.parallel.experts import Dispatch
from omnistep.parallel.layout import Strategy
from omnistep.parallel.mesh import AXES, EXPERT_AXES, INSIDE
from omnistep.parallel.remat import Remat
from omnistep.parallel.traffic import Kind, Message, Traffic

CUT_BY = {
    "layers": "pp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "vocab": "tp",
    "experts": "ep",
}
STACKS = ("layers", "dense_layers")


@frozen
class Setting:
    """One way to train one model. sizes: of the mesh, with ep where experts are shared. rows: of a
    micro-batch on this data rank."""

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
    dispatch: Dispatch = "gather"

    def size(self, *axes: str) -> int:
        ranks = math.prod(self.sizes.get(axis, 1) for axis in INSIDE)
        sizes = {**self.sizes, "ep_shard": ranks // self.sizes.get("ep", 1)}
        return math.prod(sizes.get(axis, 1) for axis in axes)

    def cut(self, p: Param) -> set[str]:
        """The axes that cut a weight while it is used."""
        return {CUT_BY[axis] for axis in p.axes if self.size(CUT_BY.get(axis, "")) > 1}

    def shared(self, p: Param) -> tuple[str, ...]:
        """The axes over whose ranks a weight is the same while it is used."""
        cut = self.cut(p)
        return tuple(axis for axis in (EXPERT_AXES if "ep" in cut else AXES) if axis not in cut)

    def is_vector(self, p: Param) -> bool:
        """Also a bias of heads, which is one in a file, and a matrix of one row."""
        return sum(axis not in (*STACKS, "head_dim", "one") for axis in p.axes) <= 1

    def piece(self, p: Param) -> int:
        """How many numbers of a weight a rank holds at rest."""
        axes = self.cut(p)
        if self.strategy != "ddp" and not self.is_vector(p):
            axes |= {axis for axis in self.shared(p) if axis != "dp_replicate"}
        return math.prod(p.shape) // self.size(*axes)


def minimum(s: Setting, stage: int = 0) -> Traffic:
    """The messages of one step; `stage` is this rank's along pp."""
    traffic: Traffic = Counter()
    _weights(s, traffic)
    activations(s, traffic, stage)
    numbers = 3
    if s.cfg.experts:
        numbers += len(s.cfg.stacked_layers) * s.cfg.experts.count + 2 + (s.cfg.experts.aux > 0)
    add(s, traffic, "all_reduce", AXES, numbers, torch.float64)
    return traffic


def add(
    s: Setting,
    traffic: Traffic,
    kind: Kind,
    axes: tuple[str, ...],
    elements: float,
    dtype: torch.dtype,
    count: int = 1,
) -> None:
    """Nothing is sent along axes of size 1."""
    view = AXES if all(axis in AXES for axis in axes) else EXPERT_AXES
    axes = tuple(axis for axis in view if axis in axes and s.size(axis) > 1)
    if not axes or not count:
        return
    assert elements == int(elements), f"{elements} elements do not divide"
    name = str(dtype).removeprefix("torch.")
    traffic[Message(kind, axes, s.size(*axes), int(elements), name)] += count


def wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _weights(s: Setting, traffic: Traffic) -> None:
    named = leaves_with_names(decoder.params(s.cfg), is_leaf=lambda x: isinstance(x, Param))
    for_layers: dict[Any, list[tuple[tuple[str, ...], int]]] = {}
    """Of each stack, what travels as one message: (over which axes, numbers of one layer)."""
    exact = wide(s.weights)
    counts = {"layers": len(s.cfg.stacked_layers) // s.size("pp")}
    if s.size("pp") == 1:
        counts["dense_layers"] = len(s.cfg.dense_layers)
    for name, p in named.items():
        if name == "router_bias":
            continue
        numel = math.prod(p.shape) // s.size(*s.cut(p))
        group = s.shared(p)
        shared = tuple(axis for axis in group if axis != "dp_replicate")
        if s.strategy == "ddp" or s.is_vector(p):
            add(s, traffic, "all_reduce", group, numel, exact)
            continue
        piece, layers = numel / s.size(*shared), counts.get(p.axes[0])
        add(s, traffic, "all_reduce", ("dp_replicate",), piece, exact)
        if s.strategy == "zero1" or (not layers and s.size("pp") > 1):
            add(s, traffic, "all_gather", shared, piece, s.compute)
            add(s, traffic, "reduce_scatter", shared, numel, exact)
        elif layers:
            message = tuple(axis for axis in shared if s.size(axis) > 1) if s.bucket else name
            for_layers.setdefault((p.axes[0], message), []).append((shared, numel // layers))
        else:
            uses = s.accumulate * (2 if name == "embed" and s.cfg.tied else 1)
            add(s, traffic, "all_gather", shared, piece, s.compute, uses)
            add(s, traffic, "reduce_scatter", shared, numel, exact, uses)
    gathers = 2 if s.strategy == "zero3" else 1
    for (stack, _), weights in for_layers.items():
        axes, numel = weights[0][0], sum(numel for _, numel in weights)
        uses = counts[stack] * s.accumulate
        add(s, traffic, "all_gather", axes, numel / s.size(*axes), s.compute, gathers * uses)
        add(s, traffic, "reduce_scatter", axes, numel, exact, uses)


def activations(s: Setting, traffic: Traffic, stage: int = 0) -> None:
    """The messages between the ranks that share the tokens, weights or layers of a micro-batch."""
    cfg, tokens = s.cfg, s.rows * s.seq / s.size("cp", "ulysses")
    """That a rank holds between the gather and the scatter of tp."""
    first, last = stage == 0, stage == s.size("pp") - 1
    dense, mixtures = _layers(s, stage)
    layers = dense + mixtures
    mine = tokens * cfg.embed / s.size("tp")

    _attention(s, traffic, layers, tokens)
    shared = cfg.experts is not None and cfg.experts.shared > 0
    mlps = dense + (mixtures if shared or not cfg.experts else 0)
    read_later = mixtures if cfg.experts and cfg.experts.shared_gated else 0
    _gather_and_scatter(s, traffic, mine, mlps, again=mlps, scatters_again=read_later)
    # the embedding only scatters, the head only gathers
    ends = s.accumulate * (first + last)
    add(s, traffic, "all_gather", ("tp",), mine, s.compute, ends)
    add(s, traffic, "reduce_scatter", ("tp",), mine * s.size("tp"), s.compute, ends)
    if last:
        most = chunk_tokens(int(tokens), cfg.vocab // s.size("tp"))
        full, rest = divmod(int(tokens), most)
        for size, chunks in ((most, full), (rest, min(rest, 1))):
            for values in (1, 2):
                count = s.accumulate * chunks
                add(s, traffic, "all_reduce", ("tp",), values * size, wide(s.compute), count)

    there, back = [(mine, s.compute)], [(mine, s.compute)]
    if cfg.experts:
        _experts(s, traffic, mixtures, int(tokens / s.size("tp")))
        numbers = s.rows * cfg.experts.count
        count = len(cfg.stacked_layers) * cfg.experts.count
        there += [(count, torch.int64), (1, torch.int64)]
        if cfg.experts.aux:
            there += [(numbers, torch.int32), (numbers, wide(s.compute))]
            back += [(numbers, wide(s.compute))]
            row = ("cp", "ulysses", "tp")
            add(s, traffic, "all_reduce", row, numbers, wide(s.compute), s.accumulate * last)
    for elements, dtype in there:
        add(s, traffic, "receive", ("pp",), elements, dtype, s.accumulate * (not first))
        add(s, traffic, "send", ("pp",), elements, dtype, s.accumulate * (not last))
    for elements, dtype in back:
        add(s, traffic, "receive", ("pp",), elements, dtype, s.accumulate * (not last))
        add(s, traffic, "send", ("pp",), elements, dtype, s.accumulate * (not first))


def _layers(s: Setting, stage: int) -> tuple[int, int]:
    """How many layers with an MLP, and how many like the rest, a stage runs: of the latter an equal
    share, of a mixture's dense layers those that lie between."""
    stacked = s.cfg.stacked_layers
    here = len(stacked) // s.size("pp")
    begin = stacked[stage * here - 1] if stage else -1
    end = s.cfg.layers if stage == s.size("pp") - 1 else stacked[(stage + 1) * here - 1]
    return sum(begin < i < end for i in s.cfg.dense_layers), here


def _gather_and_scatter(
    s: Setting, traffic: Traffic, mine: float, count: int, *, again: int, scatters_again: int
) -> None:
    """Over tp, in `count` layers; backward, a gather is a scatter and the other way round.
    The other counts are of layers that do it when they are computed again."""
    if s.mode != "full":
        again = scatters_again = 0
    gathers, scatters = (s.accumulate * (2 * count + n) for n in (again, scatters_again))
    add(s, traffic, "all_gather", ("tp",), mine, s.compute, gathers)
    add(s, traffic, "reduce_scatter", ("tp",), mine * s.size("tp"), s.compute, scatters)


def _attention(s: Setting, traffic: Traffic, layers: int, tokens: float) -> None:
    cfg, latent, T, U = s.cfg, s.cfg.latent, s.size("tp"), s.size("ulysses")
    uses, again = s.accumulate * layers, s.accumulate * layers * (s.mode == "full")
    heads, kv_heads = cfg.heads // T, cfg.kv_heads // T
    mine = tokens * cfg.embed / T
    sent = kv_heads if kv_heads % U == 0 else U
    if latent is None:
        _gather_and_scatter(s, traffic, mine, layers, again=layers, scatters_again=layers)
        exchanged = (heads + 2 * sent) * cfg.head_dim, heads * cfg.head_dim
    else:
        kv = latent.kv + latent.rope
        small = tokens * ((latent.q or cfg.embed) + kv)
        add(s, traffic, "all_gather", ("tp",), small / T, s.compute, uses + again)
        add(s, traffic, "reduce_scatter", ("tp",), small, s.compute, uses)
        add(s, traffic, "all_gather", ("tp",), mine, s.compute, uses)
        add(s, traffic, "reduce_scatter", ("tp",), mine * T, s.compute, uses + again)
        add(s, traffic, "all_gather", ("ulysses",), tokens * kv, s.compute, uses + again)
        add(s, traffic, "reduce_scatter", ("ulysses",), tokens * kv * U, s.compute, uses)
        exchanged = heads * cfg.head_dim, heads * latent.value
    for width in exchanged:
        add(s, traffic, "all_to_all", ("ulysses",), tokens * width, s.compute, 2 * uses + again)

    # what ulysses has exchanged: all tokens of a rank of cp, and a share of the heads
    block = 2 * tokens * sent * cfg.head_dim
    hops = s.size("cp") - 1
    add(s, traffic, "permute", ("cp",), block, s.compute, hops * (2 * uses + again))
    add(s, traffic, "permute", ("cp",), block, wide(s.compute), hops * uses)


def _experts(s: Setting, traffic: Traffic, layers: int, tokens: int) -> None:
    """tokens: of one rank."""
    cfg, ep = s.cfg.experts, s.size("ep")
    assert cfg is not None
    uses, again = s.accumulate * layers, s.accumulate * layers * (s.mode == "full")

    def send(kind: Kind, elements: int, dtype: torch.dtype, count: int) -> None:
        add(s, traffic, kind, ("ep",), elements, dtype, count)

    if s.dispatch == "gather":
        for width, dtype in ((s.cfg.embed, s.compute), (cfg.top_k, wide(s.compute))):
            send("all_gather", tokens * width, dtype, uses + again)
            send("reduce_scatter", ep * tokens * width, dtype, uses)
        send("all_gather", tokens * cfg.top_k, torch.int32, uses + again)
        # the sums' way back
        send("reduce_scatter", ep * tokens * s.cfg.embed, s.compute, uses)
        send("all_gather", tokens * s.cfg.embed, s.compute, uses)
        return
    most = tokens * min(cfg.top_k, cfg.count // ep)
    slots = min(8 * math.ceil(1.25 * tokens * cfg.top_k / ep / 8), most)
    send("all_to_all", ep * slots * s.cfg.embed, s.compute, 4 * uses + again)
    send("all_to_all", ep * slots, wide(s.compute), 2 * uses + again)
    send("all_to_all", cfg.count, torch.int32, uses + again)
    if slots < most:
        send("all_reduce", 1, torch.int64, uses + again)

"""Generation with a decoder: a cache of static shape, one compiled layer called per layer.

Rows are padded on the left, so that all rows write their next token at the same cache index. Of a
model with a tower, images and videos are looked at once, with the prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from attrs import frozen
from jaxtyping import Float, Int
from torch import Tensor

from omnistep.core import rng
from omnistep.core.batch import Batch, Patches, segment_starts
from omnistep.core.compile import compile_graph
from omnistep.core.param import one_rank
from omnistep.core.tree import Tree, tree_map
from omnistep.models.attention import attention, decode_attention
from omnistep.models.block import Ranks, add_experts, add_mlp, attention_output, project
from omnistep.models.config import Config, Tower
from omnistep.models.decoder import output_name, rope, rope_positions
from omnistep.models.layers import at_least_fp32, rms_norm
from omnistep.models.params import params
from omnistep.models.stack import unstack
from omnistep.models.vision import make_see

ONE_RANK = Ranks()
CACHE_STEP = 256
"""Cache lengths are multiples of this: a conversation that grows compiles rarely."""
PROMPT_STEP = 32
"""Prompts are padded to multiples of this, and patches to those that become so many tokens."""


@frozen(eq=False)
class Prompt:
    """What an answer follows: tokens, and the images and videos among them."""

    ids: Sequence[int]
    patches: Patches | None = None
    """Of one row, in which `units` has as many tokens as `ids`; filler is not needed."""
    rope: Int[Tensor, "tokens 3"] | None = None
    """The positions of the tokens, for models that have three (Config.rope_axes); None: those of
    text."""


@frozen
class Sampling:
    """How the next token is drawn. Not `do_sample`: always the likeliest."""

    do_sample: bool = True
    temperature: float = 1.0
    top_p: float = 1.0


def choose(
    logits: Float[Tensor, "rows vocab"],
    key: Tensor,
    step: Int[Tensor, ""],
    rows_seen: Int[Tensor, ""],
    sampling: Sampling,
) -> Int[Tensor, " rows"]:
    """The next token of each row.

    With sampling: from the smallest set of likeliest tokens whose probability reaches top_p
    (arXiv 1904.09751), by the Gumbel-max trick. The noise of a token is a function of (key, step,
    index of the row among all prompts): it does not depend on which rows share a batch.
    """
    if not sampling.do_sample:
        return logits.argmax(-1)
    z = at_least_fp32(logits) / sampling.temperature
    if sampling.top_p < 1.0:
        likely, order = z.softmax(-1).sort(-1, descending=True)
        beyond = likely.cumsum(-1) - likely >= sampling.top_p
        z = z.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    rows = [
        rng.uniform(rng.fold_in(rng.fold_in(key, rows_seen + i), step), (z.shape[-1],), z.dtype)
        for i in range(z.shape[0])
    ]
    tiny = torch.finfo(z.dtype).tiny
    return (z - (-torch.stack(rows).clamp(min=tiny).log()).log()).argmax(-1)


def _feed_forward(x: Tensor, w: Mapping[str, Tensor], cfg: Config) -> Tensor:
    """x and what its MLP or its experts make of it."""
    if "router" not in w:
        return add_mlp(x, w, cfg, ONE_RANK)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return add_experts(x, w, real, w.get("router_bias"), cfg, ONE_RANK)[0]


def _prefill_layer(
    x: Tensor,
    w: Mapping[str, Tensor],
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    cfg: Config,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = project(rms_norm(x, w["attn_norm"], cfg.norm_eps), w, cos, sin, cfg, ONE_RANK)
    scale, sinks = cfg.attention_scale, w.get("sinks")
    a = attention(q, k, v, starts, scale=scale, window=window, sinks=sinks)
    x = x + attention_output(a[..., : w["o"].shape[-1]], w)
    return _feed_forward(x, w, cfg), k, v


def make_decode_layer(cfg: Config, window: int | None) -> Callable[..., Tensor]:
    """(x [rows, 1, embed], weights, cos, sin, k_cache, v_cache, first [rows], at []) -> x. Writes
    the token's key and value into the caches at index `at`."""

    def decode_layer(x, w, cos, sin, k_cache, v_cache, first, at):
        q, k, v = project(rms_norm(x, w["attn_norm"], cfg.norm_eps), w, cos, sin, cfg, ONE_RANK)
        k_cache.index_copy_(1, at.view(1), k)
        v_cache.index_copy_(1, at.view(1), v)
        scale, sinks = cfg.attention_scale, w.get("sinks")
        a = decode_attention(
            q, k_cache, v_cache, first, at, scale=scale, window=window, sinks=sinks
        )
        x = x + attention_output(a[..., : w["o"].shape[-1]], w)
        return _feed_forward(x, w, cfg)

    return decode_layer


def layers_in_order(cfg: Config, weights: Tree, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Each layer's weights as `dtype`; a router's bias, which is exact, as it is."""
    stacks = {
        name: iter(unstack(tree_map(lambda w: w.to(dtype), weights[name])))
        for name in ("layers", "dense_layers")
        if name in weights
    }
    dense = cfg.dense_layers
    layers = [next(stacks["dense_layers" if i in dense else "layers"]) for i in range(cfg.layers)]
    if "router_bias" in weights:
        for i, bias in zip(cfg.stacked_layers, weights["router_bias"], strict=True):
            layers[i]["router_bias"] = bias
    return layers


Generate = Callable[..., Iterator[list[int]]]


def make_generate(
    cfg: Config, weights: Tree, sampling: Sampling, *, dtype: torch.dtype, compile: bool = True
) -> Generate:
    """generate(prompts, max_tokens, key, rows_seen=0) -> one token per prompt, again and again.

    `prompts` are those of `join_prompts`; `rows_seen` is the index of the first of them among all
    prompts of the run. The iterator ends after `max_tokens` tokens; the caller stops
    earlier, and ignores a row that has said its last word. Keep the function: what it compiled
    serves later calls.
    """
    maybe_compile = compile_graph if compile else lambda function: function
    windows = cfg.windows or (None,) * cfg.layers
    layers = layers_in_order(cfg, weights, dtype)
    kinds = [("router" in w, window) for w, window in zip(layers, windows, strict=True)]
    compiled = {kind: maybe_compile(make_decode_layer(cfg, kind[1])) for kind in set(kinds)}
    embed = weights["embed"]
    final_norm = weights["final_norm"].to(dtype)
    head = weights[output_name(weights)].to(dtype)

    def pick(x: Tensor, key: Tensor, step: Tensor, rows_seen: Tensor) -> Tensor:
        logits = F.linear(rms_norm(x[:, -1], final_norm, cfg.norm_eps), head)
        return choose(logits, key, step, rows_seen, sampling)

    pick = maybe_compile(pick)
    see = make_see(cfg, one_rank(params(cfg), dtype), "none", compile=False) if cfg.tower else None

    def start(batch: Batch, length: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Runs the prompts; the caches of each layer are [rows, length, kv_heads, head_dim]."""
        rows, seq = batch.tokens.shape
        starts = segment_starts(batch)
        cos, sin = rope(cfg, rope_positions(cfg, batch), dtype)
        x, deepstack = F.embedding(batch.tokens, embed).to(dtype), None
        if see is not None and batch.patches is not None:
            x, deepstack = see(weights, x, batch)
        added = () if deepstack is None else deepstack.unbind(2)
        k_caches, v_caches = [], []
        for i, (w, window) in enumerate(zip(layers, windows, strict=True)):
            x, k, v = _prefill_layer(x, w, cos, sin, starts, cfg, window)
            x = x + added[i] if i < len(added) else x
            for caches, part in ((k_caches, k), (v_caches, v)):
                cache = x.new_zeros(rows, length, *part.shape[2:])
                cache[:, :seq] = part
                caches.append(cache)
        return x, k_caches, v_caches

    def generate(
        prompts: Sequence[Prompt], max_tokens: int, key: Tensor, rows_seen: int = 0
    ) -> Iterator[list[int]]:
        device = embed.device
        batch = join_prompts(prompts, cfg, device)
        seq = batch.tokens.shape[1]
        length = -(-(seq + max_tokens) // CACHE_STEP) * CACHE_STEP
        first = segment_starts(batch)[:, -1].long()
        # not after the largest: a video's time may run ahead of the text behind it
        follows = rope_positions(cfg, batch)[:, -1:] + 1
        key = key.to(device)
        number = torch.tensor(rows_seen, device=device)
        with torch.no_grad():
            x, k_caches, v_caches = start(batch, length)
            for step in range(max_tokens):
                token = pick(x[:, -1:], key, torch.tensor(step, device=device), number)
                yield token.tolist()
                if step == max_tokens - 1:
                    return
                at = torch.tensor(seq + step, device=device)
                cos, sin = rope(cfg, follows + step, dtype)
                x = F.embedding(token[:, None], embed).to(dtype)
                for i, (w, kind) in enumerate(zip(layers, kinds, strict=True)):
                    x = compiled[kind](x, w, cos, sin, k_caches[i], v_caches[i], first, at)

    return generate


def join_prompts(prompts: Sequence[Prompt], cfg: Config, device: torch.device) -> Batch:
    """The prompts as rows, padded on the left. Nothing is to be learnt of it.

    Raises ValueError: no prompt or an empty one; patches for a model that has no tower, or without
    the positions or the windows that it needs.
    """
    if not prompts or not all(prompt.ids for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    for prompt in prompts:
        _check_prompt(prompt, cfg)
    longest = max(len(prompt.ids) for prompt in prompts)
    seq = -(-longest // PROMPT_STEP) * PROMPT_STEP
    lacking = [seq - len(prompt.ids) for prompt in prompts]
    rows = [[0] * n + list(prompt.ids) for n, prompt in zip(lacking, prompts, strict=True)]
    tokens = torch.tensor(rows, device=device)
    index = torch.arange(seq, dtype=torch.int32, device=device)
    # a token of the padding is a sample of its own, and costs nothing
    positions = (index - torch.tensor(lacking, device=device)[:, None]).clamp(min=0)
    three = None
    if cfg.rope_axes:
        three = positions.int().unsqueeze(-1).repeat(1, 1, 3)
        for row, n, prompt in zip(three, lacking, prompts, strict=True):
            if prompt.rope is not None:
                row[n:] = prompt.rope.to(device)
    return Batch(
        tokens,
        targets=tokens,
        weights=torch.zeros(tokens.shape, device=device),
        positions=positions,
        rope=three,
        patches=_join_patches(prompts, cfg.tower, lacking, device) if cfg.tower else None,
    )


def _check_prompt(prompt: Prompt, cfg: Config) -> None:
    if prompt.patches is None:
        return
    if cfg.tower is None:
        raise ValueError("a prompt has images, but the model has no tower to look at them")
    if cfg.rope_axes and prompt.rope is None:
        raise ValueError("a prompt with images needs `rope`, the three positions of its tokens")
    if cfg.tower.window and prompt.patches.windows is None:
        raise ValueError("the tower attends within windows, but the Patches of a prompt have none")
    if prompt.patches.units.shape != (1, len(prompt.ids)):
        raise ValueError(
            f"Patches.units of a prompt of {len(prompt.ids)} tokens must be of shape "
            f"(1, {len(prompt.ids)}), got {tuple(prompt.patches.units.shape)}"
        )


def _join_patches(
    prompts: Sequence[Prompt], tower: Tower, lacking: Sequence[int], device: torch.device
) -> Patches | None:
    """The patches of all prompts, as many a row; None where no prompt has any."""
    given = [p.patches.pixels.shape[1] for p in prompts if p.patches is not None]
    if not given:
        return None
    step = PROMPT_STEP * tower.unit
    count, rows, seq = -(-max(given) // step) * step, len(prompts), lacking[0] + len(prompts[0].ids)
    alone = torch.arange(count, dtype=torch.int32, device=device)
    bounds = torch.stack([alone, alone + 1], -1).repeat(rows, 1, 1)
    nowhere = torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=device)
    joined = Patches(
        pixels=torch.zeros(rows, count, tower.values, dtype=torch.uint8, device=device),
        places=nowhere.repeat(rows, count, 1),
        frames=bounds,
        windows=bounds.clone() if tower.window else None,
        units=torch.full((rows, seq), -1, dtype=torch.int32, device=device),
    )
    for row, (n, prompt) in enumerate(zip(lacking, prompts, strict=True)):
        if prompt.patches is None:
            continue
        for name in ("pixels", "places", "frames", "windows"):
            whole, part = getattr(joined, name), getattr(prompt.patches, name)
            if whole is not None and part is not None:
                whole[row, : part.shape[1]] = part[0].to(device)
        joined.units[row, n:] = prompt.patches.units[0].to(device)
    return joined

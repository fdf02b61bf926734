"""What a decoder's training step costs, as its size says."""

import math

from omnistep.core.batch import Batch, positions
from omnistep.core.param import Param, is_param
from omnistep.core.tree import leaves_with_names
from omnistep.models.config import Config
from omnistep.models.params import params


def flops(cfg: Config, tokens: float, visible: float) -> float:
    """Model FLOPs of one training step: 6 per matrix weight that a token uses (2 forward, 4
    backward), and attention's products over `visible` pairs of tokens (causal: about seq/2 a
    token), which is what is needed; recomputation and masked pairs do not count."""
    table = 0 if cfg.tied else cfg.vocab * cfg.embed  # is looked up, not multiplied by
    value = cfg.latent.value if cfg.latent else cfg.head_dim
    products = 6.0 * cfg.layers * cfg.heads * (cfg.head_dim + value)
    return 6.0 * (active(cfg) - table) * tokens + products * visible


def active(cfg: Config) -> float:
    """Weights of matrices that one token uses: of the experts those it is sent to."""
    named = leaves_with_names(params(cfg), is_leaf=is_param)
    return sum(math.prod(p.shape) * _share(p, cfg) for p in named.values() if p.decay)


def _share(p: Param, cfg: Config) -> float:
    return cfg.experts.top_k / cfg.experts.count if cfg.experts and "experts" in p.axes else 1.0


def visible_pairs(batch: Batch, cfg: Config) -> float:
    """How many (query, key) pairs attention looks at in a batch, averaged over the layers."""
    seen = positions(batch).double() + 1
    windows = cfg.windows or (None,)
    return sum((seen if w is None else seen.clamp(max=w)).sum().item() for w in windows) / len(
        windows
    )

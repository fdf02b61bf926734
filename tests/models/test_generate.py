"""Generation: greedy against transformers, sampling against its own definition."""

import pytest
import torch

from omnistep.core import rng
from omnistep.models.generate import Prompt, Sampling, choose, make_generate
from tests.models import test_families
from tests.models.reference import imported
from tests.models.test_decoder import CASES, reference

GREEDY = Sampling(do_sample=False)
PROMPTS = [[5, 17, 3, 80, 9, 9, 41], [7], list(range(2, 40))]


def load(case: str):
    make = reference if case in CASES else test_families.reference
    model, cfg = make(case, torch.float32)
    return model.eval(), cfg, imported(model, cfg, torch.float32)


def collect(generate, prompts, count, seed=0, rows_seen=0):
    """The tokens after each prompt, which is a Prompt or its ids."""
    made = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
    steps = list(generate(made, count, rng.key(seed), rows_seen))
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize(
    ("case", "compile"),
    [
        ("qwen3", False),
        ("qwen2-window", False),
        ("llama3", False),
        ("mistral", False),
        pytest.param("qwen3", True, marks=pytest.mark.slow),
        ("mixtral-window", False),
        ("qwen2_moe-dense", False),
        ("deepseek_v2-groups", False),
        ("deepseek_v3", False),
        pytest.param("deepseek_v3", True, marks=pytest.mark.exhaustive),
        ("qwen3_moe", False),
        ("deepseek_v3-yarn", False),
        ("gpt_oss", False),
    ],
)
def test_greedy_equals_transformers(case, compile):
    model, cfg, weights = load(case)
    generate = make_generate(cfg, weights, GREEDY, dtype=torch.float32, compile=compile)
    together = collect(generate, PROMPTS, 20)
    for prompt, ours in zip(PROMPTS, together, strict=True):
        theirs = model.generate(  # pyright: ignore[reportCallIssue]
            torch.tensor([prompt]),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert ours == theirs[0, len(prompt) :].tolist()


def test_sampling_is_a_function_of_the_seed_and_not_of_the_batch():
    _, cfg, weights = load("qwen3")
    generate = make_generate(
        cfg, weights, Sampling(temperature=1.5, top_p=0.9), dtype=torch.float32, compile=False
    )
    together = collect(generate, PROMPTS, 12, seed=3)
    assert collect(generate, PROMPTS, 12, seed=3) == together
    assert collect(generate, PROMPTS, 12, seed=4) != together
    alone = [
        collect(generate, [prompt], 12, seed=3, rows_seen=i)[0] for i, prompt in enumerate(PROMPTS)
    ]
    assert alone == together


def test_samples_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -9.0]).expand(4000, 5).contiguous()
    zero = torch.tensor(0)
    tokens = choose(logits, rng.key(1), zero, zero, Sampling(temperature=0.7))
    expected = (logits[0] / 0.7).softmax(-1)
    assert (tokens.bincount(minlength=5) / 4000 - expected).abs().max() < 0.025


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(500, 4).contiguous()
    zero = torch.tensor(0)
    draw = lambda p: set(choose(logits, rng.key(1), zero, zero, Sampling(top_p=p)).tolist())  # noqa: E731
    assert draw(0.5) == {1}
    assert draw(0.6) == {1, 3}
    assert draw(0.8) == {1, 2, 3}
    assert draw(1.0) == {0, 1, 2, 3}


def test_an_empty_prompt_is_refused():
    _, cfg, weights = load("qwen3")
    generate = make_generate(cfg, weights, GREEDY, dtype=torch.float32, compile=False)
    with pytest.raises(ValueError, match="at least one token"):
        next(generate([Prompt([1]), Prompt([])], 4, rng.key(0)))

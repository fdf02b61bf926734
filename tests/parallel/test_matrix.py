"""Every mesh gives the numbers of one rank: every parameter and moment, loss and gradient norm.

`python -m tests.parallel.test_matrix > docs/parity.md` writes the table.
"""

import functools

import pytest

from tests.parallel.cases import ALL, COMPILED
from tests.parallel.matrix import Case, run

EAGER = [case for case in ALL if not case.compile]
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}


@functools.cache
def eager() -> dict[str, dict[str, float]]:
    return run(EAGER)


@functools.cache
def compiled() -> dict[str, dict[str, float]]:
    return run(COMPILED)


def assert_equal(case: Case, errors: dict[str, float]) -> None:
    wrong = {n: e for n, e in errors.items() if n != "seconds" and not e < TOLERANCE[case.dtype]}
    assert len(errors) > 30
    assert not wrong, wrong


@pytest.mark.parametrize("case", EAGER, ids=str)
def test_mesh_equals_one_rank(case):
    assert_equal(case, eager()[str(case)])


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_mesh_equals_one_rank(case):
    assert_equal(case, compiled()[str(case)])


HEAD = """# Every mesh against one rank

Written by `python -m tests.parallel.test_matrix > docs/parity.md`; `pytest tests/parallel` holds it.

The same seed, the same global batch of 24 rows of 32 tokens, three steps of AdamW at a learning
rate of 1e-2, on gloo ranks. The error is the largest over all leaves of the parameters and of both
moments, and over the losses and gradient norms: the norm of the difference over the norm of what
one rank has. Held to 1e-10 in fp64 and 1e-5 in fp32.

| mesh | strategy | model | batch | accumulated | remat | run | error | where |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    print(HEAD, end="")
    results = eager() | compiled()
    for case in ALL:
        errors = {n: e for n, e in results[str(case)].items() if n != "seconds"}
        worst = max(errors, key=lambda name: errors[name])
        cells = [
            case.sizes,
            f"{case.strategy}{', one message a layer' if case.bucket else ''}",
            f"{case.model}, {case.dtype}",
            "packed" if case.packed else "padded",
            str(case.accumulate),
            case.mode,
            "compiled" if case.compile else "eager",
            f"{errors[worst]:.1e}",
            worst,
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

"""What is wrong with a configuration, and the error that says so."""

from attrs import frozen


@frozen
class Problem:
    """One thing that is wrong: the arguments it is about (maybe none), and what to do."""

    names: tuple[str, ...]
    text: str


class ConfigError(Exception):
    """The configuration cannot be run; str() of it is the whole message, one line a problem."""

    def __init__(self, problems: list[str]):
        self.problems = tuple(problems)
        many = f"{len(problems)} problems in the configuration:"
        super().__init__(problems[0] if len(problems) == 1 else "\n  - ".join([many, *problems]))

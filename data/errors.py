"""The one error of this folder: something the user gave cannot be read as training data."""


class DataError(ValueError):
    """Says which file (and line) is wrong, what is allowed, and what to do."""

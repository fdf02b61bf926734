"""The error of this folder: something the user gave cannot be read as training data."""


class DataError(ValueError):
    """Says which file (and line) is wrong, what is allowed, and what to do."""


class NothingToLearn(DataError):
    """A record is sound, but the model is to learn nothing of it: it is left out and counted."""

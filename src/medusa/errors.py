"""Errors: each message is one line that says what was got, what was wanted and the remedy."""


class MedusaError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line and exits 1."""


class InvalidInput(MedusaError, ValueError):
    """An argument, prompt or option that cannot be used."""


class UnexpectedKeyword(InvalidInput, TypeError):
    """A keyword that the function does not know."""


class ContextOverflow(InvalidInput):
    """The request does not fit the backbone's context."""


class InvalidTree(InvalidInput):
    """A tree that is malformed or does not fit the heads."""


class ConfigError(MedusaError, ValueError):
    """An unknown key or a value of the wrong kind in a configuration."""


class CheckpointError(MedusaError, ValueError):
    """A checkpoint that is missing, broken, unsafe or made for another model."""


class UnsupportedBackbone(MedusaError, ValueError):
    """A model on which tree decoding would be wrong; the message names the reason."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What another library's error says, in one line of at most so many characters; its name where it says nothing."""
    said = " ".join(str(error).split())
    if isinstance(error, LookupError) or not said:  # a key alone tells nobody anything
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= most else said[: most - 1] + "…"

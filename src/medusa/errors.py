"""Errors: each message is one line that says what was found, what was expected and how to fix it."""


class MedusaError(Exception):
    """Base of every error raised on purpose; the command line prints it as one line and exits with status 1."""


class InvalidInput(MedusaError, ValueError):
    """An argument, prompt or option that cannot be used."""


class UnexpectedKeyword(InvalidInput, TypeError):
    """A keyword argument that the function does not have."""


class ContextOverflow(InvalidInput):
    """The request does not fit the backbone's context."""


class InvalidTree(InvalidInput):
    """A tree that is malformed or does not fit the heads."""


class ConfigError(MedusaError, ValueError):
    """An unknown key or a value of the wrong kind in a configuration."""


class CheckpointError(MedusaError, ValueError):
    """A checkpoint that is missing, broken, unsafe or made for another model."""


class UnsupportedBackbone(MedusaError, ValueError):
    """A model for which tree decoding would be wrong; the message gives the reason."""


class RankLost(MedusaError, RuntimeError):
    """Another process of a model that is shared out among several has ended."""


class UnsupportedEngine(MedusaError, RuntimeError):
    """An inference engine, or a setting of it, in which Medusa heads cannot draft; the message gives the reason."""


def one_line(error: BaseException, most: int = 200) -> str:
    """Another library's error message in one line of at most `most` characters; the error's class if it has no message."""
    text = " ".join(str(error).split())
    if isinstance(error, LookupError) or not text:  # a KeyError's message is only the key
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= most else text[: most - 1] + "…"

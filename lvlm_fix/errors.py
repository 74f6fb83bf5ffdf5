"""The errors of the public API; each message says in one sentence what was wrong, where, and what to do."""


class UnsupportedModelError(ValueError):
    """The model belongs to no known family, or lacks something that a method needs."""


class AttachError(RuntimeError):
    """Methods cannot be attached as asked: nested, attached twice, or none given."""


class PromptError(ValueError):
    """Prompt and pictures do not fit together."""


class PictureError(ValueError):
    """A file or object is not a picture that can be read."""


class PremiseWarning(UserWarning):
    """What a method rests on is not true of the model or picture at hand."""

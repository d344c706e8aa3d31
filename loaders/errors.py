"""The one exception every model-file problem is reported with."""


class ModelLoadError(Exception):
    """A model cannot be loaded; the message is one line naming the file and the tensor or key."""

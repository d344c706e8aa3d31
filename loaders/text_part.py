"""Names of the text model in checkpoints that also hold what sees or hears."""

# As transformers wrote them up to 4.51, and since then.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}


def text_name(name: str) -> str | None:
    """The name a tensor has in a text model of its own; None for those of the other parts."""
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None

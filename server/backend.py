"""What the server needs of the engine's front-end (``squall.runtime.frontend.Frontend``)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from squall.loaders.tokenizer import Tokenizer
    from squall.runtime.frontend import Generation
    from squall.runtime.messages import ModelCard
    from squall.runtime.output import Delta
    from squall.runtime.params import SamplingParams


class Backend(Protocol):
    """A loaded model. All calls but ``render_chat`` and ``encode_*`` are made on the event loop;
    those three may also be called on a worker thread."""

    @property
    def card(self) -> "ModelCard": ...

    @property
    def tokenizer(self) -> "Tokenizer": ...

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The chat as one string. Raises TemplateError."""
        ...

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered chat."""
        ...

    def encode_text(self, text: str) -> list[int]:
        """Ids of a plain prompt."""
        ...

    def start(
        self,
        prompt_ids: list[int],
        params: "SamplingParams",
        on_delta: "Callable[[Delta], None]",
    ) -> "Generation":
        """Begin generating; ``on_delta`` is called on the event loop, never before this returns.

        Raises ParamError, EmptyPrompt, PromptTooLong, QueueFull, EngineDead.
        """
        ...

    def cancel(self, generation: "Generation") -> None:
        """Stop a generation; idempotent."""
        ...

    def unhealthy(self) -> str | None:
        """Why nothing can be generated any more, or None."""
        ...

    def close(self) -> None:
        """End the engine."""
        ...

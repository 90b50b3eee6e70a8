"""A page in the browser to talk with a model, of Gradio."""

import copy
import os
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported

import gradio as gr
from gradio.networking import setup_tunnel
from starlette.middleware import Middleware

from ..image_search_fromage import Segment
from ..index.index import FromageImageIndex
from .conversation import Conversation, similar
from .engine import Engine, QueueFullError
from .own_pictures import add_pictures, read_picture

EXAMPLES = ["a slice of pizza", "a cat", "the moon at night"]
_MAX_NEW_TOKENS = 32
_LOOKING = "…"  # in the place of pictures that are being looked for
_FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
# A gallery in a chat is as high as its pictures, shows the whole of them, and their names below. Gradio's button that
# shares a picture would upload it.
_CSS = """
[data-testid=bot] .grid-wrap {height: auto !important; min-height: 0 !important; max-height: none !important}
[data-testid=bot] .gallery-container {width: 28rem; max-width: 100%}
[data-testid=bot] .thumbnail-item {height: auto !important; aspect-ratio: auto !important; display: flex !important;
  flex-direction: column}
[data-testid=bot] .thumbnail-item img {object-fit: contain !important; aspect-ratio: 1; width: 100% !important;
  height: auto !important; margin: 0 !important}
[data-testid=bot] .caption-label {position: static !important; max-width: 100% !important; border: none !important;
  white-space: normal !important}
[data-testid=user] img {max-height: 10rem}
button[aria-label=Share] {display: none !important}
"""
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


class Demo:
    """What the page does; the page itself is [`blocks`].

    Args:
        engine ([`Engine`]): The model, and the index of the images that it may show.
        save_directory (`str`, *optional*): A folder for the index with people's own pictures. Everybody sees them then;
            without it they are in memory, each for the one who brought it.
    """

    def __init__(self, engine: Engine, save_directory: str | os.PathLike[str] | None = None):
        self.engine, self.save_directory = engine, save_directory
        self._saving = threading.Lock()

    def answer(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        conversation: Conversation | None,
        ret_bias: float,
        images_per_ret: int,
        remember: bool,
    ) -> Iterator[tuple[list[Any], Conversation]]:
        """Parts of the answer to show, as they come, and the conversation, which is the browser tab's own."""
        conversation = conversation or Conversation(self.engine)
        # What was started over, taken back or tried again is no longer in the history.
        conversation.rewind(_count_turns(history))
        yield [_LOOKING], conversation
        texts = [message["text"]] if message.get("text", "").strip() else []
        try:
            images = [read_picture(Path(file)) for file in message.get("files", [])]
            ends = self.engine.pipe.model.generation_config.eos_token_id
            ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
            parts: list[Any] = []
            for answer in conversation.stream(
                *images,
                *texts,
                remember=remember,
                ret_bias=ret_bias,
                images_per_ret=int(images_per_ret),
                max_new_tokens=_MAX_NEW_TOKENS,
                eos_token_id=[*ends, self.engine.pipe.processor.ret_token_id],  # pictures end an answer
            ):
                parts = _shown(answer)
                yield parts or [_LOOKING], conversation
            found = similar(self.engine, images[-1], int(images_per_ret), conversation.index) if images else []
            more: list[Any] = [] if parts else ["(The model wrote nothing.)"]
            if found:
                more += ["Not said by the model: the pictures that look most like yours.", _gallery(found)]
            if more:  # else all is shown: Gradio would write the same files anew while the browser reads them
                yield [*parts, *more], conversation
        except (ValueError, QueueFullError) as error:  # of the message, whose author can mend it
            yield [f"⚠ {error}"], conversation

    def add(self, files: list[str] | None, conversation: Conversation | None) -> tuple[str, None, Conversation]:
        """What to say about pictures that were uploaded, an empty upload, and the conversation."""
        conversation = conversation or Conversation(self.engine)
        index: Any = conversation.index
        if not files:
            return "Choose pictures first.", None, conversation
        if not isinstance(index, FromageImageIndex):
            return "There is no image index to add them to.", None, conversation
        try:
            if self.save_directory is None and index is self.engine.pipe.index:
                index = copy.copy(index)
            added, refused = add_pictures(self.engine, index, [Path(file) for file in files])
            if added and self.save_directory is not None:
                with self._saving:
                    index.save_pretrained(self.save_directory)
        except (ValueError, OSError) as error:
            return f"⚠ {error}", None, conversation
        conversation.index = index
        where = "in memory, for you alone" if self.save_directory is None else f"saved in {self.save_directory}"
        said = [f"Added {len(added)} ({where}): {', '.join(added)}."] if added else []
        return "\n\n".join([*said, *(f"⚠ {sentence}" for sentence in refused)]), None, conversation

    def blocks(self, title: str = "FROMAGe", examples: Sequence[str | dict[str, Any]] = EXAMPLES) -> gr.Blocks:
        """The page.

        Args:
            title (`str`): Its heading.
            examples: Messages to click: texts, or `{"text": ..., "files": [...]}`.
        """
        index = self.engine.pipe.index
        count = f"{len(index):,}" if isinstance(index, FromageImageIndex) else "no"
        with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as page:
            gr.Markdown(
                f"# {title}\nWrite something, and the model goes on: with text, and with pictures of its index "
                f"({count} of them) where it writes [RET]. Each picture has its name and its score, a cosine."
            )
            conversation = gr.State(None)
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    settings = _settings()
                    files = gr.File(file_count="multiple", file_types=["image"], label="Your own pictures", height=140)
                    button = gr.Button("Add to the index", elem_id="add")
                    told = gr.Markdown(elem_id="told")
                    button.click(self.add, [files, conversation], [told, files, conversation], api_visibility="private")
                with gr.Column(scale=3, min_width=420):
                    self._chat(conversation, settings, examples)
        return page

    def _chat(self, conversation: gr.State, settings: list[Any], examples: Sequence[str | dict[str, Any]]) -> None:
        chatbot = gr.Chatbot(
            render_markdown=False, height="65vh", min_height=420, show_label=False, buttons=[],
            placeholder="Pictures are shown once; the bin starts over.",
        )  # fmt: skip
        gr.ChatInterface(
            self.answer,
            multimodal=True,
            chatbot=chatbot,
            textbox=gr.MultimodalTextbox(
                file_count="multiple", file_types=["image"], placeholder="a cat", show_label=False, stop_btn=True
            ),
            additional_inputs=[conversation, *settings],
            additional_outputs=[conversation],
            examples=[[_as_example(each), None, *[None] * len(settings)] for each in examples],
            cache_examples=False,
            concurrency_limit=None,  # the model takes one after the other
            api_visibility="private",
        )


def mount(page: gr.Blocks, app: Any, max_file_size: int | None = None) -> None:
    """Put a page beside the API of a server, at `/`.

    It loads nothing from elsewhere, whatever Gradio's own files name.

    Args:
        max_file_size (`int`, *optional*): Bytes of a picture that somebody uploads.
    """
    kwargs = {"middleware": [Middleware(_LoadsNothingFromElsewhere)]}
    gr.mount_gradio_app(app, page, path="/", app_kwargs=kwargs, max_file_size=max_file_size, **_looks())


def launch(page: gr.Blocks) -> None:
    """Serve a page alone, where Gradio's environment variables say: as a Space does."""
    page.launch(quiet=True, **_looks())


def share(port: int) -> str:
    """A public address, by Gradio's relay, of what is served at `port` of this machine."""
    return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)


def _looks() -> dict[str, Any]:
    return {"theme": gr.themes.Default(**_FONTS), "css": _CSS, "ssr_mode": False, "footer_links": []}


class _LoadsNothingFromElsewhere:
    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


def _settings() -> list[Any]:
    """What a person may set, in the order in which [`Demo.answer`] takes it."""
    return [
        gr.Slider(-20, 20, value=0, step=0.5, label="How readily it shows pictures",
                  info="Added to the logit of [RET]. At 0 the model decides by itself.", elem_id="ret-bias"),
        gr.Slider(1, 6, value=3, step=1, label="Pictures at a time"),
        gr.Checkbox(
            label="It reads the whole conversation",
            info="Else it goes on from your message alone, as in training. Small models lose the thread otherwise.",
        ),
    ]  # fmt: skip


def _count_turns(history: Sequence[dict[str, Any]]) -> int:
    """Messages of the user; one with files and text is several entries in a row."""
    roles = [message["role"] for message in history]
    return sum(role == "user" and previous != "user" for role, previous in zip(roles, ["", *roles], strict=False))


def _as_example(example: str | dict[str, Any]) -> dict[str, Any]:
    return {"text": example, "files": []} if isinstance(example, str) else example


def _shown(answer: Sequence[Segment]) -> list[Any]:
    """An answer as Gradio shows it: texts, and galleries of the images of each `[RET]`."""
    shown: list[Any] = []
    images: list[Segment] = []
    for part in [*answer, None]:
        if images and (part is None or part.get("ret_index") != images[-1]["ret_index"]):
            shown.append(_gallery(images))
            images = []
        if part is not None and part["type"] == "image":
            images.append(part)
        elif part is not None:
            shown.append(part["text"] if part["type"] == "text" else _LOOKING)
    return shown


def _gallery(images: Sequence[Segment]) -> Any:
    """Images with their names and scores, or a sentence where none can be read."""
    items: list[Any] = [(image["image"], name_and_score(image)) for image in images if image["image"] is not None]
    if not items:
        return f"(Pictures that cannot be read: {', '.join(map(name_and_score, images))})"
    return gr.Gallery(items, columns=3, height="auto", object_fit="contain", interactive=False)


def name_and_score(image: Segment) -> str:
    """The caption of an image in its index, else its id, and its score."""
    caption = image["metadata"].get("caption")
    return f"{caption or Path(str(image['id'])).name}  {image['score']:.2f}"


__all__ = ["EXAMPLES", "Demo", "launch", "mount", "name_and_score", "share"]

"""What is asked of a model: text and images, as the prompt that it reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen

from omnistep.core.batch import Patches
from omnistep.data.chat import Template
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.images import open_clip
from omnistep.data.messages import PLACEHOLDERS, read_messages
from omnistep.data.patches import ImageRules
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.transform import Tokens, tokens_of
from omnistep.models.generate import Prompt

IMAGE = PLACEHOLDERS[False]


@frozen
class Question:
    """A text, and the images that stand in it where it says `<image>`, or before it."""

    text: str
    images: tuple[str, ...] = ()
    """Paths, or what else an image may be in data; see data.images.Source."""
    folder: str = ""
    """Where relative paths begin."""
    where: str = "the prompt"
    """For errors."""

    @property
    def content(self) -> str:
        """The text with a place for each image."""
        return IMAGE * (len(self.images) - self.text.count(IMAGE)) + self.text


@frozen(eq=False)
class Ask:
    """Makes prompts, as training makes samples."""

    tokenizer: Tokenizer
    rules: ImageRules | None
    """None: the model takes no images."""
    template: Template | None
    """None: text is continued as it is."""

    def once(self, question: Question) -> Prompt:
        """Raises DataError: an image can't be read, or the model takes none."""
        message = {"role": "user", "content": question.content}
        content: dict[str, Any] = {"messages": [message]}
        if question.images:
            content |= {"images": list(question.images)}
        return self.conversation(Record(content, question.where, folder=question.folder))

    def conversation(self, record: Record) -> Prompt:
        """The prompt after which the assistant speaks; without a template the last message alone.
        `record` has `messages`, and perhaps `images` for the places of `<image>` in them. Raises
        as `once`."""
        keys = None if self.rules is None else ("images",)
        content = record.content["messages"]  # pyright: ignore
        said = read_messages(record, content, "messages", keys)
        try:
            clips = [open_clip(source, record.folder) for source in said.sources]
            if self.template is None:
                text = self._plain(said.messages[-1]["content"])
            else:
                text = self.template.render(said.messages, add_generation_prompt=True)
            # without a template the tokenizer may put tokens of its own before a text
            tokens = tokens_of(
                text,
                (),
                clips,
                self.tokenizer,
                self.rules if clips else None,
                add_special_tokens=self.template is None,
            )
        except DataError as error:
            raise DataError(f"{record.where}: {error}") from error
        # an empty prompt begins as a document does: after the end of another
        return prompt_of(tokens) if len(tokens.ids) else Prompt([self.tokenizer.eos_id])

    def _plain(self, content: str | Sequence[Mapping[str, str]]) -> str:
        if isinstance(content, str):
            return content
        return "".join(
            part["text"] if part["type"] == "text" else self._place(part["type"])
            for part in content
        )

    def _place(self, kind: str) -> str:
        assert self.rules is not None
        image = self.rules.image_token if kind == "image" else self.rules.video_token
        around = (self.rules.vision_start, image, self.rules.vision_end)
        return "".join(self.tokenizer.text_of(token) for token in around if token is not None)


def prompt_of(tokens: Tokens) -> Prompt:
    """What the data side made of a sample, as what a model reads before it speaks."""
    ids, vision = tokens.ids.tolist(), tokens.vision
    if vision is None:
        return Prompt(ids)

    def row(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).unsqueeze(0)

    patches = Patches(
        pixels=row(vision.pixels),
        places=row(vision.places),
        frames=row(vision.frames),
        windows=None if vision.windows is None else row(vision.windows),
        units=row(vision.units),
    )
    return Prompt(ids, patches, None if vision.rope is None else torch.from_numpy(vision.rope))

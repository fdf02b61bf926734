"""bin/sample: lets a model speak. One prompt, a file of prompts, or an interactive session; about
images, where the model has a vision tower."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen

from omnistep.bin.ask import Ask, Question
from omnistep.bin.build import read_tokenizer
from omnistep.bin.image_rules import image_rules
from omnistep.bin.model import (
    DTYPES,
    Model,
    RunError,
    check_finite,
    read_model,
    read_weights,
    stop_tokens,
)
from omnistep.core import rng
from omnistep.core.cache import keep_compiled_code_private
from omnistep.core.config import SAMPLE, InferArguments, ModelArguments
from omnistep.core.config_errors import ConfigError
from omnistep.core.config_help import help_text
from omnistep.core.config_io import load, wants_help
from omnistep.core.screen import show, show_error, visible, write_all_characters
from omnistep.core.tree import Tree
from omnistep.data.chat import Message, Template, open_template
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.images import Source, open_clip
from omnistep.data.patches import ImageRules
from omnistep.data.tokenizer import Tokenizer
from omnistep.data.turns import turn_end
from omnistep.models.generate import Generate, Prompt, Sampling, make_generate
from omnistep.models.hf_config import ConfigJsonError
from omnistep.parallel.mesh import pick_device

LONGEST_LOOK = 16384
"""Images of one prompt are made smaller where they would take more tokens than this."""


@frozen(eq=False)
class Speaker:
    """A model ready to answer."""

    generate: Generate
    tokenizer: Tokenizer
    stops: frozenset[int]
    max_tokens: int
    key: torch.Tensor
    longest: int | None = None
    """Tokens of a prompt and its answer that the model was made for."""
    told: set[str] = field(factory=set)

    def answers(self, prompts: Sequence[Prompt], seen: int = 0) -> list[str]:
        """Each prompt's continuation; `seen` prompts of the run came before them."""
        said: list[list[int]] = [[] for _ in prompts]
        for tokens in self._steps(prompts, seen):
            for row, token in zip(said, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in said]

    def stream(self, prompt: Prompt, seen: int = 0) -> Iterator[str]:
        """One prompt's continuation, in pieces that end between characters."""
        ids: list[int] = []
        shown = ""
        for (token,) in self._steps([prompt], seen):
            if token is None:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # else a character is cut in two: wait for the rest
                yield text[len(shown) :]
                shown = text
        yield self.tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]

    def _steps(self, prompts: Sequence[Prompt], seen: int) -> Iterator[list[int | None]]:
        """One token per prompt, None once it has ended; until all have."""
        count = max(len(prompt.ids) for prompt in prompts) + self.max_tokens
        if self.longest is not None and count > self.longest and not self.told:
            self.told.add("long")
            show(
                f"a prompt and its answer have up to {count} tokens, but the model was made for "
                f"{self.longest} (max_position_embeddings): what lies behind may be worse",
                sys.stderr,
            )
        ended = [False] * len(prompts)
        for tokens in self.generate(prompts, self.max_tokens, self.key, seen):
            ended = [e or t in self.stops for e, t in zip(ended, tokens, strict=True)]
            yield [None if e else t for e, t in zip(ended, tokens, strict=True)]
            if all(ended):
                return


def make_speaker(
    infer: InferArguments,
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    template: Template | None = None,
) -> Speaker:
    """Makes a speaker that stops where the model's files say, and where a turn of `template` (of
    training, whose model has no such files yet) ends."""
    sampling = Sampling(infer.do_sample, infer.temperature, infer.top_p)
    dtype = DTYPES[infer.compute_dtype or "float32"]
    generate = make_generate(model.cfg, params, sampling, dtype=dtype, compile=infer.compile)
    stops = set(stop_tokens(model, tokenizer.eos_id))
    if template is not None and (end := turn_end(template, tokenizer)) is not None:
        stops.add(end)
    text = model.raw.get("text_config") or model.raw
    longest = text.get("max_position_embeddings")
    key = rng.key(infer.seed)
    return Speaker(generate, tokenizer, frozenset(stops), infer.max_tokens, key, longest)


def question_of(infer: InferArguments) -> Question:
    """infer.prompt and infer.image."""
    return Question(infer.prompt or "", tuple(infer.image.split(",")) if infer.image else ())


def continuation(infer: InferArguments, model: Model, params: Tree, ask: Ask) -> str:
    """What the model says after infer.prompt."""
    speaker = make_speaker(infer, model, params, ask.tokenizer, ask.template)
    return speaker.answers([ask.once(question_of(infer))])[0]


def main(argv: list[str] | None = None) -> int:
    write_all_characters()
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(SAMPLE))
        return 0
    try:
        keep_compiled_code_private()
        args = load(argv, world_size=1, cuda=torch.cuda.is_available(), command=SAMPLE).infer
        run(args)
    except ConfigError as error:
        show_error(error)
        return 2
    except (RunError, DataError, ConfigJsonError, OSError) as error:
        show_error(error)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def run(infer: InferArguments) -> None:
    if not Path(infer.model_path).is_dir():
        raise RunError(f"infer.model_path: there is no directory {infer.model_path}")
    questions = None
    if infer.prompt_file is not None:
        questions = list(read_questions(Path(infer.prompt_file)))
    elif infer.prompt is not None:
        questions = [question_of(infer)]
    place = ModelArguments(
        config_path=infer.model_path,
        model_path=infer.model_path,
        tokenizer_path=infer.tokenizer_path or infer.model_path,
    )
    model = read_model(place)
    tokenizer = read_tokenizer(place, model.cfg)
    chat = infer.chat or (questions is None and tokenizer.chat_template is not None)
    rules = rules_of(model)
    ask = Ask(tokenizer, rules, chat_template(tokenizer, rules) if chat else None)
    for question in questions or ():
        ask.once(question)  # images that can't be read are told of before the weights are
    dtype = DTYPES[infer.compute_dtype or "float32"]
    for note in model.notes:
        show(note, sys.stderr)
    params = read_weights(infer.model_path, model, dtype, pick_device())
    check_finite(params, infer.model_path)
    speaker = make_speaker(infer, model, params, tokenizer)
    if questions is None:
        interact(speaker, ask)
    elif infer.prompt_file is not None:
        answer_file(speaker, ask, questions, infer.batch_size)
    else:
        speak(speaker.stream(ask.once(questions[0])))


def rules_of(model: Model) -> ImageRules | None:
    """How images are prepared; None: the model takes none."""
    return image_rules(model, LONGEST_LOOK * (model.cfg.tower.unit if model.cfg.tower else 1))


def chat_template(tokenizer: Tokenizer, rules: ImageRules | None) -> Template:
    if tokenizer.chat_template is None:
        raise RunError(
            f"the tokenizer {tokenizer.path} has no chat template: leave infer.chat false to "
            "continue plain text"
        )
    return open_template("tokenizer", tokenizer, rules)


def read_questions(path: Path) -> Iterator[Question]:
    """What a .jsonl file asks (strings, or objects with "prompt" and perhaps "images"), or a text
    file's lines. Paths of images begin at the file's folder."""
    if not path.is_file():
        raise RunError(f"infer.prompt_file: there is no file {path}")
    try:
        # not splitlines: it also cuts at U+2028 and others, which JSON strings and prose may hold
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RunError(f"infer.prompt_file: {path} is not UTF-8: {error}") from None
    found = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = True
        yield _question(path, number, line) if path.suffix == ".jsonl" else Question(line)
    if not found:
        raise RunError(f"infer.prompt_file: {path} holds no prompt")


def _question(path: Path, number: int, line: str) -> Question:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RunError(f"{where}: not JSON: {error}") from None
    fields = value if isinstance(value, dict) else {"prompt": value}
    text, images = fields.get("prompt"), fields.get("images") or []
    if not isinstance(text, str):
        raise RunError(f'{where}: a prompt is a string, or an object with "prompt"')
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise RunError(f'{where}: "images" must be a list of paths or base64')
    return Question(text, tuple(images), str(path.parent), where)


def answer_file(speaker: Speaker, ask: Ask, questions: Sequence[Question], size: int) -> None:
    """One JSON object a line, in the order of the questions."""
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        answers = speaker.answers([ask.once(question) for question in part], start)
        for question, answer in zip(part, answers, strict=True):
            line = {"prompt": question.text, "answer": answer}
            print(json.dumps(line, ensure_ascii=False), flush=True)


@frozen
class Talk:
    """A conversation so far."""

    messages: tuple[Message, ...] = ()
    images: tuple[Any, ...] = ()
    """In the order of their places in the messages."""

    def turn(self, role: str, said: Question) -> "Talk":
        message = {"role": role, "content": said.content}
        return Talk((*self.messages, message), (*self.images, *said.images))

    @property
    def record(self) -> Record:
        images = {"images": list(self.images)} if self.images else {}
        return Record({"messages": list(self.messages), **images}, "the conversation")


def interact(speaker: Speaker, ask: Ask) -> None:
    """A chat, or without a chat template continuations, until `exit` or the end of input. What
    can't be done is told, and takes nothing away of what was said before."""
    commands = ["text to continue"]
    if ask.template is not None:
        commands = ["clear: forget what was said"]
    if ask.rules is not None:
        commands.append("image PATH: show an image with the next message")
    print("; ".join([*commands, "exit: leave"]))
    talk, shown = Talk(), ()
    for number, line in enumerate(_lines()):
        command, _, path = line.strip().partition(" ")
        if line.strip() == "exit":
            return
        if line.strip() == "clear":
            talk, shown = Talk(), ()
        elif command == "image" and path and ask.rules is not None:
            try:
                open_clip(Source(path.strip()), "").decode()
            except DataError as error:
                show(f"error: {error}")
            else:
                shown = (*shown, path.strip())
        else:
            asked = (talk if ask.template else Talk()).turn("user", Question(line, shown))
            try:
                prompt = ask.conversation(asked.record)
            except DataError as error:
                show(f"error: {error}")
                continue
            answer = speak(speaker.stream(prompt, number))
            talk, shown = asked.turn("assistant", Question(answer)), ()


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def speak(pieces: Iterable[str]) -> str:
    """Prints a stream as it comes; returns the whole. A terminal gets it visibly, a file or pipe as
    the model said it."""
    said, seen = [], visible if sys.stdout.isatty() else str
    for piece in pieces:
        print(seen(piece), end="", flush=True)
        said.append(piece)
    print()
    return "".join(said)


if __name__ == "__main__":
    sys.exit(main())

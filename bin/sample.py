"""bin/sample: lets a model speak. One prompt, a file of prompts, or an interactive session."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import frozen

from omnistep.bin.build import DTYPES, Model, RunError, read_model, read_tokenizer, read_weights
from omnistep.core import rng
from omnistep.core.config import SAMPLE, ConfigError, InferArguments, ModelArguments
from omnistep.core.config_help import help_text
from omnistep.core.config_io import load, wants_help
from omnistep.core.tree import Tree
from omnistep.data.chat import Message, open_template
from omnistep.data.errors import DataError
from omnistep.data.tokenizer import Tokenizer
from omnistep.models.generate import Generate, Sampling, make_generate
from omnistep.models.hf_config import ConfigJsonError
from omnistep.parallel.mesh import pick_device

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn in common chat templates, beside EOS."""


@frozen(eq=False)
class Speaker:
    """A model ready to answer."""

    generate: Generate
    tokenizer: Tokenizer
    stops: frozenset[int]
    max_tokens: int
    key: torch.Tensor
    add_special_tokens: bool
    """Whether the tokenizer adds its own (BOS) to a prompt; a chat template writes them itself."""

    def answers(self, prompts: Sequence[str], seen: int = 0) -> list[str]:
        """Each prompt's continuation; `seen` prompts of the run came before them."""
        said: list[list[int]] = [[] for _ in prompts]
        for tokens in self._steps(prompts, seen):
            for row, token in zip(said, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in said]

    def stream(self, prompt: str, seen: int = 0) -> Iterator[str]:
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

    def _steps(self, prompts: Sequence[str], seen: int) -> Iterator[list[int | None]]:
        """One token per prompt, None once it has ended; until all have."""
        # an empty prompt begins as a document does: after the end of another
        encoded = (self.tokenizer.encode(p, self.add_special_tokens) for p in prompts)
        ids = [tokens or [self.tokenizer.eos_id] for tokens in encoded]
        ended = [False] * len(prompts)
        for tokens in self.generate(ids, self.max_tokens, self.key, seen):
            ended = [e or t in self.stops for e, t in zip(ended, tokens, strict=True)]
            yield [None if e else t for e, t in zip(ended, tokens, strict=True)]
            if all(ended):
                return


def make_speaker(
    infer: InferArguments, model: Model, params: Tree, tokenizer: Tokenizer, *, chat: bool
) -> Speaker:
    sampling = Sampling(infer.do_sample, infer.temperature, infer.top_p)
    dtype = DTYPES[infer.compute_dtype or "float32"]
    generate = make_generate(model.cfg, params, sampling, dtype=dtype, compile=infer.compile)
    stops = {tokenizer.eos_id}
    eos = model.raw.get("eos_token_id")
    stops.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer.chat_template:
        ends = (tokenizer.token_id(end) for end in TURN_ENDS if end in tokenizer.chat_template)
        stops.update(end for end in ends if end is not None)
    key = rng.key(infer.seed)
    return Speaker(generate, tokenizer, frozenset(stops), infer.max_tokens, key, not chat)


def continuation(
    infer: InferArguments, model: Model, params: Tree, tokenizer: Tokenizer, prompt: str
) -> str:
    return make_speaker(infer, model, params, tokenizer, chat=False).answers([prompt])[0]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if wants_help(argv):
        print(help_text(SAMPLE))
        return 0
    try:
        args = load(argv, world_size=1, cuda=torch.cuda.is_available(), command=SAMPLE).infer
        run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, DataError, ConfigJsonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def run(infer: InferArguments) -> None:
    if not Path(infer.model_path).is_dir():
        raise RunError(f"infer.model_path: there is no directory {infer.model_path}")
    prompts = None if infer.prompt_file is None else list(read_prompts(Path(infer.prompt_file)))
    place = ModelArguments(
        config_path=infer.model_path, tokenizer_path=infer.tokenizer_path or infer.model_path
    )
    model = read_model(place)
    tokenizer = read_tokenizer(place, model.cfg)
    dtype = DTYPES[infer.compute_dtype or "float32"]
    params = read_weights(infer.model_path, model, dtype, pick_device())
    interactive = prompts is None and infer.prompt is None
    chat = infer.chat or (interactive and tokenizer.chat_template is not None)
    wrap = chat_wrapper(tokenizer) if chat else None
    speaker = make_speaker(infer, model, params, tokenizer, chat=chat)
    if prompts is not None:
        answer_file(speaker, prompts, infer.batch_size, wrap)
    elif infer.prompt is not None:
        prompt = infer.prompt
        show(speaker.stream(wrap([{"role": "user", "content": prompt}]) if wrap else prompt))
    else:
        interact(speaker, wrap)


Wrap = Callable[[Sequence[Message]], str]


def chat_wrapper(tokenizer: Tokenizer) -> Wrap:
    """Messages to the text after which the assistant speaks."""
    if tokenizer.chat_template is None:
        raise RunError(
            f"the tokenizer {tokenizer.path} has no chat template: leave infer.chat false to "
            "continue plain text"
        )
    template = open_template("tokenizer", tokenizer)
    return partial(template.render, add_generation_prompt=True)


def read_prompts(path: Path) -> Iterator[str]:
    """The prompts of a .jsonl file (strings, or objects with "prompt"), or a text file's lines."""
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
        yield _prompt(path, number, line) if path.suffix == ".jsonl" else line
    if not found:
        raise RunError(f"infer.prompt_file: {path} holds no prompt")


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RunError(f"{path}, line {number}: not JSON: {error}") from None
    value = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(value, str):
        raise RunError(f'{path}, line {number}: a prompt is a string, or an object with "prompt"')
    return value


def answer_file(speaker: Speaker, prompts: Sequence[str], size: int, wrap: Wrap | None) -> None:
    """One JSON object a line, in the order of the prompts."""
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        texts = [wrap([{"role": "user", "content": p}]) for p in part] if wrap else part
        for prompt, answer in zip(part, speaker.answers(texts, start), strict=True):
            print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False), flush=True)


def interact(speaker: Speaker, wrap: Wrap | None) -> None:
    """A chat, or without a chat template continuations, until `exit` or the end of input."""
    print("clear: forget what was said; exit: leave" if wrap else "text to continue; exit: leave")
    messages: list[Message] = []
    for turn, line in enumerate(_lines()):
        if line.strip() == "exit":
            return
        if line.strip() == "clear":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        answer = show(speaker.stream(wrap(messages) if wrap else line, turn))
        messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def show(pieces: Iterable[str]) -> str:
    """Prints a stream as it comes; returns the whole."""
    said = []
    for piece in pieces:
        print(piece, end="", flush=True)
        said.append(piece)
    print()
    return "".join(said)


if __name__ == "__main__":
    sys.exit(main())

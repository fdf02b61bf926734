"""Makes data/emoji from two npm packages; the same bytes every time.

npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0
python -m omnistep.data.make_emoji --images emoji-datasource-google-16.0.0.tgz \
    --captions emojibase-data-17.0.0.tgz --out data/emoji
"""

import argparse
import base64
import hashlib
import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from PIL import Image
from tokenizers import Tokenizer

from omnistep.data.make_tokenizer import save_tokenizer, train_tokenizer

SIDE, BORDER = 32, 1
"""Of a picture in the sheet, in pixels; each has a border around it."""
QUESTION = "<image>What is this?"

NEAR = 0.08
"""Two pictures that differ by less of their ink are near copies: see `difference`."""
LARGE_FAMILY = 12
"""What has more members is trained on: the held-out pictures are to be of many kinds."""
HELDOUT = 0.15
"""Of the other families' hashes, the part that is held out: about a tenth of all pictures. And of
the hashes of people in a skin tone."""
TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
"""Light to dark, as code points."""

VOCAB_SIZE = 1024
EOS = "<|endoftext|>"
SPECIALS = (
    EOS,
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- elif message.content is string -%}
{{- message.content + '<|im_end|>' -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@frozen(eq=False)
class Emoji:
    """One picture and what is said of it."""

    code: str
    """Its Unicode code points, as hexadecimal numbers joined by "-"."""
    caption: str
    category: str
    subgroup: str
    picture: np.ndarray
    """uint8 [height, width, 3], on white."""


def read_member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive) as opened:
        try:
            stream = opened.extractfile(f"package/{name}")
        except KeyError:
            stream = None
        if stream is None:
            raise SystemExit(f"{archive} has no {name}: give the packages that the README names")
        return stream.read()


def read_emoji(images: Path, captions: Path) -> list[Emoji]:
    """All emoji that have a picture, each followed by itself in the skin tones (where people are
    several, all in the same); in Unicode's order."""
    tiles = {}
    for entry in json.loads(read_member(images, "emoji.json")):
        for drawn in (entry, *entry.get("skin_variations", {}).values()):
            for code in (drawn["unified"], drawn["non_qualified"]):
                tiles[code] = (drawn["sheet_x"], drawn["sheet_y"])
    file = io.BytesIO(read_member(images, "img/google/sheets-256/32.png"))
    sheet = Image.open(file).convert("RGBA")
    names = json.loads(read_member(captions, "meta/groups.json"))
    messages = json.loads(read_member(captions, "en/messages.json"))
    categories = {group["order"]: group["message"] for group in messages["groups"]}
    found = []
    entries = json.loads(read_member(captions, "en/data.json"))
    for entry in (one for plain in entries for one in (plain, *plain.get("skins", ()))):
        # Without a group: letters of which flags are made. Components: skin tones and hair.
        category = categories.get(entry.get("group"))
        several = sum(part in TONES for part in entry["hexcode"].split("-")) > 1
        if category in (None, "components") or several or entry["hexcode"] not in tiles:
            continue
        found.append(
            Emoji(
                code=entry["hexcode"],
                caption=entry["label"].removeprefix("flag: "),
                category=category,
                subgroup=names["subgroups"][str(entry["subgroup"])],
                picture=_tile(sheet, *tiles[entry["hexcode"]]),
            )
        )
    return found


def _tile(sheet: Image.Image, column: int, row: int) -> np.ndarray:
    left, top = (number * (SIDE + 2 * BORDER) + BORDER for number in (column, row))
    # What reads pictures drops their transparency, and what lies under it is arbitrary.
    page = Image.new("RGBA", (SIDE, SIDE), "white")
    page.alpha_composite(sheet.crop((left, top, left + SIDE, top + SIDE)))
    return np.asarray(page.convert("RGB"))


# ---- families: what must not stand on both sides of the split ------------------------------

_PEOPLE = {"1F468", "1F469", "1F9D1"}
"""Man, woman, person."""
_NO_DIFFERENCE = {"FE0F", "200D", "2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
"""Joints, the signs of the sexes, facing right, and hair."""
_SERIES = {"arrow", "family", "keycap", "zodiac"}
"""Subgroups that are one thing in many states."""
_COLOURS = r"red|orange|yellow|green|blue|light blue|purple|brown|black|white|grey|pink"
_SIZES = r"large|medium|medium-small|small"


def toneless(code: str) -> str:
    """The code of the same emoji without a skin tone, nor the signs that only ask for a picture."""
    return "-".join(part for part in code.split("-") if part not in TONES | {"FE0F"})


def tone(code: str) -> str | None:
    return next((part for part in code.split("-") if part in TONES), None)


def named_families(emoji: Emoji) -> set[str]:
    """Names of the families that an emoji belongs to by what it is called."""
    parts = toneless(emoji.code).split("-")
    joined = "200D" in parts or parts[0] in _PEOPLE
    if joined:
        parts = ["person" if p in _PEOPLE else p for p in parts if p not in _NO_DIFFERENCE]
    names = {"code " + "-".join(parts)}
    if emoji.subgroup in _SERIES:
        names.add(f"series {emoji.subgroup}")
    if re.search(r"clock\b|thirty\b", emoji.caption):
        names.add("series clock")
    if re.search(r"\bmoon\b", emoji.caption):
        names.add("series moon")
    plain = re.sub(rf"\b({_COLOURS}|{_SIZES})\b[ -]?", "", emoji.caption)
    names.add(f"but for colour and size {emoji.category} {plain}")
    return names


def difference(pictures: np.ndarray) -> np.ndarray:
    """How much of their ink two pictures, or one and the other's mirror image, differ by.

    `pictures` [count, height, width, 3] -> [count, count], 0 (the same) to 1 (nothing in common):
    |a - b|^2 / (|a|^2 + |b|^2), where a and b are how far each value is from white.
    """
    ink = 1 - pictures.astype(np.float64) / 255
    plain, mirrored = (a.reshape(len(ink), -1) for a in (ink, ink[:, :, ::-1]))
    size = (plain**2).sum(-1)
    both = np.maximum(size[:, None] + size[None], 1e-9)
    common = np.maximum(plain @ plain.T, plain @ mirrored.T)
    return np.maximum(1 - 2 * common / both, 0)


def families(emoji: Sequence[Emoji]) -> list[int]:
    """For each the number of its family, which is that of its first member. Near copies are of one
    family, and what has a name of `named_families` in common, and so on from one to the next."""
    parent = list(range(len(emoji)))

    def first(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        low, high = sorted((first(i), first(j)))
        parent[high] = low

    members: dict[str, list[int]] = defaultdict(list)
    for i, one in enumerate(emoji):
        for name in named_families(one):
            members[name].append(i)
    for numbers in members.values():
        for i in numbers[1:]:
            join(numbers[0], i)
    near = difference(np.stack([one.picture for one in emoji])) < NEAR
    for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True):
        join(int(i), int(j))
    return [first(i) for i in range(len(emoji))]


def held_out(emoji: Sequence[Emoji], family: Sequence[int]) -> list[bool]:
    """Whether each is held out: whole families, by the SHA-256 of the first member's code."""
    size = np.bincount(family, minlength=len(emoji))

    def chosen(number: int) -> bool:
        return bool(size[number] <= LARGE_FAMILY and share(emoji[number].code) < HELDOUT)

    return [chosen(number) for number in family]


def share(code: str) -> float:
    """Where in its range the SHA-256 of a code is, 0 to 1."""
    digest = hashlib.sha256(code.encode("ascii")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split(emoji: Sequence[Emoji]) -> dict[str, list[Emoji]]:
    """What each file holds, in the given order: "train", "heldout" (whole families), and
    "heldout_tones" (people of "train" in a skin tone that "train" has of others).

    Skin tones are taken of the people in "train" alone, and not of those of whom two pictures are
    the same: their tone can't be seen.
    """
    plain = [one for one in emoji if tone(one.code) is None]
    apart = held_out(plain, families(plain))
    pictures: dict[str, list[bytes]] = defaultdict(list)
    for one in emoji:
        pictures[toneless(one.code)].append(one.picture.tobytes())
    seen = {toneless(one.code) for one, held in zip(plain, apart, strict=True) if not held}
    people = {code for code in seen if len(set(pictures[code])) == len(pictures[code])}
    found = {"train": [], "heldout": [], "heldout_tones": []}
    unseen = {one.code for one, held in zip(plain, apart, strict=True) if held}
    for one in emoji:
        if tone(one.code) is None:
            found["heldout" if one.code in unseen else "train"].append(one)
        elif toneless(one.code) in people:
            found["heldout_tones" if share(one.code) < HELDOUT else "train"].append(one)
    return found


# ---- what is written -----------------------------------------------------------------------


def png(picture: np.ndarray) -> bytes:
    """The smaller of the two lossless ways: a palette, where 256 colours are enough, or RGB."""
    image = Image.fromarray(picture)
    colours, index = np.unique(picture.reshape(-1, 3), axis=0, return_inverse=True)
    ways = [image]
    if len(colours) <= 256:
        indexed = Image.fromarray(index.reshape(picture.shape[:2]).astype(np.uint8), mode="P")
        indexed.putpalette(colours.astype(np.uint8).tobytes())
        ways.append(indexed)
    return min((_encoded(way) for way in ways), key=len)


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def record(emoji: Emoji) -> dict[str, Any]:
    """A conversation about one picture."""
    picture = base64.b64encode(png(emoji.picture)).decode("ascii")
    return {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": answer(emoji)},
        ],
        "images": [f"data:image/png;base64,{picture}"],
        "code": emoji.code,
        "subgroup": emoji.subgroup,
    }


def answer(emoji: Emoji) -> str:
    return f"{emoji.category}: {emoji.caption}"


def captions_alone(path: str) -> list[dict[str, Any]]:
    """The conversations of a file without their pictures: for `data.datasets_type`, to train a
    model that has to guess."""
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        question, said = json.loads(line)["messages"]
        blind = question["content"].removeprefix("<image>")
        found.append({"messages": [{**question, "content": blind}, said]})
    return found


def make_tokenizer(answers: Iterable[str]) -> Tokenizer:
    prompt = ["user\n", "assistant\n", QUESTION.removeprefix("<image>")]
    return train_tokenizer([*prompt, *answers], VOCAB_SIZE, SPECIALS)


def make_emoji(images: Path, captions: Path, out: Path) -> None:
    """Writes train.jsonl, heldout.jsonl, heldout_tones.jsonl and tokenizer/ under `out`."""
    files = split(read_emoji(images, captions))
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in files.items():
        lines = [json.dumps(record(one), ensure_ascii=False) + "\n" for one in chosen]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(chosen)} pictures")
    save_tokenizer(
        make_tokenizer(answer(one) for one in files["train"]),  # nothing of the held-out captions
        out / "tokenizer",
        eos="<|im_end|>",
        pad=EOS,
        others=SPECIALS[1:],
        chat_template=CHAT_TEMPLATE,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, required=True, help="emoji-datasource-google, .tgz")
    parser.add_argument("--captions", type=Path, required=True, help="emojibase-data, .tgz")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "emoji")
    arguments = parser.parse_args(argv)
    make_emoji(arguments.images, arguments.captions, arguments.out)


if __name__ == "__main__":
    main()

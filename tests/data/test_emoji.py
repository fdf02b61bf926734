"""The embedded pictures with captions, and their tokenizer."""

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path

import attrs
import numpy as np
import pytest
from PIL import Image

import omnistep.data.make_emoji as make_emoji
from omnistep.data.make_emoji import Emoji
from omnistep.data.tokenizer import load_tokenizer

EMOJI = Path(make_emoji.__file__).parent / "emoji"
SIDES = ("train", "heldout")
FILES = (*SIDES, "heldout_tones")


def read(line: str) -> Emoji:
    record = json.loads(line)
    (image,) = record["images"]
    scheme, data = image.split(",", 1)
    assert scheme == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
        picture = np.asarray(opened.convert("RGB"))
    question, said = record["messages"]
    assert question == {"role": "user", "content": make_emoji.QUESTION}
    category, caption = said["content"].split(": ", 1)
    return Emoji(record["code"], caption, category, record["subgroup"], picture)


@pytest.fixture(scope="module")
def emoji() -> dict[str, list[Emoji]]:
    lines = {n: (EMOJI / f"{n}.jsonl").read_text(encoding="utf-8").splitlines() for n in FILES}
    return {name: [read(line) for line in of] for name, of in lines.items()}


def test_sizes_and_content(emoji):
    assert [len(emoji[name]) for name in FILES] == [2923, 188, 220]
    assert {one.picture.shape for of in emoji.values() for one in of} == {(32, 32, 3)}
    counts = {name: Counter(one.category for one in emoji[name]) for name in SIDES}
    assert counts["train"].keys() == counts["heldout"].keys()
    assert len(counts["train"]) == 9
    assert counts["train"].most_common(1) == [("people & body", 1556)]
    assert counts["heldout"].most_common(1) == [("people & body", 35)]
    answers = [make_emoji.answer(one) for of in emoji.values() for one in of]
    assert len(set(answers)) == len(answers)
    readme = (EMOJI / "README.md").read_text(encoding="utf-8")
    assert "Apache License 2.0" in readme
    assert sum(file.stat().st_size for file in EMOJI.rglob("*")) < 4_500_000


def test_records_are_made_anew_to_the_byte(emoji):
    for name in FILES:
        lines = (EMOJI / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for line, one in list(zip(lines, emoji[name], strict=True))[::20]:
            assert json.dumps(make_emoji.record(one), ensure_ascii=False) == line


def test_nothing_held_out_has_a_near_copy_in_training(emoji):
    both = [*emoji["train"], *emoji["heldout"]]
    count = len(emoji["train"])
    apart = make_emoji.difference(np.stack([one.picture for one in both]))[:count, count:]
    assert apart.min() >= make_emoji.NEAR
    names = [
        {name for one in emoji[side] for name in make_emoji.named_families(one)} for side in SIDES
    ]
    # Families are made of nothing else, so none reaches across.
    assert not names[0] & names[1]


def test_held_out_tones_are_of_known_people_and_the_tones_of_others(emoji):
    train, apart = emoji["train"], emoji["heldout_tones"]
    tones = {name: [one for one in emoji[name] if make_emoji.tone(one.code)] for name in FILES}
    assert (len(tones["train"]), tones["heldout"], tones["heldout_tones"]) == (1205, [], apart)
    for name in ("train", "heldout_tones"):
        shares = [make_emoji.share(one.code) < make_emoji.HELDOUT for one in tones[name]]
        assert set(shares) == {name == "heldout_tones"}
    # Neither the caption nor the picture is known.
    assert not {one.code for one in apart} & {one.code for one in train}
    assert not {one.caption for one in apart} & {one.caption for one in train}
    seen = {one.picture.tobytes() for of in (train, emoji["heldout"]) for one in of}
    assert not {one.picture.tobytes() for one in apart} & seen
    # But each part of the caption is: of the same person, and of others in the same tone.
    for one in apart:
        assert any(make_emoji.toneless(one.code) == make_emoji.toneless(p.code) for p in train)
        tone = make_emoji.tone(one.code)
        same = [other.caption for other in tones["train"] if make_emoji.tone(other.code) == tone]
        (words,) = re.findall(r": [a-z-]+ skin tone", one.caption)
        assert len(same) > 200
        assert all(words in caption for caption in same)
    # And people of the families that are held out are in no file in any tone.
    codes = {make_emoji.toneless(one.code) for one in emoji["heldout"]}
    assert not codes & {make_emoji.toneless(one.code) for one in [*train, *apart]}


def test_captions_alone_are_the_same_without_pictures(emoji):
    found = make_emoji.captions_alone(str(EMOJI / "heldout.jsonl"))
    assert [row["messages"][1]["content"] for row in found] == [
        make_emoji.answer(one) for one in emoji["heldout"]
    ]
    assert {row["messages"][0]["content"] for row in found} == {"What is this?"}
    assert not any("images" in row for row in found)


def made(code: str, caption: str, picture: np.ndarray, subgroup: str = "other") -> Emoji:
    return Emoji(code, caption, "things", subgroup, picture)


def test_families_are_found_by_picture_and_by_name():
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    found = make_emoji.families(
        [
            made("1F600", "ball", noise[0]),
            made("1F601", "mirrored ball", noise[0][:, ::-1]),
            made("1F468-200D-1F33E", "man farmer", noise[1]),
            made("1F469-200D-1F33E-200D-27A1-FE0F", "woman farmer: facing right", noise[2]),
            made("1F4D7", "green book", noise[3]),
            made("1F4D8", "light blue book", noise[4]),
            made("1F550", "one o\u2019clock", noise[5]),
            made("1F551", "two-thirty", noise[6]),
            made("1F34E", "tree", noise[7]),
        ]
    )
    assert found == [0, 0, 2, 2, 4, 4, 6, 6, 8]


def test_difference_is_a_share_of_the_ink():
    white = np.full((4, 4, 3), 255, np.uint8)
    left, right, half = white.copy(), white.copy(), white.copy()
    left[:, :2], right[:, 1:3], half[:, :1] = 0, 0, 0
    found = make_emoji.difference(np.stack([left, left[:, ::-1], right, half]))
    assert np.allclose(found[0], [0, 0, 0.5, 1 / 3])


def test_large_families_are_trained_on():
    emoji = [made(f"{i:X}", f"thing {i}", np.zeros((1, 1, 3), np.uint8)) for i in range(400)]
    alone = make_emoji.held_out(emoji, range(400))
    assert 0.1 < np.mean(alone) < 0.2
    chosen = alone.index(True)
    assert not any(make_emoji.held_out(emoji, [chosen] * 400))
    twelve = [chosen if i < 12 else 399 for i in range(400)]
    assert sum(make_emoji.held_out(emoji, twelve)) == 12


def test_tones_are_taken_of_known_people_whose_pictures_all_differ():
    noise = np.random.default_rng(0).integers(0, 256, (1200, 4, 4, 3)).astype(np.uint8)
    people = [f"{0x1F000 + i:X}" for i in range(200)]
    codes = [
        "-".join((one, *tone)) for one in people for tone in [(), *zip(sorted(make_emoji.TONES))]
    ]
    emoji = [made(*pair) for pair in zip(codes, codes, noise, strict=True)]

    def in_tones(found: dict[str, list[Emoji]], *names: str) -> list[str]:
        of = [one.code for name in names for one in found[name] if make_emoji.tone(one.code)]
        return [make_emoji.toneless(code) for code in of]

    found = make_emoji.split(emoji)
    apart = {one.code for one in found["heldout"]}
    assert apart == {code for code in people if make_emoji.share(code) < make_emoji.HELDOUT}
    taken = in_tones(found, "train", "heldout_tones")
    assert Counter(taken) == {code: 5 for code in people if code not in apart}
    assert 0.1 < len(in_tones(found, "heldout_tones")) / len(taken) < 0.2
    # A tone that can't be seen: the picture is that of another tone.
    last = codes.index(taken[0]) + 5
    emoji[last] = attrs.evolve(emoji[last], picture=emoji[last - 1].picture)
    left = in_tones(make_emoji.split(emoji), "train", "heldout_tones")
    assert set(left) == set(taken) - {taken[0]}


def test_tokenizer_is_made_from_the_training_captions_alone(emoji):
    committed = json.loads((EMOJI / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    made = make_emoji.make_tokenizer(make_emoji.answer(one) for one in emoji["train"])
    assert json.loads(made.to_str()) == committed
    tokenizer = load_tokenizer(EMOJI / "tokenizer")
    assert tokenizer.vocab_size == make_emoji.VOCAB_SIZE
    assert [tokenizer.token_id(t) for t in make_emoji.SPECIALS] == list(range(7))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (2, 0)
    for one in emoji["heldout"]:
        text = make_emoji.answer(one)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_its_chat_template_is_read_by_transformers():
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(EMOJI / "tokenizer"))
    ours = load_tokenizer(EMOJI / "tokenizer")
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "video"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)

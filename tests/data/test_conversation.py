"""Conversations with images: the ids are those of transformers' processors, whatever way images are
given; the assistant's words alone are learnt."""

import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import BatchFeature, PreTrainedTokenizerFast, Qwen2VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin, VideosKwargs

from omnistep.data.chat import Template, builtin_templates, open_template
from omnistep.data.errors import DataError
from omnistep.data.files.records import Record
from omnistep.data.images import see
from omnistep.data.source import open_source
from omnistep.data.transform import Conversation, tokens_of
from omnistep.data.turns import learnt
from tests.data.pictured import PARTS, held, qwen_rules, write_tokenizer
from tests.data.test_images import encoded, picture

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Videos:
    """In the place of transformers' video processor, which needs torchvision: it is given how our
    own cuts the videos, so that only the text is compared."""

    model_input_names = ("pixel_values_videos",)
    valid_kwargs = VideosKwargs
    merge_size = temporal_patch_size = 2

    def __init__(self, clips, grids):
        self.metadata = [
            SimpleNamespace(fps=c.fps, sampled_fps=c.fps, frames_indices=np.arange(len(c.frames)))
            for c in clips
        ]
        self.grids = np.array([[g.time, g.rows, g.columns] for g in grids])

    def __call__(self, videos, **_):
        return BatchFeature({"video_grid_thw": self.grids, "video_metadata": self.metadata})


@pytest.mark.parametrize("family", [Qwen2VLProcessor, Qwen3VLProcessor])
def test_ids_are_those_of_the_processors(family, tokenizer, monkeypatch):
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer.path.removesuffix("tokenizer.json"))
    rules = qwen_rules(tokenizer, timestamps=family is Qwen3VLProcessor, max_patches=1 << 16)
    sizes = {"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels}
    template = open_template("tokenizer", tokenizer, rules)
    random = np.random.default_rng(0)
    for _ in range(12):
        parts, clips = [], []
        for _ in range(random.integers(0, 4)):
            video, text = bool(random.integers(0, 2)), str(random.choice(["", "hello", " a\n"]))
            size = (int(random.integers(30, 90)), int(random.integers(30, 90)))
            count = int(random.integers(2, 6)) if video else 1
            clips.append(held((picture(*size),) * count, video, float(random.integers(1, 5))))
            parts += [{"type": "text", "text": text}, {"type": "video" if video else "image"}]
        talk = [
            {"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]},
            {"role": "assistant", "content": "a cat <0.3"},
        ]
        _, grids = see(clips, rules)
        videos = [clip for clip in clips if clip.video]
        processor: Any = family(
            image_processor=Qwen2VLImageProcessorPil(size=sizes),
            tokenizer=theirs,
            video_processor=Videos(videos, [grid for grid in grids if grid.video]),
            chat_template=PARTS,
        )
        text = processor.apply_chat_template(talk)
        want = processor(
            text=[text],
            images=[clip.frames[0] for clip in clips if not clip.video] or None,
            videos=[[np.asarray(f) for f in clip.frames] for clip in videos] or None,
        )
        ours, spans = learnt(template, talk)
        assert ours == text
        tokens = tokens_of(ours, spans, clips, tokenizer, rules)
        assert tokens.ids.tolist() == want["input_ids"][0]
        assert tokens.learn is not None
        said = tokenizer.decode(tokens.ids[tokens.learn].tolist())
        assert said == "a cat <0.3<|im_end|>"


def test_built_in_templates_write_the_image(tokenizer):
    rules = qwen_rules(tokenizer)
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "hello"}, {"type": "video"}]},
    ]
    for name in builtin_templates():
        if name == "llama3":
            continue  # it needs tokens of its own
        template = open_template(name, tokenizer, rules)
        text, spans = learnt(template, talk)
        around = ("<|vision_start|>", "<|vision_end|>") if name == "qwen2vl" else ("", "")
        assert f"{'<|image_pad|>'.join(around)}\nwhat?" in text
        assert len(spans) == 1
        assert f"hello{'<|video_pad|>'.join(around)}" in text[slice(*spans[0])]
        # it says so by itself, where transformers renders it
        alone = Template(name, template.jinja, template.special_tokens)
        assert alone.render(talk) == text
        words = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert open_template(name, tokenizer).render(words) == template.render(words)
    qwen2vl = open_template("qwen2vl", tokenizer, rules)
    system = {"role": "system", "content": "You are a helpful assistant."}
    own = Template("", PARTS).render([system, *talk], add_generation_prompt=True)
    assert qwen2vl.render(talk, add_generation_prompt=True) == own.replace("what? ", "what?")


@pytest.mark.parametrize(
    ("jinja", "contents"),
    [
        (PARTS, "as given"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}", "texts"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", "texts"),
        (
            "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
            "{% if p.type == 'image' %}<|image_pad|>{% endif %}"
            "{{ p.text }}{% endfor %}{% endfor %}",
            "parts",
        ),
    ],
)
def test_a_template_gets_contents_as_it_takes_them(jinja, contents, tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text(jinja)
    template = open_template(str(tmp_path / "chat.jinja"), tokenizer, qwen_rules(tokenizer))
    assert template.contents == contents
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
        {"role": "user", "content": "hello"},
    ]
    text = template.render(talk)
    assert text.count("<|image_pad|>") == 1
    assert text.index("<|image_pad|>") < text.index("what?") < text.index("hello")
    assert open_template(str(tmp_path / "chat.jinja"), tokenizer).contents == contents


# ---- records -------------------------------------------------------------------------------

CAT, DOG = picture(60, 40, seed=1), picture(40, 60, seed=2)


def conversation(tokenizer, longest=1000, name="qwen2vl", keys=("images",), **rules):
    rules = qwen_rules(tokenizer, **rules)
    template = open_template(name, tokenizer, rules)
    return Conversation(tokenizer, longest, template, images=rules, image_keys=keys)


def piece_of(transform, record, where="") -> Any:
    (piece,) = transform(Record(record, where))
    return piece


def asked(*parts, answer: Any = "a cat"):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]


def said(text):
    return {"type": "text", "text": text}


def same(a, b):
    assert a.ids.tolist() == b.ids.tolist()
    assert a.learn.tolist() == b.learn.tolist()
    for name, value in attrs.asdict(a.vision, recurse=False).items():
        assert np.array_equal(value, getattr(b.vision, name)), name
    return True


def test_every_way_to_put_images_into_a_record(tokenizer, tmp_path):
    cat, dog = encoded(CAT), encoded(DOG)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/cat.png").write_bytes(cat)
    (tmp_path / "dog.png").write_bytes(dog)
    url = f"data:image/png;base64,{base64.b64encode(dog).decode()}"
    image, name = {"type": "image"}, "pictures/cat.png"
    words, rest = said("what is "), said(" in this image")
    records = [
        {"messages": asked(words, image | {"image": name}, rest, image | {"url": "dog.png"})},
        {
            "messages": asked(
                words,
                {"type": "image_url", "image_url": name},
                rest,
                {"type": "image_url", "image_url": {"url": url}},
            )
        },
        {"messages": asked(words, image, rest, image), "images": [name, "dog.png"]},
        {
            "messages": asked(said("what is <image> in this image<image>")),
            "images": [name, {"bytes": None, "path": "dog.png"}],
        },
        {
            "messages": [
                {"role": "user", "content": "what is <image> in this image<image>"},
                {"role": "assistant", "content": "a cat"},
            ],
            "images": [name, url],
        },
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    source = open_source(str(tmp_path / "a.jsonl"), ("messages",))
    transform = conversation(tokenizer)
    made: list[Any] = [transform(source[i])[0] for i in range(len(records))]
    assert all(same(made[0], other) for other in made[1:])
    clips = [held((CAT,)), held((DOG,))]
    assert np.array_equal(made[0].vision.pixels, see(clips, qwen_rules(tokenizer))[0])
    # columns hold every field of every row, most of them None
    asks, _ = records[2]["messages"]
    answers = {"role": "assistant", "content": [said("a cat")]}
    images = [{"bytes": cat, "path": None}, {"bytes": dog, "path": None}]
    table = pa.table({"messages": [[asks, answers]], "images": [images]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), ("messages",), beside=("images",))
    assert same(made[0], transform(source[0])[0])


def test_the_records_in_the_readme(tokenizer, tmp_path):
    (tmp_path / "cat.png").write_bytes(encoded(CAT))
    (shown,) = re.findall(r"```json\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "a.jsonl").write_text(shown)
    source = open_source(str(tmp_path / "a.jsonl"), ("messages",))
    pieces: list[Any] = [conversation(tokenizer)(source[i])[0] for i in range(2)]
    one, other = pieces
    assert one.vision.pixels.tolist() == other.vision.pixels.tolist()
    assert tokenizer.decode(one.ids[one.learn].tolist()) == "A cat.<|im_end|>"


def test_image_keys(tokenizer):
    messages = asked(said("<image>"))
    record = {"messages": messages, "pictures": CAT, "images": [DOG]}
    piece = piece_of(conversation(tokenizer, keys=("none", "pictures", "images")), record)
    assert np.array_equal(piece.vision.pixels, see([held((CAT,))], qwen_rules(tokenizer))[0])
    # a .csv has an empty text where there is none
    record = {"messages": asked(said("hello")), "images": ""}
    assert piece_of(conversation(tokenizer), record).vision is None
    # without a field of that name it is text
    record = {"messages": messages, "pictures": CAT}
    text = Conversation(tokenizer, 100, open_template("default", tokenizer))
    assert "<image>" in tokenizer.decode(piece_of(text, record).ids.tolist())
    piece = piece_of(conversation(tokenizer, keys=("none",)), record)
    assert piece.vision is None
    assert "<image>" in tokenizer.decode(piece.ids.tolist())


def test_videos(tokenizer):
    frames = [encoded(picture(56, 28, seed=i)) for i in range(3)]
    transform = conversation(tokenizer, tokens_per_second=4.0)
    ways = [
        {"messages": asked({"type": "video", "video": frames, "fps": 2})},
        {"messages": asked(said("<video>")), "videos": [{"frames": frames, "fps": 2.0}]},
        {"messages": asked({"type": "video"}), "videos": {"video": frames, "fps": 2}},
    ]
    made = [piece_of(transform, record) for record in ways]
    assert all(same(made[0], other) for other in made[1:])
    vision = made[0].vision
    assert vision.pixels.shape == (2 * 2 * 4, 1176)
    times = vision.rope[vision.units >= 0][:, 0]
    assert (times - times[0]).tolist() == [0, 0, 4, 4]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": asked(said("<image>")), "images": []}, "more places for images than the 0"),
        ({"messages": asked(said("a")), "images": [CAT]}, "has 1 images .* 0 places"),
        ({"messages": asked(said("<image>")), "images": [CAT, DOG]}, "has 2 images .* 1 places"),
        ({"messages": asked({"type": "image"})}, "more places for images"),
        ({"messages": asked({"type": "image", "image": "no.png"})}, "there is no image"),
        ({"messages": asked({"type": "image", "image": b"broken"})}, "can't be decoded"),
        ({"messages": asked(said("<|image_pad|>"))}, "1 times, but there are 0 images"),
        ({"messages": asked({"type": "video", "video": [CAT], "fps": "x"})}, "fps of a video"),
        ({"messages": asked({"type": "audio"})}, "of type text, image or video"),
    ],
)
def test_images_that_do_not_fit(record, message, tokenizer):
    with pytest.raises(DataError, match=f"^here.*{message}"):
        conversation(tokenizer)(Record(record, "here"))


def test_the_assistants_words_alone_are_learnt(tokenizer):
    messages = asked(
        {"type": "image", "image": CAT}, answer=[said("hello"), {"type": "image", "image": DOG}]
    )
    for name in ("qwen2vl", "default", "tokenizer"):
        if name == "tokenizer":  # it shows by markers around texts where a turn is
            messages[1]["content"].append(said(" world"))
        piece = piece_of(conversation(tokenizer, name=name), {"messages": messages})
        learnt = tokenizer.decode(piece.ids[piece.learn].tolist())
        assert learnt.strip().startswith("hello")
        assert "image_pad" not in learnt
        assert (piece.vision.units >= 0).sum() == 2 + 2


def test_a_cut_takes_no_image_away(tokenizer):
    messages = asked(said("hello world " * 20), {"type": "image", "image": CAT})
    transform = conversation(tokenizer)
    whole = piece_of(transform, {"messages": messages})
    first = int(np.argmax(whole.vision.units >= 0))
    end = int(np.flatnonzero(whole.learn)[-1]) + 1
    longest = end - first + 1
    piece = piece_of(conversation(tokenizer, longest), {"messages": messages})
    assert piece.cut == first - 1
    kept = slice(end - longest, end)
    assert piece.ids.tolist() == whole.ids[kept].tolist()
    assert piece.vision.units.tolist() == whole.vision.units[kept].tolist()
    assert piece.vision.rope.tolist() == (whole.vision.rope[kept] - piece.cut).tolist()
    assert piece.vision.rope[0].tolist() == [0, 0, 0]
    with pytest.raises(
        DataError, match=f"^here: it has {len(whole.ids)} tokens.* at token {first}"
    ):
        conversation(tokenizer, longest - 1)(Record({"messages": messages}, "here"))


def test_a_sample_over_the_budget(tokenizer):
    record = Record({"messages": asked(said("<image><image>")), "images": [CAT, DOG]}, "here")
    (piece,) = conversation(tokenizer, max_patches=12)(record)
    assert piece.patches <= 12
    with pytest.raises(DataError, match=r"^here: its images have 8 patches"):
        conversation(tokenizer, max_patches=4)(record)


def test_a_tokenizer_without_the_models_token(tokenizer):
    rules = attrs.evolve(qwen_rules(tokenizer), image_token=10**6)
    with pytest.raises(DataError, match="has no token of id 1000000"):
        open_template("default", tokenizer, rules)

"""bin/caption on the embedded images: its numbers are transformers', and its files are written."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omnistep.bin import caption
from omnistep.data.images import Source, open_clip
from tests.bin.runs import call, succeeded
from tests.bin.small_vlm import EMOJI, PLACE, TOKENIZER, chat, inputs_of, load_theirs, save_vlm

COUNT = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    save_vlm(folder)
    return folder


def records():
    lines = (EMOJI / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // COUNT]][:COUNT]


def expected(theirs, rows, pictures) -> tuple[float, list[str]]:
    """Nats per token, and greedy captions; `pictures`: the number of the record whose it is."""
    total, count, said = 0.0, 0, []
    for row, number in zip(rows, pictures, strict=True):
        text = row["messages"][1]["content"]
        images = []
        if number is not None:
            images = [open_clip(Source(rows[number]["images"][0]), "").frames[0]]
        asked = inputs_of(chat(PLACE * len(images) + "What is this?"), images)
        whole = inputs_of(chat(PLACE * len(images) + "What is this?") + text + "<|im_end|>", images)
        begin = asked["input_ids"].shape[1]
        with torch.no_grad():
            logits = theirs(**whole).logits[0, begin - 1 : -1]
            out = theirs.generate(**asked, max_new_tokens=8, do_sample=False)[0, begin:]
        total += F.cross_entropy(logits, whole["input_ids"][0, begin:], reduction="sum").item()
        count += len(logits)
        said.append(TOKENIZER.decode(out, skip_special_tokens=True).strip())
    return total / count, said


def test_numbers_are_those_of_transformers(model, tmp_path):
    rows = records()
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--max-tokens", "8", "--batch-size", "4", "--blind", str(model)]
    options += ["--grid", str(tmp_path / "grid.png"), "--json", str(tmp_path / "found.json")]
    out = succeeded(call(caption.main, [str(model), str(path), *options])).out
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    theirs = load_theirs(model)
    half = [(i + COUNT // 2) % COUNT for i in range(COUNT)]
    pictures = {"own": range(COUNT), "other": half, "none": [None] * COUNT, "blind": [None] * COUNT}
    assert [score["way"] for score in found["scores"]] == list(pictures)
    losses = []
    for score in found["scores"]:
        loss, said = expected(theirs, rows, pictures[score["way"]])
        assert score["nats_per_token"] == pytest.approx(loss, rel=1e-5)
        assert score["said"] == said
        assert f"{loss:.3f}" in out
        losses.append(loss)
    assert len(set(losses)) == 3
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_right_is_counted(monkeypatch):
    true = ["animals: cat", "animals: dog", "food: pie", "food: egg"]
    said = ["animals: cat", "animals: cow", "flags: pie", "food"]
    monkeypatch.setattr(caption, "losses", lambda *_: (12.0, 6.0))
    monkeypatch.setattr(caption, "captions", lambda *_: said)
    rows = [caption.Record({"messages": [{"content": text}]}, "") for text in true]
    score = caption.score("own", None, rows, ": ", 8)  # pyright: ignore
    assert (score.nats_per_token, score.nats_per_caption) == (2.0, 3.0)
    assert (score.category, score.caption) == (0.75, 0.25)


def test_others_images_are_of_another_caption():
    captions = ["animals: cat", "animals: dog", "animals: cat", "animals: pig"]
    rows = [
        caption.Record({"messages": [{"content": text}], "images": [number]}, "")
        for number, text in enumerate(captions)
    ]
    found = [caption.fields_of(r)["images"] for r in caption.with_others_images(rows)]
    assert found == [[3], [3], [1], [1]]


def test_what_can_not_be_scored_is_told(model, trained, tmp_path):
    def refused(*argv: object) -> str:
        result = call(caption.main, [str(word) for word in argv])
        assert result.code == 1
        return result.err

    row = records()[0]
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "messages": row["messages"][:1]}))
    assert "line 2: its last message is not the assistant's" in refused(model, path)
    path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    assert "no other caption" in refused(model, path)
    other = {**records()[1], "images": row["images"] * 2}
    path.write_text(json.dumps(row) + "\n" + json.dumps(other))
    assert "as many" in refused(model, path)
    assert "takes no images" in refused(trained / "hf", EMOJI / "heldout.jsonl")
    assert "no directory" in refused(tmp_path / "nowhere", path)

"""The kinds of files that a run reads: how a sound one is made, and how the product reads it."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from attrs import frozen
from safetensors.torch import save

from omnistep.core.checkpoint.safetensors import open_weights
from omnistep.data.chat import open_template
from omnistep.data.errors import DataError
from omnistep.data.files.formats import index_file, stream_file
from omnistep.data.images import Source, open_clip
from omnistep.data.tokenizer import load_tokenizer
from omnistep.models import decoder
from omnistep.models.hf_config import ConfigJsonError, decoder_config, read_config_json
from tests.bin.runs import CONFIG, TOKENIZER

KEYS, BESIDE = ("messages", "text"), ("tools", "images")
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"question {i} é 漢字", "name": None},
            {"role": "assistant", "content": f'answer, "{i}"\nsecond line', "loss_mask": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "n": i}}],
    }
    for i in range(60)
]
TEXTS = [{"text": f'row {i}, with "quotes" and\na line end', "other": str(i)} for i in range(60)]


@frozen
class Kind:
    """A kind of file."""

    name: str
    """Its name on the disk."""
    make: Callable[[], bytes]
    read: Callable[[Path], None]
    """Reads all of it. Raises one of `refusals` where it refuses the file."""
    refusals: tuple[type[Exception], ...] = (DataError,)


def _records(path: Path) -> None:
    """At random and as a stream; a bad record is no bad file."""
    refused = None
    source = index_file(str(path), KEYS, BESIDE)
    for read in (*(lambda i=i: source[i] for i in range(len(source))), *_stream(path)):
        try:
            read()
        except DataError as error:
            refused = error
    if refused is not None:
        raise refused


def _stream(path: Path) -> Any:
    yield from stream_file(str(path), KEYS, BESIDE)


def _jsonl(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv() -> bytes:
    rows = (
        "{},{}\r\n".format(*(f'"{v.replace(chr(34), chr(34) * 2)}"' for v in r.values()))
        for r in TEXTS
    )
    return ("text,other\r\n" + "".join(rows)).encode()


def _arrow(stream: bool) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return sink.getvalue()


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=20)
    return sink.getvalue()


def _safetensors() -> bytes:
    return save({f"layer.{i}.weight": torch.randn(8, 8) for i in range(6)})


def _read_weights(path: Path) -> None:
    weights = open_weights(path)
    for name in weights.infos:
        weights.read(name)


def _read_config(path: Path) -> None:
    cfg = decoder_config(read_config_json(path))
    decoder.params(cfg)


def _small_tokenizer() -> bytes:
    """That of the tests with fewer merges, so that reading it is quick."""
    backend = json.loads((TOKENIZER / "tokenizer.json").read_text())
    backend["model"]["merges"] = backend["model"]["merges"][:200]
    return json.dumps(backend).encode()


def _read_tokenizer(path: Path) -> None:
    beside = path.with_name("tokenizer_config.json")
    if not beside.exists():
        beside.write_bytes((TOKENIZER / "tokenizer_config.json").read_bytes())
    load_tokenizer(path).encode_with_offsets("To be, or <|im_start|> not 漢字\n  to be")


def _read_tokenizer_config(path: Path) -> None:
    beside = path.with_name("tokenizer.json")
    if not beside.exists():
        beside.write_bytes(_small_tokenizer())
    tokenizer = load_tokenizer(path.parent)
    open_template("tokenizer", tokenizer).render([{"role": "user", "content": "x"}])


def _image(form: str, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        draw = np.random.default_rng(0)
        frames = [
            PIL.Image.fromarray(draw.integers(0, 255, (24, 32, 3), np.uint8)) for _ in range(3)
        ]
        sink = io.BytesIO()
        more = {"save_all": True, "append_images": frames[1:]} if form in ("GIF", "WEBP") else {}
        frames[0].save(sink, form, **more, **options)
        return sink.getvalue()

    return make


def _read_image(path: Path) -> None:
    for video in (False, True):
        for _ in open_clip(Source(str(path), video), "").decode():
            pass


KINDS: dict[str, Kind] = {
    ".jsonl": Kind("a.jsonl", _jsonl, _records),
    ".json": Kind("a.json", lambda: json.dumps(TEXTS).encode(), _records),
    ".csv": Kind("a.csv", _csv, _records),
    ".txt": Kind("a.txt", lambda: "".join(r["text"] for r in TEXTS * 20).encode(), _records),
    ".jsonl.gz": Kind("a.jsonl.gz", lambda: gzip.compress(_jsonl(), mtime=0), _records),
    ".arrow": Kind("a.arrow", lambda: _arrow(False), _records),
    ".arrow (stream)": Kind("a.arrow", lambda: _arrow(True), _records),
    ".parquet": Kind("a.parquet", _parquet, _records),
    "safetensors": Kind("model.safetensors", _safetensors, _read_weights, (ValueError, OSError)),
    "config.json": Kind(
        "config.json", lambda: json.dumps(CONFIG).encode(), _read_config, (ConfigJsonError,)
    ),
    "tokenizer.json": Kind("tokenizer.json", _small_tokenizer, _read_tokenizer),
    "tokenizer_config.json": Kind(
        "tokenizer_config.json",
        lambda: (TOKENIZER / "tokenizer_config.json").read_bytes(),
        _read_tokenizer_config,
    ),
    **{
        f"image ({form})": Kind("a.img", _image(form), _read_image)
        for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA")
    },
}

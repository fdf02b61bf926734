"""How often a run reads its data, the date its templates tell, and data that is started anew."""

import datetime
import json

import pytest
import yaml

from omnistep.bin import passes, train
from tests.bin.runs import call, losses, settings, succeeded, words

DATED = (
    "{{ strftime_now('%d %B %Y') }}\n{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    talk = [{"role": "user", "content": "Hark"}, {"role": "assistant", "content": "Who's there?"}]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(8)))
    return path


def test_many_passes_over_small_data_are_told(files, tmp_path, chats):
    more = {"data_train_path": chats, "data_data_type": "conversation", "train_max_steps": 2}
    chosen = settings(files, tmp_path / "run", **more)
    succeeded(call(train.main, words(chosen)))
    del chosen["data.train_size"], chosen["train.max_steps"]
    chosen |= {"train.output_dir": tmp_path / "other", "train.max_skipped_steps": 1}

    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "start", stop)
        said = []
        patch.setattr(train, "show", said.append)
        with pytest.raises(Enough):
            call(train.main, words(chosen))
    (text,) = (text for text in said if "passes over the data" in text)
    assert "warning  data.train_size was not given, and its default of 10,000,000 tokens" in text


def test_passes_are_about_right(files, tmp_path):
    result = succeeded(call(train.main, words(settings(files, tmp_path / "run"))))
    (line,) = (line for line in result.out.splitlines() if "passes over the data" in line)
    told = float(line.rpartition("about ")[2].split()[0])
    assert told == pytest.approx(6 * 64 / (150 * 75), abs=0.06)  # 150 texts of some 75 tokens
    assert "warning" not in result.out


def test_the_date_of_a_template_stays(files, tmp_path, chats, monkeypatch):
    """A run that goes on another day renders the same texts."""

    class Day(datetime.date):
        now = "2024-02-03"

        @classmethod
        def today(cls):
            return cls.fromisoformat(cls.now)

    monkeypatch.setattr(passes.datetime, "date", Day)
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    output = tmp_path / "run"
    more = {"data_train_path": chats, "data_data_type": "conversation", "train_max_steps": 3}
    more |= {"train_lr_decay_style": "constant", "train_lr_warmup_ratio": 0}
    chosen = settings(files, output, **more, data_chat_template=template, data_train_size=10**4)
    succeeded(call(train.main, words(chosen)))
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert str(recipe["data"]["chat_date"]) == "2024-02-03"
    Day.now = "2024-02-05"
    on = chosen | {"train.max_steps": 6, "train.load_checkpoint_path": "auto"}
    succeeded(call(train.main, words(on)))
    whole = tmp_path / "whole"
    at_once = chosen | {"train.max_steps": 6, "train.output_dir": whole}
    succeeded(call(train.main, words(at_once | {"data.chat_date": "2024-02-03"})))
    assert losses(output) == losses(whole)
    other = at_once | {"train.output_dir": tmp_path / "other", "data.chat_date": "2024-11-30"}
    succeeded(call(train.main, words(other)))
    assert losses(tmp_path / "other") != losses(whole)


def test_a_date_that_is_none(files, tmp_path):
    result = call(train.main, words(settings(files, tmp_path / "run", data_chat_date="today")))
    assert result.code == 2
    assert "data.chat_date = 'today' is no date" in result.err or "is no date" in result.err


def test_other_data_is_refused_or_started_anew(files, tmp_path):
    output = tmp_path / "run"
    succeeded(call(train.main, words(settings(files, output))))
    more = {"train_load_checkpoint_path": "auto", "data_train_size": 12 * 64}
    other = settings(files, output, **more, data_train_path=files.held_out)
    result = call(train.main, words(other))
    assert result.code == 1
    assert "belongs to other data or data arguments" in result.err
    assert "train.restart_data" in result.err
    anew = words(other | {"train.restart_data": True})
    result = succeeded(call(train.main, anew))
    assert " restart  the data from its start (train.restart_data)" in result.out
    assert list(losses(output)) == list(range(1, 13))  # weights, moments and steps go on
    longer = words(other | {"train.restart_data": True, "data.train_size": 14 * 64})
    result = succeeded(call(train.main, longer))
    assert "restart  the data" not in result.out  # its position fits now

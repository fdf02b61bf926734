"""Arguments from recipes and command lines: precedence, values, every error, round trips."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistep.core.config import (
    ARGUMENTS,
    SECTIONS,
    Arguments,
    DataArguments,
    InferArguments,
    ModelArguments,
    Names,
    TrainArguments,
    value_of,
)
from omnistep.core.config_errors import ConfigError
from omnistep.core.config_io import dump, load, parse, to_yaml
from omnistep.core.config_rules import resolve
from omnistep.core.config_types import structured

BASE = [
    *("--model.config_path=config.json", "--data.train_path=text.txt"),
    *("--data.data_type=plaintext", "--train.output_dir=out"),
]


def one(*argv: str) -> str:
    """The one problem that `load` finds."""
    with pytest.raises(ConfigError) as caught:
        load([*BASE, *argv], world_size=1, cuda=False)
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


# ---- reading -------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(recipe):
    path = recipe("train:\n  lr: 1e-3\n  seed: 7\n")
    train = parse(["--train.seed", "8", path, "--train.lr_min=2e-6"]).train
    assert (train.lr, train.seed, train.lr_min, train.max_grad_norm) == (1e-3, 8, 2e-6, 1.0)


def test_sections_may_be_empty_dotted_or_merged(recipe):
    path = recipe("model:\ndata: &d\n  num_workers: 1\ntrain.lr: 1e-3\ntrain:\n  seed: 3\n")
    args = parse([path])
    assert (args.data.num_workers, args.train.lr, args.train.seed) == (1, 1e-3, 3)
    assert parse([recipe("")]) == Arguments()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train.rmpad=true", True),
        ("train.rmpad=yes", True),
        ("train.use_wandb=no", False),
        ("train.use_wandb=False", False),
        ("train.lr=3e-4", 3e-4),
        ("train.lr=1", 1.0),
        ("train.empty_cache_steps=-1", -1),
        ("data.train_size=1_000", 1000),
        ("train.max_steps=null", None),
        ("train.load_checkpoint_path=None", None),
        ("train.wandb_name=2024", "2024"),
        ("infer.prompt=a = [b]: {c}", "a = [b]: {c}"),
        ("infer.prompt=--dashes", "--dashes"),
        ("train.compute_dtype=bfloat16", "bfloat16"),
        ("data.text_keys=text", "text"),
        ("data.text_keys=[text, 'content']", ("text", "content")),
        ('data.text_keys=["text"]', ("text",)),
        ("data.image_keys=a,b", ("a", "b")),
        (
            'model.encoders={"image": {"lr": 3e-4, "n": [null]}}',
            {"image": {"lr": 3e-4, "n": [None]}},
        ),
    ],
)
def test_words_of_the_command_line_become_values(option: str, value: Any):
    name, _, text = option.partition("=")
    for argv in ([f"--{option}"], [f"--{name}", text]):
        if text.startswith("--") and len(argv) == 2:
            continue
        read = value_of(parse(argv), name)
        assert read == value
        assert type(read) is type(value)


def test_yaml_numbers_are_those_of_yaml_1_2(recipe):
    text = "train: {lr: 3e-4, lr_min: '1e-7', weight_decay: 0, wandb_name: 2024-01-02}\n"
    args = parse([recipe(text + "model: {encoders: {image: {x: 1e-3, code: 010, flag: 1:30}}}")])
    assert (args.train.lr, args.train.lr_min) == (3e-4, 1e-7)
    assert type(args.train.weight_decay) is float
    assert args.train.wandb_name == "2024-01-02"
    assert args.model.encoders == {"image": {"x": 1e-3, "code": "010", "flag": "1:30"}}


def test_lists_of_names_in_yaml(recipe):
    assert parse([recipe("data: {text_keys: [a, b]}")]).data.text_keys == ("a", "b")


# ---- errors of single values ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("train: {lr_mim: 1}", ["train.lr_mim = 1 (", "yaml:1)", "did you mean train.lr_min?"]),
        ("data: {lr: 1}", ["data.lr = 1", "no such argument; did you mean train.lr?"]),
        ("training: {}", ["training = {}", "did you mean train?"]),
        ("train: {zzzzz: 1}", ["train.zzzzz", "--help lists all"]),
        ("train: {seed: true}", ["train.seed = true", "an integer"]),
        ("train: {seed: 1.5}", ["train.seed = 1.5", "an integer"]),
        ("train: {seed: '1'}", ['train.seed = "1"', "an integer"]),
        ("train: {seed: null}", ["train.seed = null", "the default, 42"]),
        ("data: {train_size: 1e6}", ["expected an integer; write 1000000"]),
        ("train: {lr: true}", ["train.lr = true", "a number"]),
        ("train: {lr: fast}", ['train.lr = "fast"', "a number"]),
        ("train: {lr: .nan}", ["train.lr", "a number"]),
        ("train: {lr: .inf}", ["train.lr", "a number"]),
        ("train: {rmpad: 1}", ["train.rmpad = 1", "true or false"]),
        ("train: {rmpad: 'true'}", ["train.rmpad", "true or false"]),
        ("train: {wandb_name: 5}", ["train.wandb_name = 5", "a string or null", "quotes"]),
        ("train: {optimizer: adam}", ["one of adamw, anyprecision_adamw; did you mean adamw?"]),
        ("train: {compute_dtype: fp16}", ["one of float32, bfloat16, float64 or null"]),
        ("data: {dataloader_type: dali}", ["expected native"]),
        ("data: {text_keys: []}", ["data.text_keys = []", "a name or a list of names"]),
        ("data: {text_keys: [1]}", ["data.text_keys = [1]", "a name or a list of names"]),
        ("data: {image_keys: null}", ["data.image_keys = null", "a name or a list of names"]),
        ("model: {encoders: [a]}", ["model.encoders", "a mapping"]),
        ("model: {encoders: {1: 2}}", ["model.encoders", "a mapping"]),
        ("train: 3", ["yaml:1", "the arguments of train"]),
        ("- train", ["yaml:1", "the sections model, data, train, infer"]),
        ("train: {seed: 1, seed: 2}", ["yaml:1: seed is given twice"]),
        ("train.seed: 1\ntrain: {seed: 2}", ["yaml:2: train.seed is given twice"]),
        ("model: {encoders: {a: {b: 1, b: 2}}}", ["b is given twice"]),
        ("train: {\nseed: ]", ["yaml:2", "not valid YAML"]),
        ("train: !!python/name:os.system", ["the arguments of train"]),
        ("train: {seed: !!python/name:os.system }", ["yaml:1", "not valid YAML"]),
    ],
)
def test_what_is_wrong_in_a_recipe(line: str, parts: list[str], recipe):
    with pytest.raises(ConfigError) as caught:
        parse([recipe(line)])
    assert len(caught.value.problems) == 1
    for part in parts:
        assert part in str(caught.value)


def test_lines_of_a_recipe_are_named(recipe):
    with pytest.raises(ConfigError, match=r"recipe\.yaml:4\): expected true or false"):
        parse([recipe("# a comment\ntrain:\n  lr: 1\n  rmpad: 3\n")])


def test_recipes_that_cannot_be_read(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"a: \xff")
    for argv, text in (
        ([str(tmp_path / "none.yaml")], "No such file"),
        ([str(tmp_path)], "Is a directory"),
        ([str(tmp_path / "binary")], "byte 4 is not UTF-8"),
        (["a.yaml", "b.yaml"], "one recipe at most; given: a.yaml, b.yaml"),
    ):
        with pytest.raises(ConfigError, match=text):
            parse(argv)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.batch_size", "3"], ["(command line)", "did you mean train.micro_batch_size?"]),
        (["--lr", "3"], ["did you mean train.lr?"]),
        (["-train.lr", "3"], ["did you mean train.lr?"]),
        (["--train.micro-batch-size=3"], ["did you mean train.micro_batch_size?"]),
        (["--"], ["no such argument"]),
        (["--train.lr"], ["train.lr (command line): needs a value", "--train.lr=VALUE"]),
        (["--train.lr", "--train.seed=1"], ["train.lr (command line): needs a value"]),
        (["--train.lr="], ["a number"]),
        (["--train.lr", "{"], ["a number"]),
        (["--train.rmpad", "1"], ["true or false"]),
        (["--model.encoders", "{a: 1}"], ["JSON", "character 2"]),
        (["--model.encoders", "[1]"], ["a mapping"]),
        (["--train.optimizer", "adamx"], ["did you mean adamw?"]),
        (["--train.seed", "-1"], ["train.seed = -1 (command line): must be in [0, "]),
        (["--train.micro_batch_size=0", "--train.global_batch_size=1"], ["must be at least 1"]),
        (["--train.lr_decay_ratio", "1.5"], ["must be in [0, 1]"]),
        (["--train.bsz_warmup_ratio", "-0.5"], ["must be in [0, 1]"]),
        (["--data.max_seq_len", "1"], ["must be at least 2"]),
        (["--train.empty_cache_steps", "0"], ["at least 1, or -1"]),
        (["--data.datasets_type", "mapped"], ["did you mean mapping?"]),
        (["--data.train_path", "omnistep:none/x"], ["a file of the installed package"]),
        (["--data.train_path", "a,omnistep:x-y/z"], ["a file of the installed package"]),
    ],
)
def test_what_is_wrong_on_a_command_line(argv: list[str], parts: list[str]):
    message = one(*argv)
    assert argv[0].lstrip("-").partition("=")[0] in message
    for part in parts:
        assert part in message


def test_all_errors_are_listed_together(recipe):
    path = recipe("train:\n  lr: fast\n  lr_mim: 1\n  rmpad: true\n  lr_min: 1\n")
    argv = [path, "--train.rmpad_with_pos_ids=true", "--train.seed=x"]
    with pytest.raises(ConfigError) as caught:
        load(argv, world_size=1, cuda=False)
    found = "\n".join(caught.value.problems)
    assert str(caught.value).startswith("7 problems")
    for name in ("train.lr ", "lr_mim", "rmpad", "seed", "train_path", "output_dir"):
        assert name in found
    assert "model.config_path" in found
    assert "lr_min must not be above" not in found  # lr itself is malformed


# ---- round trips ---------------------------------------------------------------------------


def test_a_dump_starts_the_same_run(tmp_path: Path):
    path = tmp_path / "config.yaml"
    resolved = load(
        [*BASE, "--data.text_keys=[a,b]", "--train.lr=3e-4", "--infer.prompt=3e-4"],
        world_size=1,
        cuda=True,
    )
    dump(resolved, path)
    assert parse([str(path)]) == resolved
    assert load([str(path)], world_size=1, cuda=True) == resolved
    assert "model_path: ''" not in path.read_text()


TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [
        "null",
        "yes",
        "3e-4",
        "010",
        "1_0",
        "2024-01-02",
        "1:30",
        "a: b",
        "#",
        "",
        " x",
        "é\x85",
        "\u2028\r\n",
    ]
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
NAMES = TEXTS.filter(bool)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Every value of a type that an argument may have."""
    if kind in (Names, Names | None):
        names = NAMES | st.lists(NAMES, min_size=1, max_size=3).map(tuple)
        return names if kind == Names else st.none() | names
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    known = {str: TEXTS, int: st.integers(), float: NUMBERS, bool: st.booleans()}
    if kind in known:
        return known[kind]
    if kind == dict[str, Any]:
        return st.dictionaries(TEXTS, JSON, max_size=3)
    return st.one_of([st.none() if k is type(None) else values_of(k) for k in get_args(kind)])


ALL = st.builds(
    Arguments,
    **{
        section: st.builds(kind, **{f.name: values_of(f.type) for f in attrs.fields(kind)})
        for section, kind in SECTIONS.items()
    },
)


def reread(args: Arguments) -> Arguments:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/config.yaml"
        dump(args, path)
        return parse([path])


@settings(max_examples=25, deadline=None)
@given(ALL)
def test_what_is_written_is_read_back(args: Arguments):
    assert reread(args) == args


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_word_gives_any_value(data: st.DataObject):
    plain = [a for a in ARGUMENTS.values() if a.type not in (Names, Names | None)]
    argument = data.draw(st.sampled_from(plain), "argument")
    value = data.draw(values_of(argument.type), "value")
    if isinstance(value, str) and value.lower() in ("null", "none"):
        return
    text = value if isinstance(value, str) else json.dumps(value)
    read = value_of(parse([f"--{argument.name}={text}"]), argument.name)
    assert read == value
    assert structured(read, argument) == read


@st.composite
def runnable(draw: st.DrawFn) -> Arguments:
    micro, lr = draw(st.integers(1, 8)), draw(st.floats(1e-6, 1))
    decay = draw(st.floats(0, 1))
    mixed, packed = draw(st.booleans()), draw(st.booleans())
    kinds = {f.name: f.type for f in attrs.fields(TrainArguments)}
    free = (
        *("lr_decay_style", "data_parallel_mode", "init_device", "use_doptim", "use_wandb"),
        *("save_hf_weights", "dyn_bsz_runtime", "wandb_name", "enable_full_shard", "optimizer"),
    )
    return Arguments(
        model=ModelArguments(config_path=draw(NAMES.filter(lambda t: "omnistep:" not in t))),
        data=DataArguments(
            train_path="omnistep:data/__init__.py",
            data_type="plaintext",
            text_keys=draw(values_of(Names | None)),
        ),
        train=TrainArguments(
            **{"output_dir": "out", **{name: draw(values_of(kinds[name])) for name in free}},
            lr=lr,
            lr_min=draw(st.floats(0, lr)),
            lr_decay_ratio=decay,
            lr_warmup_ratio=draw(st.floats(0, decay)),
            micro_batch_size=micro,
            global_batch_size=draw(st.none() | st.integers(1, 9).map(lambda n: n * micro)),
            enable_mixed_precision=mixed,
            compute_dtype=draw(st.sampled_from([None, "bfloat16"])),
            rmpad=packed,
            dyn_bsz_margin=draw(st.integers(0, 100)) if packed else 0,
            max_steps=draw(st.none() | st.integers(1, 100)),
        ),
        infer=InferArguments(prompt=draw(st.none() | TEXTS)),
    )


@settings(max_examples=50, deadline=None)
@given(runnable(), st.booleans())
def test_a_run_started_from_its_dump_is_the_same_run(args: Arguments, cuda: bool):
    resolved = resolve(args, world_size=1, cuda=cuda)
    read = reread(resolved)
    assert read == resolved
    assert resolve(read, world_size=1, cuda=cuda) == resolved
    assert to_yaml(read) == to_yaml(resolved)


def test_a_key_inside_of_a_mapping():
    """On top of what the recipe, or the option before, gives of it."""
    whole = '--model.encoders={"image": {"config_path": "a", "window": 3}}'
    argv = [whole, "--model.encoders.image.config_path=b", "--model.encoders.image.side", "7"]
    args = parse(argv)
    assert args.model.encoders == {"image": {"config_path": "b", "window": 3, "side": 7}}
    with pytest.raises(ConfigError, match=r"train\.lr\.x = .*no such argument"):
        parse(["--train.lr.x=1"])


def test_a_recipe_too_deep_is_an_error(tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text("model: " + "[" * 5000)
    with pytest.raises(ConfigError, match=r"deep\.yaml: nested too deeply|not valid YAML"):
        parse([str(path)])

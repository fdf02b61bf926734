"""The arguments: the contract's table, what is impossible, what follows from what, help."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs
import pytest

from omnistep.core.config import (
    ARGUMENTS,
    SAMPLE,
    TRAIN,
    Arguments,
    Command,
    DataArguments,
    ModelArguments,
    Names,
    TrainArguments,
)
from omnistep.core.config_errors import ConfigError
from omnistep.core.config_help import help_text
from omnistep.core.config_io import load, wants_help
from omnistep.core.config_rules import NOT_YET, derive, expand_path, resolve
from omnistep.core.config_types import shown

TABLE = """
model.config_path | str | =model.model_path
model.model_path | str | None
model.tokenizer_path | str | =model.model_path
model.encoders | dict | {}
model.decoders | dict | {}
model.input_encoder | encoder, decoder | encoder
model.output_encoder | encoder, decoder | decoder
model.encode_target | bool | False
data.train_path | str | Required
data.train_size | int | 10_000_000
data.data_type | plaintext, conversation | conversation
data.dataloader_type | native | native
data.datasets_type | str | mapping
data.text_keys | names | =by data.data_type
data.image_keys | names | images
data.chat_template | str | default
data.max_seq_len | int | 2048
data.num_workers | int | 4
data.drop_last | bool | True
data.pin_memory | bool | True
data.prefetch_factor | int | 2
train.output_dir | str | Required
train.lr | float | 5e-5
train.lr_min | float | 1e-7
train.weight_decay | float | 0
train.optimizer | adamw, anyprecision_adamw | adamw
train.max_grad_norm | float | 1.0
train.micro_batch_size | int | 1
train.global_batch_size | int | =train.micro_batch_size * n_gpus
train.num_train_epochs | int | 1
train.rmpad | bool | False
train.rmpad_with_pos_ids | bool | False
train.dyn_bsz_margin | int | 0
train.dyn_bsz_runtime | main, worker | worker
train.bsz_warmup_ratio | float | 0
train.lr_warmup_ratio | float | 0
train.lr_decay_style | constant, linear, cosine | cosine
train.lr_decay_ratio | float | 1.0
train.use_doptim | bool | False
train.enable_mixed_precision | bool | True
train.enable_gradient_checkpointing | bool | True
train.enable_reentrant | bool | True
train.enable_full_shard | bool | True
train.enable_fsdp_offload | bool | False
train.enable_activation_offload | bool | False
train.activation_gpu_limit | float | 0.0
train.enable_manual_eager | bool | False
train.init_device | cpu, cuda, meta | cuda
train.enable_full_determinism | bool | False
train.empty_cache_steps | int | 500
train.data_parallel_mode | ddp, fsdp1, fsdp2 | ddp
train.tensor_parallel_size | int | 1
train.pipeline_parallel_size | int | 1
train.ulysses_parallel_size | int | 1
train.context_parallel_size | int | 1
train.expert_parallel_size | int | 1
train.load_checkpoint_path | str | None
train.save_steps | int | 0
train.save_epochs | int | 1
train.save_hf_weights | bool | True
train.seed | int | 42
train.use_wandb | bool | True
train.wandb_project | str | VeOmni
train.wandb_name | str | None
train.enable_profiling | bool | False
train.profile_start_step | int | 1
train.profile_end_step | int | 2
train.profile_trace_dir | str | ./trace
train.profile_record_shapes | bool | True
train.profile_profile_memory | bool | True
train.profile_with_stack | bool | True
train.max_steps | int | None
infer.model_path | str | Required
infer.tokenizer_path | str | =infer.model_path
infer.seed | int | 42
infer.do_sample | bool | True
infer.temperature | float | 1.0
infer.top_p | float | 1.0
infer.max_tokens | int | 1024
"""
"""The contract: name, type or choices, default (`=` where it follows from others)."""

ADDED = {
    "data.bad_records",
    "data.shuffle_buffer",
    "train.checkpoint_dir",
    *("data.eval_path", "train.compute_dtype", "train.eval_steps", "train.keep_checkpoints"),
    *("train.keep_checkpoint_every", "train.checkpoint_format"),
    *(
        "train.max_skipped_steps",
        *("train.rank_timeout", "train.restart_data", "data.chat_date"),
        "train.data_parallel_replicate_size",
        "infer.prompt",
        "infer.prompt_file",
        "infer.chat",
    ),
    *("infer.batch_size", "infer.compile", "infer.compute_dtype", "infer.image"),
    *("data.max_patches", "train.freeze", "train.encoder_lr", "train.projector_lr"),
}
ROWS = [re.split(r"\s*\|\s*", line) for line in TABLE.strip().splitlines()]
SCALARS = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict[str, Any]}


def valid(**train: Any) -> Arguments:
    return Arguments(
        model=ModelArguments(config_path="config.json"),
        data=DataArguments(train_path="text.txt", data_type="plaintext"),
        train=TrainArguments(output_dir="out", **train),
    )


BASE = [
    *("--model.config_path=config.json", "--data.train_path=text.txt"),
    *("--data.data_type=plaintext", "--train.output_dir=out"),
]


def one(*argv: str, command: Command = TRAIN) -> str:
    """The one problem that `load` finds."""
    base = BASE if command is TRAIN else []
    with pytest.raises(ConfigError) as caught:
        load([*base, *argv], world_size=1, cuda=False, command=command)
    assert len(caught.value.problems) == 1, str(caught.value)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


# ---- the table -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind", "default"), ROWS, ids=[row[0] for row in ROWS])
def test_every_row_of_the_contract(name: str, kind: str, default: str):
    argument = ARGUMENTS[name]
    options = get_args(argument.type)
    assert argument.info.help
    assert argument.info.required == (default == "Required")
    assert bool(argument.info.otherwise) == default.startswith("=")
    if default == "Required":
        assert argument.default == ""
    elif default.startswith("=") or default == "None":
        assert argument.default is None
        assert type(None) in options
    elif kind in ("str", "names") or kind not in SCALARS:
        assert argument.default == default
    else:
        assert argument.default == eval(default)
        assert type(argument.default) is (dict if kind == "dict" else SCALARS[kind])
    if kind == "names":
        assert argument.type in (Names, Names | None)
    elif kind in SCALARS:
        assert argument.type in (SCALARS[kind], SCALARS[kind] | None)
    else:
        assert get_origin(argument.type) is Literal
        assert options == tuple(kind.split(", "))


def test_nothing_stands_beside_the_contract_but_what_was_added():
    assert set(ARGUMENTS) == {row[0] for row in ROWS} | ADDED


# ---- availability and combinations ---------------------------------------------------------

OTHER = {
    "model.decoders": '{"image": {}}',
    "model.input_encoder": "decoder",
    "model.output_encoder": "encoder",
    "train.activation_gpu_limit": "2",
}


@pytest.mark.parametrize("name", NOT_YET)
def test_what_is_not_available_yet_says_so(name: str):
    is_flag = ARGUMENTS[name].type is bool
    message = one(f"--{name}", OTHER.get(name, "true" if is_flag else "2"))
    assert message.startswith(f"{name} = ")
    assert f"not available yet (only {shown(NOT_YET[name][0])})" in message


def test_custom_datasets_are_named_by_a_dotted_path():
    assert "did you mean iterable" in one("--data.datasets_type=iterabel")
    path = "my.data:source"
    assert "all is shuffled" in one("--data.shuffle_buffer=8")
    args = attrs.evolve(valid(), data=attrs.evolve(valid().data, datasets_type=path))
    assert resolve(args, world_size=1, cuda=False).data.datasets_type == path


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("rmpad=true rmpad_with_pos_ids=true", ["rmpad_with_pos_ids = true", "both pack"]),
        ("global_batch_size=10 micro_batch_size=4", ["4 * 1 = 4", "nearest: 8 or 12"]),
        ("global_batch_size=3 micro_batch_size=4", ["nearest: 4"]),
        ("lr=1e-8", ["lr_min = 1e-07 (default)", "lr = 1e-08 (command line)", "above lr"]),
        ("lr_warmup_ratio=.5 lr_decay_ratio=.4", ["warm-up"]),
        ("rmpad=true dyn_bsz_margin=2048", ["below the 2048 tokens", "max_seq_len = 2048"]),
        ("dyn_bsz_margin=4", ["packed rows only"]),
        ("bsz_warmup_ratio=.1", ["packed rows only"]),
        ("enable_profiling=true profile_start_step=2", ["profile_end_step = 2", "[start, end)"]),
        ("eval_steps=5", ["data.eval_path = null"]),
        ("compute_dtype=float64", ["enable_mixed_precision: false"]),
        (
            "optimizer=anyprecision_adamw enable_mixed_precision=false compute_dtype=float32",
            ["bfloat16 weights", "compute_dtype: bfloat16"],
        ),
    ],
)
def test_impossible_combinations(options: str, parts: list[str]):
    message = one(*(f"--train.{option}" for option in options.split()))
    for part in parts:
        assert part in message


def test_a_model_needs_a_configuration():
    with pytest.raises(ConfigError, match=r"config_path = null.*model_path = null.*required"):
        resolve(attrs.evolve(valid(), model=ModelArguments()), world_size=1, cuda=False)


def test_required_arguments_are_asked_for_by_the_command_that_needs_them():
    message = one(command=SAMPLE)
    assert message.startswith("infer.model_path: required")
    with pytest.raises(ConfigError) as caught:
        load(BASE[:1] + BASE[2:3], world_size=1, cuda=False)
    assert [text.split(":")[0] for text in caught.value.problems] == [
        "data.train_path",
        "train.output_dir",
    ]


def test_sampling_reads_its_section_of_a_recipe_and_no_other_option(recipe):
    path = recipe("infer: {model_path: m}\ntrain: {lr: 1}\n")
    args = load([path], world_size=1, cuda=False, command=SAMPLE)
    assert args.infer.model_path == args.infer.tokenizer_path == "m"
    assert "omnistep-sample reads infer.* only" in one(path, "--train.lr=1", command=SAMPLE)
    assert "set one of them" in one(
        *(path, "--infer.prompt=a", "--infer.prompt_file=b"), command=SAMPLE
    )
    assert "greater than 0" in one(path, "--infer.temperature=0", command=SAMPLE)
    assert "in (0, 1]" in one(path, "--infer.top_p=0", command=SAMPLE)


# ---- what follows from what ----------------------------------------------------------------


def derived(args: Arguments, *, world_size: int = 1, cuda: bool = False) -> Arguments:
    args = derive(args, world_size=world_size, cuda=cuda)
    assert derive(args, world_size=world_size, cuda=cuda) == args
    return args


def test_paths_of_the_model_fall_back():
    cases = {
        ("c", "m", "t"): ("c", "t"),
        ("c", "m", None): ("c", "m"),
        ("c", None, None): ("c",) * 2,
    }
    cases[(None, "m", None)] = ("m", "m")
    for (config, weights, tokenizer), expected in cases.items():
        given_ = ModelArguments(config_path=config, model_path=weights, tokenizer_path=tokenizer)
        model = derived(Arguments(model=given_)).model
        assert (model.config_path, model.tokenizer_path) == expected
        assert model.model_path == weights
    assert derived(Arguments()).infer.tokenizer_path is None


@pytest.mark.parametrize(
    ("kind", "keys"), [("plaintext", ("content_split", "text")), ("conversation", "messages")]
)
def test_text_keys_follow_the_data_type(kind: Any, keys: str):
    assert derived(Arguments(data=DataArguments(data_type=kind))).data.text_keys == keys
    own = DataArguments(data_type=kind, text_keys=("a", "b"))
    assert derived(Arguments(data=own)).data.text_keys == ("a", "b")


@pytest.mark.parametrize(
    ("cuda", "mixed", "optimizer", "given_dtype", "expected"),
    [
        (True, True, "adamw", None, "bfloat16"),
        (False, True, "adamw", None, "float32"),
        (False, True, "anyprecision_adamw", None, "float32"),
        (True, True, "adamw", "float32", "float32"),
        (True, False, "adamw", None, None),
        (False, False, "adamw", "float64", "float64"),
        (False, False, "anyprecision_adamw", None, "bfloat16"),
    ],
)
def test_compute_dtype(cuda: bool, mixed: bool, optimizer: Any, given_dtype: Any, expected: Any):
    args = valid(enable_mixed_precision=mixed, optimizer=optimizer, compute_dtype=given_dtype)
    resolved = resolve(args, world_size=1, cuda=cuda)
    assert resolved.train.compute_dtype == expected
    assert resolved.infer.compute_dtype == ("bfloat16" if cuda else "float32")


@pytest.mark.parametrize(
    ("device", "cuda", "expected"),
    [("cuda", False, "cpu"), ("cuda", True, "cuda"), ("meta", False, "meta"), ("cpu", True, "cpu")],
)
def test_init_device_is_cpu_without_cuda(device: Any, cuda: bool, expected: str):
    train = TrainArguments(init_device=device)
    assert derived(Arguments(train=train), cuda=cuda).train.init_device == expected


def test_paths_into_the_package():
    path = expand_path("omnistep:data/__init__.py")
    assert Path(path).is_file()
    assert Path(path).is_absolute()
    for plain in ("data/x", "./omnistep:data/x", "/x", "omnistep:no_such_folder/x", "omnistep:"):
        assert expand_path(plain) == plain
    data = DataArguments(train_path="a.txt, omnistep:data/__init__.py", eval_path="omnistep:data/x")
    data = derived(Arguments(data=data)).data
    assert data.train_path == f"a.txt,{path}"
    assert data.eval_path == path.replace("__init__.py", "x")


# ---- help ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [TRAIN, SAMPLE])
def test_help_lists_every_argument_with_type_default_and_meaning(command: Command):
    lines = help_text(command).splitlines()
    assert max(map(len, lines)) <= 100
    for name, argument in ARGUMENTS.items():
        at = [i for i, line in enumerate(lines) if line.startswith(f"  --{name} ")]
        assert len(at) == command.takes(name), name
        if at:
            assert lines[at[0] + 1].strip() == argument.info.help
            needed = argument.info.required and name.split(".")[0] in command.needs
            assert ("(required)" in lines[at[0]]) == needed
    text = "\n".join(lines)
    assert command.program in text
    assert "--infer.top_p NUMBER (default: 1.0)" in text
    if command is TRAIN:
        assert "[recipe.yaml] [--nproc N]" in text
        assert "--train.lr NUMBER (default: 5e-05)" in text
        assert "--train.lr_decay_style constant|linear|cosine (default: cosine)" in text
        assert "--data.text_keys NAMES (default: content_split or text, or messages" in text
        assert "--train.activation_gpu_limit NUMBER (default: 0.0; only 0.0 for now)" in text


def test_help_is_asked_for():
    assert wants_help(["recipe.yaml", "--help"])
    assert wants_help(["-h"])
    assert not wants_help(["recipe.yaml", "--train.lr=1"])

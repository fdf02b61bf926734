# ruff: noqa: RUF009 (`arg` returns an attrs field, not a shared default)
"""Every argument of Omnistep: name, type, default, limits and one line of meaning.

An argument is a field of one of four sections; `train.lr` is the field `lr` of
`TrainArguments`. None as a default says that the value follows from other arguments
(`config_rules.resolve` fills it in) or that the feature is off. A required argument is the
empty string until it is given, so that each command can ask for what it needs.
"""

from collections.abc import Mapping
from typing import Any, Literal

import attrs
from attrs import frozen

from omnistep.core.config_fields import (
    NOT_NEGATIVE,
    POSITIVE,
    RATIO,
    SEED,
    Info,
    Limits,
    arg,
    required,
)

Names = str | tuple[str, ...]
"""One name, or several of which the first that is present wins."""

Dtype = Literal["float32", "bfloat16", "float64"]


@frozen(kw_only=True)
class ModelArguments:
    """The model: a Hugging Face configuration, and weights to start from."""

    config_path: str | None = arg(
        None,
        "Hugging Face config.json, or the directory that holds it",
        otherwise="model.model_path",
        path=True,
    )
    model_path: str | None = arg(
        None, "directory or file of safetensors to start from; none: random weights", path=True
    )
    tokenizer_path: str | None = arg(
        None,
        "directory or file of the tokenizer",
        otherwise="model.model_path, then model.config_path",
        path=True,
    )
    encoders: dict[str, Any] = arg(
        {}, "{image: {config_path, model_path, image_token_id, ...}}: a tower in front of the model"
    )
    decoders: dict[str, Any] = arg(
        {}, "{modality: {config_path, model_path, ...}}: hidden states back to raw data"
    )
    input_encoder: Literal["encoder", "decoder"] = arg(
        "encoder", "tower that encodes the images standing in a prompt"
    )
    output_encoder: Literal["encoder", "decoder"] = arg(
        "decoder", "tower that encodes the images to be produced"
    )
    encode_target: bool = arg(
        False, "hold the decoder's loss to the target encoder's features of the produced images"
    )


@frozen(kw_only=True)
class DataArguments:
    """The data: where it is read, how it becomes rows of tokens, how it is loaded."""

    train_path: str = required(
        "file, directory, glob, comma list of these, or a .yaml of sources (paths relative to it)",
        path=True,
    )
    eval_path: str | None = arg(
        None, "held-out data, spelled like train_path; none: no evaluation", path=True
    )
    train_size: int = arg(
        10_000_000, "tokens to train on; with packing they set the number of steps", POSITIVE
    )
    data_type: Literal["plaintext", "conversation"] = arg(
        "conversation", "plaintext: running text; conversation: turns, loss on the assistant's"
    )
    dataloader_type: Literal["native"] = arg("native", "native: the PyTorch DataLoader")
    datasets_type: str = arg(
        "mapping",
        "mapping: random access; iterable: streamed; package.module:function or a registered name",
    )
    text_keys: Names | None = arg(
        None,
        "key of the text in a record, or a list: the first present wins",
        otherwise="content_split or text, or messages, by data_type",
    )
    image_keys: Names = arg(
        "images", "key of the images in a record, or a list: the first present wins"
    )
    max_patches: int | None = arg(
        None,
        "patches that a sample's images may have; of more, images are made smaller",
        POSITIVE,
        otherwise="data.max_seq_len",
    )
    chat_template: str = arg(
        "default", "a built-in name, `tokenizer` for the tokenizer's own, or a Jinja file"
    )
    chat_date: str | None = arg(
        None, "YYYY-MM-DD that templates tell", otherwise="the day on which the run began"
    )
    max_seq_len: int = arg(2048, "tokens of the longest sample", Limits(2))
    num_workers: int = arg(4, "loader processes; 0: load in the main process", NOT_NEGATIVE)
    drop_last: bool = arg(
        True, "drop the last partial batch; false: fill it up with tokens of weight zero"
    )
    pin_memory: bool = arg(True, "load into page-locked memory (GPU only)")
    prefetch_factor: int = arg(2, "blocks of samples each loader process keeps ready", POSITIVE)
    shuffle_buffer: int | None = arg(
        None,
        "streams: records shuffled among each other, a stretch of a file",
        POSITIVE,
        otherwise="512, of .txt 32 parts of 16 KiB",
    )
    bad_records: Literal["stop", "skip"] = arg(
        "stop", "what can't be read as training data: stop the run, or skip and count it"
    )


@frozen(kw_only=True)
class TrainArguments:
    """The run: optimisation, batch, precision, memory, parallelism, saving, logging."""

    output_dir: str = required(
        "local directory for checkpoints, weights, logs and the resolved recipe"
    )
    lr: float = arg(5e-5, "largest learning rate", NOT_NEGATIVE)
    lr_min: float = arg(1e-7, "learning rate after the decay", NOT_NEGATIVE)
    weight_decay: float = arg(
        0.0, "decoupled weight decay; norms and biases are exempt", NOT_NEGATIVE
    )
    freeze: Names | None = arg(
        None, "parts that do not learn: encoder, projector, language_model, one or a list"
    )
    encoder_lr: float | None = arg(
        None, "the encoder's largest learning rate", NOT_NEGATIVE, otherwise="train.lr"
    )
    projector_lr: float | None = arg(
        None, "the projector's largest learning rate", NOT_NEGATIVE, otherwise="train.lr"
    )
    optimizer: Literal["adamw", "anyprecision_adamw"] = arg(
        "adamw", "anyprecision_adamw: bf16 weights (always) and moments, with Kahan compensation"
    )
    max_grad_norm: float = arg(
        1.0, "global gradient norm above which gradients are scaled down; 0: never", NOT_NEGATIVE
    )
    max_skipped_steps: int = arg(
        10, "steps in a row with a non-finite gradient after which the run stops", POSITIVE
    )
    restart_data: bool = arg(
        False, "go on from a checkpoint with other data: from its start, where it does not fit"
    )
    rank_timeout: float = arg(
        120.0, "seconds until a rank that does not come or shows no life ends the run", POSITIVE
    )
    micro_batch_size: int = arg(
        1, "per device: sequences, or when packing units of max_seq_len tokens", POSITIVE
    )
    global_batch_size: int | None = arg(
        None,
        "the same, per step over all devices; a multiple of micro_batch_size * data ranks",
        POSITIVE,
        otherwise="train.micro_batch_size * data ranks",
    )
    num_train_epochs: int = arg(1, "passes over the data", POSITIVE)
    rmpad: bool = arg(False, "the same as rmpad_with_pos_ids, but boundaries travel as cu_seqlens")
    rmpad_with_pos_ids: bool = arg(
        False, "pack samples into full rows, no padding; attention never crosses samples"
    )
    dyn_bsz_margin: int = arg(0, "tokens left free in each packed row", NOT_NEGATIVE)
    dyn_bsz_runtime: Literal["main", "worker"] = arg(
        "worker", "where packing runs: in the main process or the loader's workers"
    )
    bsz_warmup_ratio: float = arg(
        0.0, "share of the steps over which the packed rows fill up", RATIO
    )
    lr_warmup_ratio: float = arg(
        0.0, "share of the steps over which the learning rate rises from 0 to lr", RATIO
    )
    lr_decay_style: Literal["constant", "linear", "cosine"] = arg(
        "cosine", "path of the learning rate from lr to lr_min"
    )
    lr_decay_ratio: float = arg(
        1.0, "share of the steps after which the learning rate is lr_min", RATIO
    )
    use_doptim: bool = arg(
        False, "with ddp: shard the optimizer state over the data ranks (ZeRO-1); fsdp always does"
    )
    enable_mixed_precision: bool = arg(
        True,
        "weights in fp32 (anyprecision_adamw: bf16), compute in compute_dtype; false: one dtype",
    )
    compute_dtype: Dtype | None = arg(
        None,
        "dtype of forward and backward; unmixed: of everything, by default the model config's",
        otherwise="bfloat16 on GPU, float32 on CPU",
    )
    enable_gradient_checkpointing: bool = arg(True, "recompute each block in the backward pass")
    enable_reentrant: bool = arg(
        True, "recompute whole blocks; false: keep matrix products and attention"
    )
    enable_full_shard: bool = arg(
        True, "fsdp: gather weights again in the backward pass (ZeRO-3); false: keep them (ZeRO-2)"
    )
    enable_fsdp_offload: bool = arg(
        False, "parameters and optimizer state rest, and are updated, in host memory"
    )
    enable_activation_offload: bool = arg(
        False, "keep activations for the backward pass in host memory"
    )
    activation_gpu_limit: float = arg(
        0.0, "GB of activations that stay on the device when offloading", NOT_NEGATIVE
    )
    enable_manual_eager: bool = arg(False, "run the step without torch.compile")
    init_device: Literal["cpu", "cuda", "meta"] = arg(
        "cuda", "where weights are made: cpu, cuda (cpu without one), meta: each shard in place"
    )
    enable_full_determinism: bool = arg(False, "the same run twice gives the same bits")
    empty_cache_steps: int = arg(
        500, "steps between two clearings of the device's cache; -1: never", Limits(-1)
    )
    data_parallel_mode: Literal["ddp", "fsdp1", "fsdp2"] = arg(
        "ddp",
        "ddp: replicate parameters; fsdp2: shard each; fsdp1: the same in one bucket per block",
    )
    data_parallel_replicate_size: int = arg(
        1, "copies of the sharded state; each is sharded over data ranks / copies (HSDP)", POSITIVE
    )
    tensor_parallel_size: int = arg(1, "ranks that share each matrix product", POSITIVE)
    pipeline_parallel_size: int = arg(1, "ranks that share the layers", POSITIVE)
    ulysses_parallel_size: int = arg(
        1, "ranks that share the sequence, trading it for heads around attention", POSITIVE
    )
    context_parallel_size: int = arg(1, "ranks that share the sequence by ring attention", POSITIVE)
    expert_parallel_size: int = arg(
        1,
        "ranks that share the experts; divides ranks / (pipeline stages * copies of the state)",
        POSITIVE,
    )
    load_checkpoint_path: str | None = arg(
        None, "checkpoint to resume from; auto: the newest complete one of this run", path=True
    )
    checkpoint_dir: str | None = arg(
        None,
        "directory of this run's checkpoints, here or in a bucket (gs://..., s3://...)",
        otherwise="checkpoints in train.output_dir",
    )
    save_steps: int = arg(0, "steps between two checkpoints; 0: not by steps", NOT_NEGATIVE)
    save_epochs: int = arg(1, "epochs between two checkpoints; 0: not by epochs", NOT_NEGATIVE)
    keep_checkpoints: int = arg(3, "newest checkpoints that are kept; 0: all", NOT_NEGATIVE)
    keep_checkpoint_every: int = arg(
        0, "steps whose multiples' checkpoints are kept too; 0: none", NOT_NEGATIVE
    )
    checkpoint_format: Literal["orbax", "dcp"] = arg("orbax", "file format of the checkpoints")
    save_hf_weights: bool = arg(True, "export Hugging Face safetensors at the end")
    eval_steps: int = arg(
        0, "steps between two evaluations; 0: before the first and after the last", NOT_NEGATIVE
    )
    seed: int = arg(42, "seed of initial weights, data order and noise", SEED)
    use_wandb: bool = arg(True, "log to Weights & Biases; offline without a key")
    wandb_project: str = arg("VeOmni", "project of the wandb run")
    wandb_name: str | None = arg(None, "name of the wandb run; none: wandb's choice")
    enable_profiling: bool = arg(
        False, "trace the steps from profile_start_step up to profile_end_step"
    )
    profile_start_step: int = arg(1, "first step that is traced", NOT_NEGATIVE)
    profile_end_step: int = arg(2, "first step that is not traced any more", NOT_NEGATIVE)
    profile_trace_dir: str = arg("./trace", "directory of the traces")
    profile_record_shapes: bool = arg(True, "traces hold the shapes of the operators' inputs")
    profile_profile_memory: bool = arg(True, "traces hold memory use")
    profile_with_stack: bool = arg(True, "traces hold Python stacks")
    max_steps: int | None = arg(None, "cap on the steps of each epoch; none: no cap", POSITIVE)


@frozen(kw_only=True)
class InferArguments:
    """Sampling from a model: what is read, how a token is drawn, what is answered."""

    model_path: str = required("directory of weights, config and tokenizer", path=True)
    tokenizer_path: str | None = arg(
        None, "directory or file of the tokenizer", otherwise="infer.model_path", path=True
    )
    seed: int = arg(42, "seed of the drawn tokens", SEED)
    do_sample: bool = arg(True, "draw tokens; false: always take the likeliest")
    temperature: float = arg(
        1.0, "divides the logits; below 1 sharper, above 1 flatter", Limits(0, above=True)
    )
    top_p: float = arg(
        1.0, "draw from the likeliest tokens that hold this probability", Limits(0, 1, above=True)
    )
    max_tokens: int = arg(1024, "largest number of tokens of one answer", POSITIVE)
    prompt: str | None = arg(
        None, "text to continue; none, and no prompt_file: an interactive session"
    )
    image: str | None = arg(
        None, "image file, or comma list: for <image> in the prompt, or before it", path=True
    )
    prompt_file: str | None = arg(
        None, "file of prompts: .jsonl, or else one prompt per line", path=True
    )
    chat: bool = arg(False, "wrap prompts in the tokenizer's chat template")
    batch_size: int = arg(8, "prompts of a file that are answered together", POSITIVE)
    compile: bool = arg(True, "compile the decoding step")
    compute_dtype: Dtype | None = arg(
        None, "dtype of weights and compute", otherwise="bfloat16 on GPU, float32 on CPU"
    )


@frozen(kw_only=True)
class Arguments:
    """Everything a run is told."""

    model: ModelArguments = attrs.field(factory=ModelArguments)
    data: DataArguments = attrs.field(factory=DataArguments)
    train: TrainArguments = attrs.field(factory=TrainArguments)
    infer: InferArguments = attrs.field(factory=InferArguments)


@frozen
class Argument:
    """One row of the table of arguments."""

    name: str
    """Dotted: `train.lr`."""
    type: Any
    default: Any
    info: Info


def _arguments() -> dict[str, Argument]:
    rows = {}
    for section in attrs.fields(Arguments):
        defaults = section.type()
        for field in attrs.fields(section.type):
            name = f"{section.name}.{field.name}"
            default = getattr(defaults, field.name)
            rows[name] = Argument(name, field.type, default, field.metadata["info"])
    return rows


SECTIONS: Mapping[str, type] = {section.name: section.type for section in attrs.fields(Arguments)}
ARGUMENTS: Mapping[str, Argument] = _arguments()


def value_of(args: Arguments, name: str) -> Any:
    """The value of the argument of that dotted name."""
    section, key = name.split(".")
    return getattr(getattr(args, section), key)


@frozen
class Command:
    """A program that is configured: what it reads, which sections must be complete."""

    program: str
    about: str
    reads: tuple[str, ...]
    """Sections, and single arguments of others."""
    needs: tuple[str, ...]
    spawns: bool = False
    """Whether --nproc starts it on many ranks."""
    words: str = "[recipe.yaml]"
    """What stands on the command line beside options."""

    def takes(self, name: str) -> bool:
        """Whether an argument may stand on the command line."""
        return name in self.reads or name.split(".")[0] in self.reads


TRAIN = Command(
    "omnistep-train",
    "Trains a model as a recipe says.",
    reads=("model", "data", "train", "infer"),
    needs=("model", "data", "train"),
    spawns=True,
)
SAMPLE = Command(
    "omnistep-sample",
    "Lets a model speak: one prompt, a file of prompts, or an interactive session.",
    reads=("infer",),
    needs=("infer",),
)

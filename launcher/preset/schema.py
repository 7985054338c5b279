"""The Preset: what a researcher writes. Frozen, validated at the edge; unknown keys are errors.

A field's docstring is what ``check --explain`` and the editor show: meaning, then ``Unit:`` for every number, then where a default
comes from that is not a plain choice. Range and choices are the type's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema, model_validator

from launcher.preset.fields import Duration, Frozen, Name, Partitions, SizeGib, Text, Word

Attention = Literal["auto", "eager", "sdpa", "flash2", "flash3", "xformers", "flex"]
Parallelism = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "device_map"]
Packing = Literal["none", "flatten", "documents", "concatenate"]
Dtype = Literal["fp32", "bf16", "bf16_pure", "fp16"]

RepoName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=96)]
"""A repository on the hub: ``bigcode/starcoder2-15b``."""

_EVERY = r"^(epoch|never|[1-9][0-9]*|[1-9][0-9]?(\.[0-9]+)?%|100%)$"

Every = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    StringConstraints(pattern=_EVERY),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": _EVERY}]}),
]
"""``epoch``, ``never``, a number of optimizer steps, or a share of all steps: ``8%``."""


class Model(Frozen):
    name: RepoName | None = None
    """Repository on the hub, fetched when staging. Exactly one of name, path and config is given."""
    revision: Word = "main"
    """Branch, tag or commit; resolved to a commit when staging and recorded."""
    path: Text | None = None
    """Folder with config.json, weights and tokenizer."""
    config: dict[str, Any] | None = None
    """Arguments of the transformers config, ``model_type`` first, for a randomly initialised model."""
    tokenizer: Literal["model", "train"] = "model"
    """``train``: a byte-level BPE of ``config.vocab_size`` entries is trained on the data when staging (only with ``config``)."""
    trust_remote_code: Literal[False] = False
    """Never: code that a repository brings is not run."""

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if sum(value is not None for value in (self.name, self.path, self.config)) != 1:
            raise ValueError("give exactly one of name, path and config")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, e.g. starcoder2, gpt_bigcode, llama")
        if (self.tokenizer == "train") != (self.config is not None):
            raise ValueError("tokenizer: train belongs to config, and config needs it")
        return self


class Data(Frozen):
    name: RepoName | None = None
    """Data set on the hub. Exactly one of name and path is given."""
    revision: Word = "main"
    """Branch, tag or commit of the data set; resolved to a commit when staging and recorded."""
    subset: Word | None = None
    """The data set's configuration name."""
    path: Text | None = None
    """A JSONL or Parquet file, a folder of such files, or a folder of source files. ``stdlib``: the Python sources of the
    standard library of the interpreter that stages (data that is at hand everywhere, for tests and demos)."""
    glob: Text = "**/*.py"
    """Which files of a folder of source files are samples."""
    text_column: Word = "content"
    """Column of the data set that holds the text; files of source code have none."""
    append_eos: bool = True
    """Put the tokenizer's EOS after each document that is not cut, so that the model learns to stop."""
    packing: Packing = "none"
    """none: pad to the sequence length. flatten: the same samples, no pads computed. documents: packed, borders kept.
    concatenate: packed with EOS between documents, borders ignored."""
    num_samples: Annotated[int, Field(gt=0)] | None = None
    """Samples taken (the first ones after a seeded shuffle) before the evaluation share is split off. Unit: samples. Default: all."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples that is held out when the data set has no split of the name ``evaluation.split``. Unit: share of 1."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of name and path")
        return self


class Training(Frozen):
    sequence_length: Annotated[int, Field(gt=1)]
    """Tokens of one sample at most; longer documents are cut (none, flatten) or spread over blocks (concatenate). Unit: tokens."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the training samples; a fraction ends in the middle of one. Unit: epochs."""
    effective_batch: Annotated[int, Field(gt=0)]
    """Samples of one optimizer step, over all ranks and micro steps; need not be a multiple of the ranks. Unit: samples."""
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """Samples that a rank holds at once at most; auto: the largest number that the memory model says fits. Unit: samples."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw: two fp32 moments per weight. adamw_8bit: the moments in 8 bits. adafactor: a factored second moment, no first one."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Highest learning rate, reached at the end of the warm-up. Unit: none. No default: it belongs to the model and the optimizer."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: linear to zero, cosine to zero, or constant."""
    warmup: Annotated[float, Field(ge=0)] = 0
    """Optimizer steps when 1 or more, a share of all steps when below 1. Unit: steps, or share of 1."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on all but norms and biases. Unit: none. Default: that of transformers' TrainingArguments."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment. Unit: none. Default: that of torch's AdamW."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment. Unit: none. Default: that of torch's AdamW."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of AdamW's second moment. Unit: none. Default: that of torch's AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this 2-norm; 0 clips nothing (the norm is still recorded). Unit: none.
    Default: that of transformers' TrainingArguments."""
    dtype: Dtype = "bf16"
    """fp32; bf16: fp32 master weights, bf16 compute; bf16_pure: weights in bf16; fp16: fp32 weights, fp16 compute, loss scaling."""
    tf32: bool = False
    """Let fp32 matrix products use TF32 tensor cores."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """full: every decoder layer is computed again in the backward pass."""
    cross_entropy: Literal["plain", "chunked", "fused"] = "plain"
    """plain: logits of the whole micro batch. chunked: of a piece at a time, computed again in the backward pass. fused: one kernel."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Determines order of samples, dropout and random start: the same seed gives the same run. Unit: none."""

    @model_validator(mode="after")
    def _warmup_steps(self) -> Training:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError("warmup: a whole number of steps, or a share below 1")
        return self


class Lora(Frozen):
    kind: Literal["lora", "rslora", "dora", "qlora"]
    """rslora: scaled by the root of the rank. dora: magnitude and direction apart. qlora: on weights of 4 bits (nf4)."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Inner dimension of the two matrices of an adapter. Unit: none. Default: that of peft."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """The adapter's output is scaled by alpha / rank (rslora: alpha / √rank). Unit: none. Default: twice the rank, as FastCode has it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped while training. Unit: share of 1."""
    targets: list[Word] | None = None
    """Names of the linear layers that get an adapter; default by architecture."""


class Evaluation(Frozen):
    every: Every = "never"
    """When the evaluation loss is computed: epoch, steps, a share of all steps, or never. The last step is always included unless never."""
    split: Word = "valid"
    """Split of the data set; where it is missing, ``data.eval_share`` of the samples is held out."""
    micro_batch: Annotated[int, Field(gt=0)] = 1
    """Samples that a rank evaluates at once. Unit: samples."""


class Checkpoint(Frozen):
    every: Every = "epoch"
    """Regular checkpoints: epoch, steps or a share; stops and the end are always saved."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Time between two timed checkpoints, which come beside the regular ones. Unit: minutes. Default: none are timed."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Timed and step checkpoints kept (never fewer than 2 checkpoints in all). Unit: checkpoints."""
    keep_epochs: Annotated[int, Field(ge=1)] | None = None
    """Epoch checkpoints kept. Unit: checkpoints. Default: all."""
    preempted_every: Duration | None = None
    """Mean time between two preemptions, for the advice on ``minutes``. Default: what the site says of the partition."""


class Slurm(Frozen):
    account: Name | None = None
    """Account that the job is charged to. Default: the user's configuration, SBATCH_ACCOUNT, then the site's."""
    partition: Partitions | None = None
    """Partition, or several with commas between. Default: the user's configuration, SBATCH_PARTITION, then the site's."""
    qos: Name | None = None
    """Quality of service. Default: the user's configuration, SBATCH_QOS, then the site's."""
    time: Duration | None = None
    """Walltime of one life. Default: the limit of the partition where the site knows it, else 24 hours."""
    constraint: Word | None = None
    """Features that the nodes must have, as sbatch takes them: ``a100&ib``."""
    reservation: Name | None = None
    """Reservation that the job runs in."""
    exclude: Word | None = None
    """Nodes that are left out, as sbatch takes them: ``node[3-5]``."""
    mail: Word | None = None
    """Address that Slurm writes to at the end and on failure."""


class Limits(Frozen):
    max_lives: Annotated[int, Field(gt=0)] = 20
    """Automatic continuation stops after so many lives. Unit: lives."""
    max_gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """Automatic continuation stops when the run has used so many. Unit: GPU-hours. Default: no limit."""


class OwnImage(Frozen):
    image: Text
    """An Apptainer image that the user brings; verified against nothing but that it can train."""


class Preset(Frozen):
    name: Name
    """Name of the run: the beginning of its id and its job name."""
    description: Text = ""
    """A line for people; shown by ``ftlaunch presets``."""
    model: Model
    """What is trained: a repository, a folder, or a config for a random start."""
    data: Data
    """What it is trained on."""
    training: Training
    """Batch, optimizer, schedule, precision."""
    attention: Attention = "auto"
    """Kernel of the attention. auto: sdpa where the stack has it, else eager."""
    adapter: Literal["none"] | Lora = "none"
    """none: all weights are trained. A mapping: low-rank adapters are."""
    parallelism: Parallelism = "ddp"
    """How ranks share the work. single: one process. ddp: a whole copy per rank. fsdp: sharded (FSDP2). zero1, zero2, zero3: DeepSpeed
    shards optimizer state, then gradients, then weights. device_map: one process, layers split over its GPUs."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in the node's RAM instead of the GPU's memory: the optimizer's state, or that and the weights. ZeRO and fsdp only."""
    evaluation: Evaluation = Evaluation()
    """When and on what the evaluation loss is computed."""
    checkpoint: Checkpoint = Checkpoint()
    """When checkpoints are written and how many are kept."""
    hardware: Name
    """Name of a file in presets/hardware, or in ~/.config/ftlaunch/hardware."""
    nodes: Annotated[int, Field(gt=0)] = 1
    """Nodes of the job. Unit: nodes."""
    gpus: Annotated[int, Field(ge=0)]
    """GPUs of each node; 0 on CPU. Unit: GPUs."""
    ranks_per_node: Annotated[int, Field(gt=0)] | None = None
    """Processes per node. Unit: ranks. Default: gpus, else 1; 1 with device_map."""
    cpus_per_node: Annotated[int, Field(gt=0)] | None = None
    """CPUs asked of the scheduler, of each node. Unit: CPUs. Default: the hardware's share that the GPUs stand for."""
    memory_per_node_gib: SizeGib | None = None
    """RAM asked of the scheduler, of each node: a number, or a size such as 80GB. Unit: GiB.
    Default: the hardware's share that the GPUs stand for."""
    threads_per_rank: Annotated[int, Field(gt=0)] | None = None
    """Threads of a rank's CPU arithmetic. Unit: threads. Default: its CPUs, at most 8."""
    stack: Name | OwnImage
    """Name of a file in containers or in ~/.config/ftlaunch/containers: the software of the image. Or ``{image: FILE}``."""
    site: Name | None = None
    """Shipped presets name none: ``--site``, the environment or the user's configuration choose."""
    slurm: Slurm = Slurm()
    """Options of sbatch; the command line's win."""
    limits: Limits = Limits()
    """Where automatic continuation stops."""

    @model_validator(mode="after")
    def _consistent(self) -> Preset:
        if self.parallelism == "single" and self.nodes * (self.ranks_per_node or max(self.gpus, 1)) != 1:
            raise ValueError("parallelism: single is one process; use ddp, or nodes: 1 and gpus: 1")
        if self.parallelism == "device_map" and (self.nodes != 1 or (self.ranks_per_node or 1) != 1):
            raise ValueError("parallelism: device_map is one process on one node")
        return self

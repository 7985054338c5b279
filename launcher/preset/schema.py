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
Format = Literal["text", "prompt_completion", "chat", "fim"]
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


class Source(Frozen):
    """One of several sources of samples. What it leaves out of format, glob and columns is as ``data`` has it."""

    name: RepoName | None = None
    """Data set on the hub. Exactly one of name and path is given."""
    revision: Word = "main"
    """Branch, tag or commit of the data set; resolved to a commit when staging and recorded."""
    subset: Word | None = None
    """The data set's configuration name."""
    path: Text | None = None
    """As ``data.path``: a file, a folder, or ``stdlib``."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """This source's part of the training samples (documents, before packing), in proportion to the other weights. Unit: none."""
    format: Format | None = None
    """What its rows are. Default: data.format."""
    glob: Text | None = None
    """Which files of a folder of source files are samples. Default: data.glob."""
    text_column: Word | None = None
    """Column with the text. Default: data.text_column."""
    prompt_column: Word | None = None
    """Column with the prompt. Default: data.prompt_column."""
    completion_column: Word | None = None
    """Column with the completion. Default: data.completion_column."""
    messages_column: Word | None = None
    """Column with the messages. Default: data.messages_column."""

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        if (self.name is None) == (self.path is None):
            raise ValueError("give exactly one of name and path")
        return self


class Data(Frozen):
    name: RepoName | None = None
    """Data set on the hub. Exactly one of name, path and sources is given."""
    revision: Word = "main"
    """Branch, tag or commit of the data set; resolved to a commit when staging and recorded."""
    subset: Word | None = None
    """The data set's configuration name."""
    path: Text | None = None
    """A JSONL or Parquet file, a folder of such files, or a folder of source files. ``stdlib``: the Python sources of the
    standard library of the interpreter that stages (data that is at hand everywhere, for tests and demos)."""
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    """Several sources mixed by weight: each a mapping with name or path, and weight."""
    glob: Text = "**/*.py"
    """Which files of a folder of source files are samples."""
    format: Format = "text"
    """What a row is. text: a document, all of it learned. prompt_completion: two texts, only the completion is learned. chat: messages,
    only the assistant's turns are learned. fim: a document, rearranged so that the model learns to fill in its middle."""
    text_column: Word = "content"
    """Column of the data set that holds the text (formats text and fim); files of source code have none."""
    prompt_column: Word = "prompt"
    """Column of the data set that holds the prompt (format prompt_completion)."""
    completion_column: Word = "completion"
    """Column of the data set that holds the completion (format prompt_completion)."""
    messages_column: Word = "messages"
    """Column of the data set that holds a conversation (format chat): a list of mappings with role and content."""
    fim_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the documents that are rearranged (format fim). Unit: share of 1. Default: 0.5, as StarCoder was trained."""
    fim_spm_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the rearranged documents in the order suffix, prefix, middle; the others: prefix, suffix, middle (format fim).
    Unit: share of 1. Default: 0.5, as StarCoder was trained."""
    append_eos: bool = True
    """Put the tokenizer's EOS after each document that is not cut, so that the model learns to stop; it is a target like any token.
    In format chat the template ends the turns, and none is added."""
    long_documents: Literal["cut", "split"] = "cut"
    """Documents longer than the sequence length. cut: the rest is left out. split: it becomes further documents of at most that length.
    With packing concatenate documents spread over blocks, whatever this says."""
    packing: Packing = "none"
    """none: pad to the sequence length. flatten: the same samples, no pads computed. documents: packed, borders kept.
    concatenate: packed with EOS between documents, borders ignored."""
    num_samples: Annotated[int, Field(gt=0)] | None = None
    """Documents taken (the first ones after a seeded shuffle) before the evaluation share is split off. Of several sources each gives
    its part, again and again if it has too few. Unit: samples. Default: all; of several sources as many as need no repetition."""
    eval_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the samples that is held out when the data set has no split of the name ``evaluation.split`` (of several sources: when
    none has). Unit: share of 1."""

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if sum(value is not None for value in (self.name, self.path, self.sources)) != 1:
            raise ValueError("give exactly one of name, path and sources")
        for key, given in (("subset", self.subset is not None), ("revision", self.revision != "main")):
            if self.sources is not None and given:
                raise ValueError(f"{key}: belongs to name; each of the sources says its own")
        formats = {self.format} if self.sources is None else {source.format or self.format for source in self.sources}
        for key in ("fim_rate", "fim_spm_rate"):
            if getattr(self, key) is not None and "fim" not in formats:
                raise ValueError(f"{key}: has no effect with format {self.format}; set format: fim, or leave it out")
        if any(source.prompt_column == source.completion_column for source in self.several):
            raise ValueError("prompt_column: is the same as completion_column")
        return self

    @property
    def several(self) -> tuple[Source, ...]:
        """The sources, also where there is only one, with everything that they left out."""
        own = {key: getattr(self, key) for key in _INHERITED}
        if self.sources is None:
            return (Source(name=self.name, revision=self.revision, subset=self.subset, path=self.path, **own),)
        return tuple(
            source.model_copy(update={key: value for key, value in own.items() if getattr(source, key) is None}) for source in self.sources
        )


_INHERITED = ("format", "glob", "text_column", "prompt_column", "completion_column", "messages_column")


class Training(Frozen):
    sequence_length: Annotated[int, Field(gt=1)]
    """Tokens of one sample at most; ``data.long_documents`` says what becomes of longer documents. Unit: tokens."""
    epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the training samples; a fraction ends in the middle of one. Unit: epochs."""
    effective_batch: Annotated[int, Field(gt=0)]
    """Samples of one optimizer step, over all ranks and micro steps; need not be a multiple of the ranks. Unit: samples."""
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """Samples that a rank holds at once at most; auto: the largest number that the memory model says fits. Unit: samples."""
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit", "adafactor"] = "adamw"
    """adamw: two fp32 moments per weight. adamw_fused: the same in one kernel, equal but for the last bits. adamw_8bit: the moments in
    8 bits. adafactor: a factored second moment, no first one."""
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
    """fp32; bf16: fp32 master weights, bf16 compute; bf16_pure: weights, gradients and AdamW's moments in bf16, stochastically rounded;
    fp16: fp32 weights, fp16 compute, loss scaling."""
    tf32: bool = False
    """Let fp32 matrix products use TF32 tensor cores."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: every decoder layer is computed again in the backward pass. selective: only what is cheap, not its matrix products."""
    compile: Literal["none", "layers"] = "none"
    """layers: torch.compile of each decoder layer. The first steps of each life take minutes longer."""
    cross_entropy: Literal["plain", "chunked", "fused"] = "plain"
    """plain: logits of the whole micro batch. chunked: of a piece at a time. fused: the same with liger's kernel, on GPUs."""
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
    """Names of the linear layers that get an adapter; default: every linear layer of the decoder layers."""
    modules_to_save: list[Word] | None = None
    """Names of modules that are trained whole beside the adapters and saved with them: embeddings, an untied head, norms. Default: none."""


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
    asynchronous: bool = False
    """Training waits only for a copy in RAM, which is written and committed beside it. Needs RAM for weights and optimizer state."""
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


class Tracking(Frozen):
    to: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Trackers that get every record of ``metrics.jsonl`` as well; the image needs their packages. One that fails is left out of that
    life with a warning: it never ends a training. Default: none."""
    project: Name = "ftlaunch"
    """W&B's project and MLflow's experiment."""
    wandb: Literal["auto", "online", "offline"] = "auto"
    """Whether W&B sends while training. offline: into ``<run>/tracking``, for ``wandb sync``. auto: online where the site says that the
    partition has Internet, else offline."""
    mlflow_uri: Text | None = None
    """Server or folder of MLflow. Default: MLFLOW_TRACKING_URI of the environment, else a file in ``<run>/tracking``."""


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
    """Kernel of the attention. auto: the fastest that GPU, dtype, stack and model allow; the plan says which and why."""
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
    tracking: Tracking = Tracking()
    """TensorBoard, W&B and MLflow beside ``metrics.jsonl``."""
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

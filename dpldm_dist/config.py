"""The one description of a run: frozen, typed, read from TOML, every unknown key refused.

Precedence: field default < TOML file < ``--set section.key=value``. TOML has no null: an absent
key, or ``--set key=none``, is None. Numbers that decide privacy have no default.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import stat
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dpldm_dist.errors import ConfigError, RunError

_MOST_BYTES = 1 << 18  # nobody's config is longer; bounds what a hostile file can make us read
# tomllib needs time and memory that grow with the square of the parts of a dotted key.
_LONG_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]+|"(?:[^"\\\n]|\\.){0,200}+"|'[^'\n]{0,200}+')[ \t]*\.[ \t]*){50}""",
    re.ASCII,
)
_LARGEST_NUMBER = 2**53  # above it a float no longer holds every integer
_DEEPEST = 8  # nobody's config is nested further
_LONGEST_NAME = 255  # bytes: what file systems take
_MOST_SHOWN, _MOST_FAULTS = 60, 5  # characters of a refused value; refused values in a message
# They change the order in which a terminal shows the text around them.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _whole(value: Any) -> int:
    """A literal number takes what is equal to it, true for 1 among them; this does not."""
    if type(value) is not int:
        raise ValueError("expected a whole number")
    return value


_URL = re.compile(r"(s3|gs|gcs|https?|abfss?|az|adl|hdfs|webhdfs|oss|memory)://[^\s@?#]+")


def _place(value: str | Path) -> str | Path:
    """A text with :// is an address and stays one; anything else is a path."""
    if "://" not in str(value):
        return Path(value)
    if not _URL.fullmatch(str(value)) or "::" in str(value):
        raise ValueError(
            "expected a folder, or an address such as s3://bucket/folder, gs://bucket/folder or "
            "https://host/folder, without name, password or signature: credentials belong into "
            "the environment"
        )
    return str(value)


Place = Annotated[str | Path, AfterValidator(_place)]
"""A folder (Path), or the address of one (str) that is read through a cache."""


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=False,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class DatasetConfig(_Section):
    source: str | None = None
    """Where the images are: a folder with one sub-folder per class, a CSV with the columns
    file,label[,caption][,unit], a WebDataset tar pattern, IDX or NPZ arrays, or a built-in source:
    ``builtin:letters``, ``builtin:digits``, ``builtin:digits-heldout``. None: not used."""
    limit: int | None = Field(None, ge=1)
    """Use at most this many images, the first ones of the source. None: all (20,000 letters)."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, in order; other labels are refused. None: those found in the data,
    which a run on private data then publishes (held-out data: those of the private data)."""
    images: Place | None = None
    """Folder of image shards, or its address (s3://, gs://, https://, ...) where they are finished:
    they are then fetched through ``data.cache_dir``. None: inside the run directory."""
    latents: Place | None = None
    """Folder of latent shards, or its address where they are finished. None: inside the run
    directory."""


class DataConfig(_Section):
    size: int = Field(32, ge=8, le=2048)
    """Height and width of the images in pixels."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_whole)] = 1
    """1: grey, 3: colour."""
    crop: Literal["center", "resize"] = "center"
    """How an image becomes square: the largest centred square, or squeezed to fit."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """An image that cannot be read stops the run with its name, or is skipped and counted."""
    on_duplicates: Literal["report", "stop"] = "report"
    """Images of equal content break record-level privacy: report them, or stop."""
    unit: str = Field("image", pattern=r"^[A-Za-z][A-Za-z _-]{0,39}$")
    """What a record stands for, and whom the guarantee protects. "image": each image is a record.
    Any other word (patient, user): the private source names the unit of every image, and all images
    of a unit form one record, which is drawn, averaged and clipped as one."""
    max_images_per_unit: int = Field(1, ge=1)
    """Images kept of one unit (person); a fixed random subset. One record holds them all."""
    shard_records: int = Field(500, ge=1)
    """Records per shard."""
    flips: bool = False
    """Store the mirrored image too, as a second view of the same record. Not for text or digits."""
    allow_shared_files: bool = False
    """Read shards of private or held-out data although other users may read or change them."""
    cache_dir: Path | None = None
    """Folder of this machine for shards of data sets that are addresses, closed to other users and
    shared by all workers of the machine. None: ``~/.cache/dpldm_dist``."""
    cache_gb: float = Field(100.0, gt=0)
    """Most gigabytes (2^30 bytes) in it; the oldest shards go first. Never changes the result."""
    public: DatasetConfig = DatasetConfig()
    private: DatasetConfig = DatasetConfig()
    heldout: DatasetConfig = DatasetConfig()
    """Private images that are never trained on: evaluation only."""


class AutoencoderConfig(_Section):
    init: Path | None = None
    """A local diffusers directory of an autoencoder. None: train one on the public images."""
    kind: Literal["kl", "vq"] = "kl"
    latent_channels: int = Field(4, ge=1)
    block_channels: tuple[int, ...] = (16, 32, 64, 64)
    """Channels of each resolution; every block after the first halves the image."""
    layers_per_block: int = Field(1, ge=1)
    norm_groups: int = Field(8, ge=1)
    mid_attention: bool = False
    vq_codes: int = Field(256, ge=2)
    """Size of the code book (kind "vq")."""
    kl_weight: float = Field(1e-3, ge=0)
    l1_weight: float = Field(0.3, ge=0)
    """Weight of the absolute error beside the squared error."""
    steps: int = Field(1000, ge=1)
    batch: int = Field(128, ge=1)
    """Images per step over all workers."""
    learning_rate: float = Field(2e-3, gt=0)


class ModelConfig(_Section):
    init: Path | None = None
    """A public model to start from: a local diffusers directory or a run's ``public/model``.
    None: pre-train one on the public latents."""
    conditioning: Literal["class", "caption", "none"] = "class"
    """What steers the denoiser: a learned row of tokens per class, embeddings of a caption by the
    frozen text encoder in ``model.init``, or nothing."""
    block_channels: tuple[int, ...] = (64, 128)
    layers_per_block: int = Field(1, ge=1)
    attention_levels: int | None = Field(None, ge=1)
    """How many levels have transformer blocks, counted from the largest map; the middle always has
    one. None: all."""
    heads: int = Field(4, ge=1)
    context_dim: int = Field(64, ge=1)
    """Width of a conditioning token."""
    context_tokens: int = Field(1, ge=1)
    """Conditioning tokens per class. With 1, attention to it is constant and its query and key
    projections are frozen."""
    norm_groups: int = Field(16, ge=1)
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    diffusion_steps: int = Field(1000, ge=2)
    """Number of diffusion times T."""
    beta_start: float = Field(0.00085, gt=0)
    beta_end: float = Field(0.012, gt=0)


class PretrainConfig(_Section):
    steps: int = Field(2000, ge=1)
    batch: int = Field(256, ge=1)
    """Latents per step over all workers."""
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    label_dropout: float = Field(0.15, ge=0, le=1)
    """Share of labels replaced by the null row, so that guidance can be used when sampling."""
    time_bias: float = Field(0.0)
    """Mean of the logarithm of the noise level at which the model trains."""
    time_spread: float | None = Field(None, gt=0)
    """Standard deviation of the logarithm of the noise level. None: uniform diffusion times."""


class PrivacyConfig(_Section):
    epsilon: float = Field(gt=0)
    """The budget: the run never spends more."""
    delta: float = Field(gt=0, lt=1)
    clip_norm: float = Field(gt=0)
    """Bound on the L2 norm of what one record adds to the sum. The learning rate does not depend
    on it: the noisy sum is divided by it."""
    noise_multiplier: float | None = Field(None, gt=0)
    """Standard deviation of the noise over clip_norm. None: the smallest that meets the budget."""
    records: int | None = Field(None, ge=1)
    """N that is declared to the public: it sets the sample rate and the divisor. None: the
    number of private records, which the run then publishes."""
    lanes: int = Field(4, ge=1)
    """Fixed groups of shards within which microbatches are packed; also the most workers that
    can share the work. Part of the mechanism: a run keeps its value."""
    telemetry_share: float = Field(0.01, ge=0, le=0.02)
    """Share of the squared clip_norm that a record's clipped loss, its count and its clip flag take
    in the noisy sum, so that a run shows its training loss with error bars at no further charge.
    Costs as much as half that share more noise. 0: none of them. A run keeps its value."""
    reserve_steps: int = Field(0, ge=0)
    """Steps that the budget pays for beyond finetune.steps, for work repeated after a crash."""
    allow_duplicates: bool = False
    """Train although the private set holds images of equal content in different records."""
    dataset_epsilon: float | None = Field(None, gt=0)
    """One budget for all runs on the same private images, fixed by the first of them, which makes
    the file that holds it; every run then reserves from it what it may spend. None: no new file,
    but a file that is there is obeyed."""
    dataset_delta: float | None = Field(None, gt=0, lt=1)
    """Delta of that budget. Both numbers or none."""
    dataset_ledger: Path | None = None
    """The file of that budget. None: ``budget.jsonl`` beside the folder of private latents. Name
    one file for all encodings of the same images."""


class FinetuneConfig(_Section):
    steps: int = Field(ge=1)
    """Noisy steps, each one charge in the ledger."""
    batch: int = Field(ge=1)
    """Expected number of records per step: sample rate = batch / N_declared, rounded up to a
    multiple of 2^-40."""
    trainable: Literal["transformer", "attention", "output-blocks", "lora"] = "transformer"
    """Which parameters learn from private data, besides the conditioning embedder: whole
    transformer blocks (the paper's rule), only their attention projections, the transformer blocks
    from number ``first_block`` on (the paper's ablation_blocks), or low-rank adapters."""
    first_block: int = Field(1, ge=1)
    """First transformer block that trains, counted from 1 in the order input, middle, output
    (trainable = "output-blocks")."""
    lora_rank: int = Field(8, ge=1)
    draws: int = Field(1, ge=1)
    """Noise multiplicity K: the gradient of a record is that of its mean loss over K draws of
    diffusion time, noise, posterior and view."""
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = Field(1e-2, gt=0)
    lr_decay: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = Field(0.9, ge=0, lt=1)
    label_dropout: float = Field(0.1, ge=0, le=1)
    time_bias: float = Field(0.6)
    """Shift of the logarithm of the noise level at which the model trains; above 0: more noise."""
    time_spread: float | None = Field(1.2, gt=0)
    """Standard deviation of the logarithm of the noise level. None: uniform diffusion times."""
    embedder_grad_scale: float | Literal["auto"] = "auto"
    """Factor on the conditioning embedder's gradient before clipping (a fixed linear change of
    variable). "auto": set on public or released latents so that its share of the squared norm is
    one half."""
    statistics_noise: float | None = Field(None, gt=0)
    """Noise multiplier of one release of class means and covariance of the private latents,
    charged to the same budget. None: no release, no warm-up, no Gaussian baseline."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of ordinary training on draws from the released Gaussian, before the noisy steps."""
    warmup_batch: int = Field(256, ge=1)
    warmup_learning_rate: float = Field(4e-3, gt=0)


class SampleConfig(_Section):
    count: int = Field(2000, ge=1)
    """Images, spread equally over the classes unless ``class_weights`` is given."""
    steps: int = Field(20, ge=1)
    """DDIM steps."""
    eta: float = Field(0.0, ge=0, le=1)
    guidance_scale: float = Field(1.5, ge=0)
    """1: no guidance. Fixed in advance: choosing it on private data would need its own budget."""
    class_weights: tuple[float, ...] | None = None
    """Share of each class, in the order of the model's classes; scaled to sum 1. None: equal."""
    captions: Path | None = None
    """Text file with one caption per line, for a model that is steered by captions."""
    seed: int = Field(0, ge=0)
    """Seed of the images. It is public: samples are post-processing of the released weights."""
    batch: int = Field(250, ge=1)
    """Images per forward pass: never changes the result beyond rounding."""
    formats: tuple[Literal["png", "webdataset", "npz"], ...] = ("png", "npz")
    generator: Literal["diffusion", "gaussian"] = "diffusion"
    """What draws latents: the diffusion model, or the released Gaussian of each class, the baseline
    that a diffusion run must beat (needs finetune.statistics_noise)."""
    model: Path | None = None
    """Model directory to sample from. None: the released model of the run."""
    out: Path | None = None
    """Folder of the samples. None: ``release/samples``."""


class EvaluateConfig(_Section):
    extractors: tuple[Literal["inception", "efficientnet", "small"], ...] = ("small",)
    """Feature extractors for FID and KID: Inception weights from ``inception_weights``, ImageNet's
    EfficientNet-Lite0 of its package, or a small net trained on half of the held-out images."""
    inception_weights: Path | None = None
    """File of an Inception-v3 state dict in torchvision's names (.safetensors or .pth)."""
    classifier_steps: int = Field(500, ge=1)
    """Training steps of the classifier that learns from synthetic images only."""
    classifier_width: int = Field(16, ge=1)
    images: int = Field(2000, ge=2)
    """Most images used for each score."""
    compare: dict[str, Path] = {}
    """Further folders of samples to score under the same protocol, by name."""
    samples: Path | None = None
    """Folder of samples to score. None: those of ``sample.out``, or of the run."""


class AuditConfig(_Section):
    canaries: int = Field(1000, ge=128, le=100_000)
    """Made-up records of which a fair coin includes each. More find smaller faults, and take
    longer."""
    epsilon: float = Field(3.0, gt=0, le=3.5)
    """What the audited run claims, at a delta of 1e-5. Above about 3.5 no guesses of a thousand
    canaries could contradict a claim."""
    steps: int = Field(24, ge=12)
    """Noisy steps of the audited run."""
    selection_steps: int = Field(128, ge=64)
    """Steps in which the audit looks at who was drawn. With 32, coins that two workers share would
    go unseen in one audit in twenty; with 64, in none of 300 simulated ones."""


def _increasing(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("expected [worst, best], both above 0, the best not below the worst")
    return pair


def _decreasing(pair: tuple[float, float]) -> tuple[float, float]:
    if not pair[0] >= pair[1] > 0:
        raise ValueError("expected [worst, best], both above 0, the worst not below the best")
    return pair


Rising = Annotated[tuple[float, float], AfterValidator(_increasing)]
Falling = Annotated[tuple[float, float], AfterValidator(_decreasing)]


class ClusterConfig(_Section):
    """Clusters for which ``dpldm plan --cluster`` predicts: nothing of it was measured. A range is
    [worst, best]; docs/scaling.md names the sources of the defaults."""

    gpus: tuple[Annotated[int, Field(ge=1)], ...] = (8, 32, 128, 512, 1024)
    batches: tuple[Annotated[int, Field(ge=1)], ...] = (4096, 16384, 65536, 262144)
    """Expected records per step."""
    tflops: Rising = (19.5, 67.0)
    """Of one GPU in fp32, 10^12 operations per second: A100 to H100."""
    utilisation: Rising = (0.2, 0.5)
    """Share of them that the network reaches."""
    launch_ms: Falling = (40.0, 10.0)
    """What a microbatch costs beyond its operations, milliseconds: thousands of small kernels."""
    link_gbit: Rising = (100.0, 400.0)
    """Network of one GPU, 10^9 bits per second: HDR100 to NDR InfiniBand."""
    hop_us: Falling = (20.0, 5.0)
    """One message between two GPUs, microseconds."""
    noise_per_s: Rising = (1e7, 5e7)
    """Coordinates of noise that a worker draws in a second, on its CPU."""
    hash_gb: Rising = (0.4, 2.0)
    """Gigabytes that a CPU core digests in a second with SHA-256."""
    rest_ms: Falling = (30.0, 5.0)
    """Ledger, launches and self-checks of a step, milliseconds."""
    gpu_hours: float | None = Field(None, gt=0)
    """What may be spent on the noisy steps: ``dpldm plan --cluster`` then proposes batch, steps,
    noise and draws. None: no proposal."""


class DeepSpeedConfig(_Section):
    zero_stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_whole)] = 2
    """What the workers share: 0: nothing; 1: the optimizer's state; 2: gradients too; 3: parameters
    too (public training only)."""
    bf16: bool = False
    """Public training computes in bfloat16 where that is safe; weights, sums and the optimizer's
    state stay float32."""
    offload_optimizer: bool = False
    """The optimizer's state lies in the memory of the machine instead of the GPU's."""
    offload_parameters: bool = False
    """Parameters that are not in use lie in the memory of the machine (zero_stage 3)."""
    options: dict[str, Any] = {}
    """Further DeepSpeed options by its own names, such as zero_optimization.reduce_bucket_size. One
    that this program decides, or that could change a private gradient, is refused."""


class RunConfig(_Section):
    dir: Path = Path("runs/default")
    """Everything of a run lies here: ``public/``, ``private/`` (0700) and ``release/``."""
    launcher: Literal["local", "ray"] = "local"
    workers: int | tuple[int, int] = 1
    """Worker processes, or ``[least, most]``: a Ray cluster that shrinks or grows is used as it is
    (the local launcher takes the most). Never changes the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    """CPU threads of a worker. None: the cores divided by the workers."""
    strategy: Literal["ddp", "deepspeed", "fsdp"] = "ddp"
    """How workers hold model and optimizer: whole replicas, DeepSpeed's ZeRO, or, in private
    training, frozen weights divided over the workers ("fsdp")."""
    update: Literal["auto", "whole", "sharded"] = "auto"
    """Who updates parameters from a private step: every worker all of them, or each its own slice,
    with the optimizer's state of that slice only. "auto": slices where they save time. Never
    changes the result (strategy "ddp")."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Settings of strategy "deepspeed"."""
    microbatch: Annotated[int, Field(ge=2)] | Literal["auto"] = 64
    """Records in one forward pass of the private training: never changes the result beyond the
    stated bound. "auto": the largest power of two that the devices hold and a lane can fill,
    measured on made-up records by the first start and kept in public/microbatch.json."""
    activation_checkpointing: bool = False
    """Blocks compute their activations again in the backward pass instead of keeping them: less
    memory and more time (15 to 21 % in private training), in public training too. Never changes
    the result. With ``microbatch`` "auto" set it before the first start; a VQ autoencoder
    cannot."""
    prefetch: int = Field(4, ge=0)
    """Microbatches that a worker makes ready in the background while it computes: never changes the
    result. 0: none."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints."""
    checkpoint_keep: int = Field(2, ge=2)
    """Checkpoints that stay; two at least, so that a damaged one has another before it."""
    timeout_s: float = Field(600.0, gt=0)
    """How long a collective waits for a lost worker."""
    stop_grace_s: float = Field(100.0, gt=0)
    """After SIGTERM or SIGUSR1: how long the run may take to save before it leaves unsaved."""
    max_failures: int = Field(3, ge=0, le=1000)
    """How often one start replaces workers that died or hung (launcher "ray"). An error that would
    come back is never tried again."""
    nodes_wait_s: float = Field(120.0, gt=0)
    """How long to wait for a Ray cluster to have room for the (least) workers."""
    ray_address: str = "local"
    """Address of a Ray cluster; "local" starts one on this machine, "auto" finds one that runs
    here."""
    ray_api_address: str | None = None
    """Where ``dpldm submit`` sends jobs: the http(s) address of a cluster's dashboard. None: the
    environment variable RAY_API_SERVER_ADDRESS."""
    ray_folder: Path | None = None
    """Folder on the cluster in which a submitted job runs: relative paths mean paths below it.
    None: the current folder, which the cluster must share."""
    submit_wait: bool = True
    """``dpldm submit`` follows the job and ends with its exit code; false: it leaves at once."""
    unsafe_test_key: str | None = None
    """Hex of a fixed key, for tests: the run has no privacy claim."""
    unsafe_diagnostics: bool = False
    """Write raw private values of every step (loss, batch size, gradient norms) as TensorBoard into
    ``private/diagnostics``: no privacy claim."""
    unsafe_no_noise: bool = False
    """Train without noise, for comparison: no privacy claim. ``dir`` must lie below a folder named
    private with mode 0700."""

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def crew(self) -> str:
        """``run.workers`` in words: ``2`` or ``1 to 4``."""
        least, most = self.least_workers, self.most_workers
        return f"{most}" if least == most else f"{least} to {most}"

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> int | tuple[int, int]:
        bounds = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if (
            len(bounds) != 2
            or any(not isinstance(bound, int) or isinstance(bound, bool) for bound in bounds)
            or not 1 <= bounds[0] <= bounds[1]
        ):
            raise ValueError("expected a number of workers from 1 on, or [least, most]")
        return bounds[0] if isinstance(value, int) else bounds


class Config(_Section):
    data: DataConfig = DataConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    privacy: PrivacyConfig | None = None
    finetune: FinetuneConfig | None = None
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    audit: AuditConfig = AuditConfig()
    cluster: ClusterConfig = ClusterConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _contradictions(self) -> Config:
        if len(self.model.block_channels) < 1 or len(self.autoencoder.block_channels) < 1:
            raise ValueError("block_channels: expected at least one number")
        if self.model.beta_end <= self.model.beta_start:
            raise ValueError("model.beta_end: expected more than model.beta_start")
        if self.privacy and (
            (self.privacy.dataset_epsilon is None) != (self.privacy.dataset_delta is None)
        ):
            raise ValueError(
                "privacy.dataset_epsilon, privacy.dataset_delta: expected both numbers, or none"
            )
        for which in ("public", "private", "heldout"):
            dataset = getattr(self.data, which)
            if isinstance(dataset.images, str) and dataset.source is not None:
                raise ValueError(
                    f"data.{which}.images: expected a folder where data.{which}.source is given; "
                    "an address is only read"
                )
        if (
            self.privacy
            and isinstance(self.data.private.latents, str)
            and self.privacy.dataset_epsilon is not None
            and self.privacy.dataset_ledger is None
        ):
            raise ValueError(
                "privacy.dataset_ledger: expected the file of the budget, because nothing can be "
                "written beside data.private.latents"
            )
        if self.data.unit == "image" and self.data.max_images_per_unit > 1:
            raise ValueError(
                "data.max_images_per_unit: expected 1 with data.unit = image; say whose images "
                "they are (data.unit = patient, user, ...)"
            )
        return self


def load_config(path: Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """Read ``path`` (TOML), apply ``section.key=value`` assignments, validate.

    Formal guarantees: every value is taken as the file says it or refused: no text becomes a
    number, no number a truth value, nothing is rounded, and no key is left out.
    Raises: ConfigError naming the file, the key, what was found and what was expected.
    """
    tree = {} if path is None else _read_toml(path)
    for assignment in assignments:
        _assign(tree, assignment)
    try:
        return parse_config(tree)
    except ConfigError as error:
        if path is None:
            raise
        origin = f"{path} with --set" if assignments else f"{path}"
        raise ConfigError(f"{origin}: {error}") from None


def parse_config(tree: dict[str, Any]) -> Config:
    """A plain nested dict as a checked Config. Raises: ConfigError."""
    for name, value in _leaves(tree):
        _refuse_odd(name, value)
    try:
        # JSON has arrays and texts where Python has tuples and paths; types are taken strictly
        return Config.model_validate_json(json.dumps(tree, default=os.fspath), strict=True)
    except ValidationError as error:
        faults = [_explain(item) for item in error.errors()]
        more = [f"{len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise ConfigError("; ".join(faults[:_MOST_FAULTS] + more)) from None
    except TypeError:
        raise ConfigError(
            "A date or time: expected texts, numbers, true, false, lists and sections only."
        ) from None


def with_changes(config: Config, **sections: dict[str, Any]) -> Config:
    """A copy with some fields changed: ``with_changes(config, run={"workers": 2})``."""
    tree = config.model_dump()
    for section, fields in sections.items():
        tree[section] = {**(tree[section] or {}), **fields}
    return parse_config(tree)


def refuse_other_settings(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raises: RunError naming the first setting (section.name) in which what lies in ``folder``
    was made otherwise."""
    for section, fields in wanted.items():
        for name, value in fields.items():
            settings = found.get(section)
            old = settings.get(name) if isinstance(settings, dict) else None
            if old != value:
                raise RunError(
                    f"{folder} was made with {section}.{name} = {_shown(str(old))}, this config "
                    f"says {_shown(str(value))}: restore the option, or use a new run.dir."
                )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # a pipe or a device would never end
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is not a regular file: give a TOML file.")
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"Cannot read the config {path}: {error.strerror}. Give a TOML file."
        ) from None
    except ValueError:  # a zero byte in the name
        raise ConfigError(f"Cannot read the config {str(path)!r}: give a TOML file.") from None
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path} is longer than {_MOST_BYTES} bytes: give a TOML file of a run.")
    try:
        text = content.decode()
        if _LONG_KEY.search(text):
            raise RecursionError
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: it is nested too deeply. Mend it.") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number or date that cannot be
        raise ConfigError(f"{path} is not valid TOML: {error}. Mend it.") from None


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a nested dict but dicts and lists; keys are values too.

    Raises: ConfigError if it is nested more deeply than any config.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while waiting:
        path, value = waiting.pop()
        name = ".".join(path)
        if len(path) > _DEEPEST:
            raise ConfigError(f"{_shown(name)}: nested too deeply, expected section.key.")
        if isinstance(value, dict):
            yield from ((f"a name in {name or 'the config'}", key) for key in value)
            waiting.extend(((*path, str(key)), part) for key, part in value.items())
        elif isinstance(value, (list, tuple)):
            waiting.extend(((*path, str(place)), part) for place, part in enumerate(value))
        else:
            yield name, value


def _refuse_odd(name: str, value: Any) -> None:
    """Raises: ConfigError for what no setting can mean and what breaks a path, a line or a sum."""
    if isinstance(value, (str, os.PathLike)):
        text = str(value)
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text) or (
            _REORDERING & set(text)
        ):
            raise ConfigError(f"{_shown(name)} = {_shown(text)}: expected no control characters.")
        if max(len(part.encode()) for part in text.split("/")) > _LONGEST_NAME:
            raise ConfigError(
                f"{_shown(name)} = {_shown(text)}: expected at most {_LONGEST_NAME} bytes per name."
            )
        _refuse_unknown_home(name, text)
    elif isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise ConfigError(f"{_shown(name)}: expected a number of at most {_LARGEST_NUMBER}.")


def _refuse_unknown_home(name: str, text: str) -> None:
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"{_shown(name)} = {_shown(text)}: no such user. Give the whole path."
            ) from None


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 2]}.."


def _assign(tree: dict[str, Any], assignment: str) -> None:
    name, separator, text = assignment.partition("=")
    keys = name.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {assignment!r}: expected section.key=value.")
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {assignment!r}: {key!r} is a value, expected a section.")
    tree[keys[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text  # a bare word is a string
    return found["value"] if len(found) == 1 else text


def _explain(item: dict[str, Any]) -> str:
    path = _shown(".".join(str(part) for part in item["loc"]))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"][:-1]), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Remove it."
        return f"Unknown option {path!r}. {hint}"
    if item["type"] == "missing":
        return f"{path} is missing: it has no default and must be set."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:
        return f"{message}."
    return f"{path} = {_shown(repr(item['input']))}: {message}."


def _known_keys(loc: Sequence[Any]) -> list[str]:
    section: Any = Config
    for part in loc:
        annotation = section.model_fields[part].annotation
        section = next(
            (
                kind
                for kind in (annotation, *getattr(annotation, "__args__", ()))
                if hasattr(kind, "model_fields")
            ),
            Config,
        )
    return list(section.model_fields)

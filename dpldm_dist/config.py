"""The one description of a run: frozen, typed, read from TOML, every unknown key refused.

Precedence: field default < TOML file < ``--set section.key=value``. TOML has no null: an absent
key, or ``--set key=none``, is None. Numbers that decide privacy have no default.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpldm_dist.errors import ConfigError, RunError


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
    images: Path | None = None
    """Folder of image shards. None: inside the run directory."""
    latents: Path | None = None
    """Folder of latent shards. None: inside the run directory."""


class DataConfig(_Section):
    size: int = Field(32, ge=8, le=2048)
    """Height and width of the images in pixels."""
    channels: Literal[1, 3] = 1
    """1: grey, 3: colour."""
    crop: Literal["center", "resize"] = "center"
    """How an image becomes square: the largest centred square, or squeezed to fit."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """An image that cannot be read stops the run with its name, or is skipped and counted."""
    on_duplicates: Literal["report", "stop"] = "report"
    """Images of equal content break record-level privacy: report them, or stop."""
    max_images_per_unit: int = Field(1, ge=1)
    """Images kept of one unit (person); a fixed random subset. One record holds them all."""
    shard_records: int = Field(500, ge=1)
    """Records per shard."""
    flips: bool = False
    """Store the mirrored image too, as a second view of the same record. Not for text or digits."""
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
    unit: str = "image"
    """What one record stands for, in words (image, patient, user), for the report."""
    noise_multiplier: float | None = Field(None, gt=0)
    """Standard deviation of the noise over clip_norm. None: the smallest that meets the budget."""
    records: int | None = Field(None, ge=1)
    """N that is declared to the public: it sets the sample rate and the divisor. None: the
    number of private records, which the run then publishes."""
    lanes: int = Field(4, ge=1)
    """Fixed groups of shards within which microbatches are packed; also the most workers that
    can share the work. Part of the mechanism: a run keeps its value."""
    reserve_steps: int = Field(0, ge=0)
    """Steps that the budget pays for beyond finetune.steps, for work repeated after a crash."""
    allow_duplicates: bool = False
    """Train although the private set holds images of equal content in different records."""


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


class RunConfig(_Section):
    dir: Path = Path("runs/default")
    """Everything of a run lies here: ``public/``, ``private/`` (0700) and ``release/``."""
    launcher: Literal["local", "ray"] = "local"
    workers: int = Field(1, ge=1)
    """Worker processes. Never changes the result."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1)
    """CPU threads of a worker. None: the cores divided by the workers."""
    strategy: Literal["ddp"] = "ddp"
    microbatch: int = Field(64, ge=2)
    """Records in one forward pass of the private training: never changes the result beyond the
    stated bound."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints."""
    checkpoint_keep: int = Field(2, ge=1)
    timeout_s: float = Field(600.0, gt=0)
    """How long a collective waits for a lost worker."""
    ray_address: str = "local"
    """Address of a Ray cluster; "local" starts one on this machine."""
    unsafe_test_key: str | None = None
    """Hex of a fixed key, for tests: the run has no privacy claim."""
    unsafe_no_noise: bool = False
    """Train without noise, for comparison: no privacy claim. ``dir`` must lie below a folder named
    private with mode 0700."""


class Config(_Section):
    data: DataConfig = DataConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    privacy: PrivacyConfig | None = None
    finetune: FinetuneConfig | None = None
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _contradictions(self) -> Config:
        if len(self.model.block_channels) < 1 or len(self.autoencoder.block_channels) < 1:
            raise ValueError("block_channels: expected at least one number")
        if self.model.beta_end <= self.model.beta_start:
            raise ValueError("model.beta_end: expected more than model.beta_start")
        return self


def load_config(path: Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """Read ``path`` (TOML), apply ``section.key=value`` assignments, validate.

    Raises: ConfigError naming the key, what was found and what was expected.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"Cannot read the config {path}: {error.strerror}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    for assignment in assignments:
        _assign(tree, assignment)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """A plain nested dict as a checked Config. Raises: ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(tree, item) for item in error.errors())) from None


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
            old = found.get(section, {}).get(name)
            if old != value:
                raise RunError(
                    f"{folder} was made with {section}.{name} = {old}, this config says {value}: "
                    "restore the option, or use a new run.dir."
                )


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
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _explain(tree: dict[str, Any], item: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"][:-1]), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"Unknown option {path!r}.{hint}"
    if item["type"] == "missing":
        return f"{path} is missing: it has no default and must be set."
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:
        return f"{message}."
    return f"{path} = {item['input']!r}: {message}."


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

"""The recipe: one frozen, strictly validated object that decides a whole run.

A recipe is plain data. Resolved, it is logged with every run and rebuilds it. Each step is
addressed by the slice of the recipe that it reads, so a changed setting reruns only what depends
on it. Numbers of the paper are cited by section (arXiv 2304.08485).
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

Dtype = Literal["float32", "bfloat16", "float16"]
Precision = Literal["auto", "float32", "bfloat16"]


StageName = Literal["pretrain", "finetune"]
STAGES: tuple[StageName, ...] = ("pretrain", "finetune")
"""The two training stages, in their order (section 4.2)."""

_REGISTRY_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
"""MLflow refuses "/" and ":", but only when the model is registered, at the end of the job."""


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise PydanticCustomError("gpus", "a share of one GPU, or a whole number of them")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
"""What Ray gives one process: a share of one GPU, or whole ones."""
TorchSeed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""A larger one would fail in torch, after the steps before it."""


class Config(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent coercion of wrong types."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Vision(Config):
    """The frozen vision tower g(X_v) (section 4.1): CLIP ViT-L/14 grid features before the last layer."""

    kind: Literal["clip", "siglip", "efficientnet_lite"] = "clip"
    path: str = "openai/clip-vit-large-patch14"
    """Local folder, hub name, or `builtin:NAME` for weights that the `weights` step makes."""
    revision: str | None = None
    layer: int = -2
    """Index into the tower's hidden states; -2 is the penultimate layer."""
    image_size: int | None = Field(default=None, ge=16, le=2048)
    """Side in pixels; None takes the image processor's own."""
    aspect: Literal["square", "pad"] = "square"
    """`square`: resize the shorter side and centre-crop. `pad`: pad to a square with the mean colour."""


class Language(Config):
    """The language model f(.) (section 4.1): any Hugging Face causal language model."""

    path: str = "lmsys/vicuna-13b-v1.3"
    revision: str | None = None
    hidden_size: int | None = Field(default=None, ge=1)
    """Expected shape, checked when the weights are loaded; None accepts any."""
    layers: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)


class Weights(Config):
    """How long the built-in models of `tiny` are trained before they take the place of CLIP and Vicuna."""

    seed: TorchSeed = 0
    clip_steps: int = Field(default=220, ge=1)
    clip_batch_size: int = Field(default=256, ge=8)
    clip_lr: float = Field(default=1e-3, gt=0)
    language_steps: int = Field(default=300, ge=1)
    language_batch_size: int = Field(default=32, ge=1)
    language_lr: float = Field(default=2e-3, gt=0)


class ProjectorConfig(Config):
    """The projection W (section 4.1): linear as in the paper, or the two-layer MLP of LLaVA-1.5."""

    kind: Literal["linear", "mlp2x_gelu"] = "linear"


class Conversation(Config):
    """How samples become token sequences (section 4.2, table 2)."""

    template: Literal["plain", "v0", "v1", "llama_2", "chatml", "tokenizer"] = "v1"
    pretrain_template: Literal["plain", "v0", "v1", "llama_2", "chatml", "tokenizer"] = "plain"
    """`plain`: image then caption, no question (LLaVA >= 1.0). Any other keeps the question (paper)."""
    system: str | None = None
    """Replaces the template's system message; an empty string leaves it out."""
    image_position: Literal["data", "front", "random"] = "data"
    """Where the first turn's image goes; `random` is equation 2 of the paper: [q, v] or [v, q]."""
    max_tokens: int = Field(default=2048, ge=16)
    """Longest sequence, image tokens included."""
    over_length: Literal["truncate", "drop"] = "truncate"


class Dataset(Config):
    """One dataset of a mix."""

    path: str
    """LLaVA JSON, or what `data.captions` may be; a path or fsspec URI."""
    images: str | None = None
    """Image folder of LLaVA JSON; None looks beside it."""
    format: Literal["llava", "captions"] = "llava"
    weight: float = Field(default=1.0, gt=0)
    """How often an epoch visits each sample, on average: 2 is twice, 0.5 is every other one."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """None takes the file's (or folder's) name without its ending."""

    @model_validator(mode="after")
    def _check_images(self) -> Dataset:
        if self.images is not None and self.format == "captions":
            raise PydanticCustomError("images", "no `images` beside format=captions: `path` names them")
        return self

    @property
    def label(self) -> str:
        """What it is called in tables, metrics and sample ids."""
        stem = PurePosixPath(self.path.rstrip("/")).name.removesuffix(".gz").rpartition(".")
        return self.name or re.sub(r"[^A-Za-z0-9_.-]", "_", stem[0] or stem[2]).lstrip(".-") or "data"


class Data(Config):
    """Where images, captions and conversations come from."""

    source: Literal["scenes", "emoji", "llava", "captions"] = "llava"
    """Built-in `scenes` and `emoji`; `llava`: LLaVA JSON; `captions`: captioned images."""
    seed: int = 0
    pretrain_json: str | None = None
    """LLaVA JSON of stage 1 (path or fsspec URI)."""
    pretrain_images: str | None = None
    finetune_json: str | None = None
    """LLaVA JSON of stage 2."""
    finetune_images: str | None = None
    pretrain_mix: tuple[Dataset, ...] = ()
    """Several weighted datasets for stage 1, in place of `pretrain_json`."""
    finetune_mix: tuple[Dataset, ...] = ()
    """Several weighted datasets for stage 2, in place of `finetune_json`."""
    held_out_json: str | None = None
    """LLaVA JSON of the gate's questions, instead of a share of the images. Its images are not trained on."""
    held_out_images: str | None = None
    captions: str | None = None
    """`captions` source: a Parquet table, or a folder with captions.{jsonl,csv,parquet} or *.txt."""
    emoji_dir: str | None = None
    """`emoji` source: the folder that the fetch command filled (docs/smol.md)."""
    train_scenes: int = Field(default=0, ge=0)
    test_scenes: int = Field(default=0, ge=0)
    validation_scenes: int = Field(default=0, ge=0)
    samples_per_image: int = Field(default=1, ge=1)
    """Built-in sources: how many stage-2 conversations are written for each training image."""
    questions_per_sample: int = Field(default=3, ge=1)
    """Built-in scenes: largest number of questions of one stage-2 conversation."""
    test_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the user's images held out for the gate, chosen by the hash of their id."""
    max_pixels: int = Field(default=89_478_485, ge=1)
    """Larger images are quarantined before they are decoded."""
    max_bytes: int = Field(default=64 * 1024 * 1024, ge=1)

    @property
    def is_mix(self) -> bool:
        """Whether samples carry the name of their dataset, in both stages."""
        return bool(self.pretrain_mix or self.finetune_mix)

    def datasets(self, stage: StageName) -> tuple[Dataset, ...]:
        """The datasets of a stage where either has a mix: a lone `*_json` is one, too. Else none."""
        mix, path, images = (
            (self.pretrain_mix, self.pretrain_json, self.pretrain_images)
            if stage == "pretrain"
            else (self.finetune_mix, self.finetune_json, self.finetune_images)
        )
        if mix or path is None or not self.is_mix:
            return mix
        return (Dataset(path=path, images=images),)


class Features(Config):
    """The feature store of frozen vision features."""

    mode: Literal["store", "inline"] = "store"
    """`inline`: in the training worker instead (at 7B the frozen forward is 1-2 % of the FLOPs)."""
    batch_size: int = Field(default=64, ge=1)
    shard_rows: int = Field(default=2048, ge=1)
    encoders: int = Field(default=1, ge=1)
    """Encoder actors."""
    encoder_cpus: float = Field(default=1.0, ge=0)
    encoder_gpus: Gpus = 0.0
    decoder_cpus: float = Field(default=1.0, gt=0)
    prefetch_steps: int = Field(default=2, ge=1)
    """Steps of training whose features are read ahead ..."""
    prefetch_mebibytes: int = Field(default=4096, ge=1)
    """... and fewer where these would hold more memory than that, in each worker."""
    read_threads: int = Field(default=16, ge=1)
    """Features that a training worker reads at the same time."""


class Lora(Config):
    """Low-rank adapters in the language model (arXiv 2106.09685); W is trained in full beside them."""

    r: int = Field(default=0, ge=0)
    """Rank; 0 trains all weights."""
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the matrices that get an adapter; `all-linear`: all but the LM head's."""


class Lengths(Config):
    """Samples that a stage leaves out by their length in tokens, before any step; they are counted.

    Lengths are those before `conversation.max_tokens` truncates, image tokens included.
    """

    min_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    min_answer_tokens: int | None = Field(default=None, ge=1)
    """Supervised tokens of all answers, their end markers included."""
    max_answer_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> Lengths:
        for least, most, what in (
            (self.min_tokens, self.max_tokens, "tokens"),
            (self.min_answer_tokens, self.max_answer_tokens, "answer_tokens"),
        ):
            if least is not None and most is not None and least > most:
                raise PydanticCustomError("lengths", f"min_{what} <= max_{what}")
        return self


class Stage(Config):
    """One training stage (section 4.2)."""

    train: Literal["projector", "all"] = "projector"
    """Stage 1 trains only W; stage 2 trains W and the language model."""
    lr: float = Field(default=2e-3, gt=0)
    projector_lr: float | None = Field(default=None, gt=0)
    """Learning rate of W where it differs from `lr`."""
    embedding_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the token embeddings and the LM head where it differs from `lr`."""
    lora: Lora = Lora()
    lengths: Lengths = Lengths()
    batch_size: int = Field(default=128, ge=1)
    """Global batch: samples per optimizer step over all workers."""
    epochs: float = Field(default=1.0, gt=0, le=100_000)
    micro_batch_size: int = Field(default=16, ge=1)
    """Samples per forward pass of one worker."""
    packing: bool = True
    """Samples share rows, each with attention to itself alone, instead of padding to a common length."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Precision = "bfloat16"
    """`auto`: bf16 where the device computes it natively, else float32."""
    zero: Literal[0, 1, 2, 3] = 0
    offload: bool = False
    """Optimizer state in host memory (DeepSpeed CPU offload)."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """torch.compile for the language model: half a minute at the start; it pays on some devices."""
    seed: TorchSeed = 0
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimizer steps between checkpoints."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """A checkpoint also whenever so many minutes have passed since the last one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept until the stage is finished ..."""
    keep_best: int = Field(default=0, ge=0)
    """... and those with the lowest mean training loss since the checkpoint before."""

    @model_validator(mode="after")
    def _check_lora(self) -> Stage:
        if self.lora.r and self.train == "projector":
            raise PydanticCustomError("lora", "lora.r=0 where train=projector: the language model is frozen")
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> Stage:
        if self.compile and self.zero == 3:
            raise PydanticCustomError(
                "compile", "compile=false where zero=3, which gathers weights as it goes"
            )
        return self


class Evaluation(Config):
    """Held-out questions, asked with the right image, a wrong one, and none; and the promotion gate."""

    max_questions: int | None = Field(default=None, ge=1)
    """Asks only the first N per task, in an order fixed by `seed`."""
    batch_size: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=32, ge=1)
    seed: int = 0
    min_accuracy: float = Field(default=0.5, ge=0, le=1)
    """The gate: accuracy on grounding questions with the right image must reach this ..."""
    min_margin: float = Field(default=0.2, ge=0, le=1)
    """... and exceed the accuracy with shuffled images, and without image, by this."""
    gallery: int = Field(default=24, ge=0)
    """Test images shown with question, reference and answer in the report."""
    gpus: Gpus = 0.0


class Scaling(Config):
    """What the training workers take from the cluster."""

    workers: int | tuple[int, int] = 1
    """A number, or `[least, most]`: training goes on with the workers that there is room for."""
    resize_seconds: float = Field(default=60.0, ge=0)
    """How often a training with less than `most` workers looks for room for more."""
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: Gpus = 0.0
    """A whole GPU for each of several workers: NCCL, over which they talk, refuses two of them on one GPU. A
    share is for one worker beside something else, such as encoders."""
    max_failures: int = Field(default=3, ge=0)
    """Worker failures survived before the job gives up."""

    @field_validator("workers", mode="plain")
    @classmethod
    def _check_workers(cls, value: Any) -> int | tuple[int, int]:
        bounds = value if isinstance(value, list | tuple) else [value, value]
        if len(bounds) != 2 or any(type(bound) is not int for bound in bounds):
            raise PydanticCustomError("workers", "a whole number, or [least, most]")
        least, most = bounds
        if not 1 <= least <= most:
            raise PydanticCustomError("workers", "a number >= 1, or [least, most] with 1 <= least <= most")
        return (least, most) if least < most else most

    @field_serializer("workers", when_used="json")
    def _list_workers(self, value: int | tuple[int, int]) -> int | list[int]:
        return value if isinstance(value, int) else list(value)

    @property
    def min_workers(self) -> int:
        """The least that training starts or goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most that training takes."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Tracking(Config):
    """MLflow."""

    uri: str | None = None
    """Tracking server; None keeps a SQLite store under the storage root."""
    experiment: str = "rayva"
    model_name: str | None = Field(default=None, pattern=_REGISTRY_NAME)
    """Name in the model registry; None takes `rayva-<recipe>`."""


class Generation(Config):
    """Instruction data written by a language-only teacher from captions and boxes (section 3)."""

    source: Literal["jsonl", "coco", "dataset"] = "jsonl"
    """`jsonl`: rows of {id, image, captions, instances}; `coco`: its annotation files; `dataset`: the
    training images of the recipe's built-in `data.source`."""
    input: str | None = None
    """`jsonl`: the file (path or fsspec URI)."""
    coco_captions: str | None = None
    coco_instances: str | None = None
    kinds: tuple[float, float, float] = (58.0, 23.0, 77.0)
    """Shares of conversations, detailed descriptions and complex reasoning; the paper's by default."""
    samples: int | None = Field(default=None, ge=1)
    """How many samples in all; None takes three for each context."""
    boxes_in_conversations: bool = False
    """The original shows boxes to the teacher for the other two kinds only."""
    prompts: str | None = None
    """Folder of prompts in the original's layout; None takes those that come with Rayva."""
    teacher: Literal["symbolic", "endpoint", "batch"] = "symbolic"
    """`endpoint`: any OpenAI-compatible one, Rayva's own included; `batch`: files of OpenAI's batch API."""
    base_url: str = "https://api.openai.com/v1"
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key."""
    temperature: float | None = Field(default=0.7, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    """Longest answer."""
    seed: int = 0
    attempts: int = Field(default=6, ge=1)
    """How often a sample is asked for while its answers are rejected. A later run with more goes on with
    those that are left."""
    concurrency: int = Field(default=16, ge=1)
    """Calls in flight."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    timeout: float = Field(default=120.0, gt=0)
    """Seconds for a call."""
    max_cost: float | None = Field(default=None, ge=0)
    """Dollars that all answers kept at this storage may have cost; what might pass it is not asked."""
    prices: str | None = None
    """YAML table of prices; None takes the one that comes with Rayva."""


class Serving(Config):
    """The endpoint that serves the registered model."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=2, ge=1)
    cpus_per_replica: float = Field(default=1.0, ge=0)
    gpus_per_replica: Gpus = 0.0
    max_new_tokens: int = Field(default=256, ge=1)
    max_images: int = Field(default=4, ge=1)
    max_image_bytes: int = Field(default=10 * 1024 * 1024, ge=1)


class Recipe(Config):
    """A whole run, resolved."""

    name: str = Field(pattern=_REGISTRY_NAME)
    vision: Vision = Vision()
    language: Language = Language()
    weights: Weights = Weights()
    projector: ProjectorConfig = ProjectorConfig()
    conversation: Conversation = Conversation()
    data: Data = Data()
    features: Features = Features()
    generation: Generation = Generation()
    pretrain: Stage = Stage()
    finetune: Stage = Stage(train="all", lr=2e-5, batch_size=32, epochs=3.0)
    evaluation: Evaluation = Evaluation()
    scaling: Scaling = Scaling()
    tracking: Tracking = Tracking()
    serving: Serving = Serving()

"""Recipes: names, files and overrides become one validated object, and faults name the key."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayva.errors import RecipeError
from rayva.recipes import from_dict, require_runnable, resolve, to_dict, yaml12
from rayva.recipes.named import NAMED
from rayva.recipes.schema import Dataset
from rayva.storage import Storage

LLAVA = ("data.source=llava", "data.pretrain_json=a.json", "data.finetune_json=b.json")


def fault(*overrides: str, name: str = "tiny", config: str | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(name, config, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMED)
def test_a_recipe_survives_json(name: str) -> None:
    recipe = resolve(name)
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert recipe.name == name


@pytest.mark.parametrize("name", NAMED)
def test_the_recipe_of_a_run_is_a_file_of_settings(name: str, tmp_path) -> None:
    overrides = ["finetune.lr=3e-6", 'conversation.system=A \U0001f600 "é".', "name=my-own"]
    recipe = resolve(name, overrides=overrides)
    storage = Storage(str(tmp_path / "a run"))
    storage.write_json("recipe.json", to_dict(recipe))
    assert resolve("tiny", storage.uri("recipe.json")) == recipe
    again = resolve("tiny", storage.uri("recipe.json"), ["finetune.epochs=2"])
    assert to_dict(again) == {**to_dict(recipe), "finetune": {**to_dict(recipe)["finetune"], "epochs": 2.0}}


def test_the_paper_recipe_has_the_papers_numbers() -> None:
    recipe = resolve("llava-13b")
    assert (recipe.vision.path, recipe.vision.image_size) == ("openai/clip-vit-large-patch14", 224)
    assert recipe.projector.kind == "linear"
    assert recipe.conversation.template == recipe.conversation.pretrain_template == "v0"
    assert recipe.conversation.image_position == "random"
    for stage, train, lr, batch, epochs in (
        (recipe.pretrain, "projector", 2e-3, 128, 1),
        (recipe.finetune, "all", 2e-5, 32, 3),
    ):
        assert (stage.train, stage.lr, stage.batch_size, stage.epochs) == (train, lr, batch, epochs)
        assert (stage.warmup_ratio, stage.schedule, stage.weight_decay) == (0.03, "cosine", 0)
        assert stage.precision == "bfloat16"
    assert (recipe.scaling.workers, recipe.scaling.gpus_per_worker) == (8, 1)


def test_llava_1_5_differs_from_the_paper_where_it_should() -> None:
    recipe = resolve("llava-1.5-7b")
    assert (recipe.vision.image_size, recipe.vision.aspect) == (336, "pad")
    assert recipe.projector.kind == "mlp2x_gelu"
    assert (recipe.conversation.template, recipe.conversation.pretrain_template) == ("v1", "plain")
    assert (recipe.pretrain.lr, recipe.pretrain.batch_size) == (1e-3, 256)
    assert (recipe.finetune.lr, recipe.finetune.batch_size, recipe.finetune.epochs) == (2e-5, 128, 1)


@pytest.mark.parametrize("series", ["llava", "llava-1.5"])
def test_sizes_of_a_series_differ_only_in_the_language_model(series: str) -> None:
    small, large = to_dict(resolve(f"{series}-7b")), to_dict(resolve(f"{series}-13b"))
    assert {key for key in small if small[key] != large[key]} == {"name", "language"}
    shape = ("hidden_size", "layers", "heads")
    assert tuple(small["language"][key] for key in shape) == (4096, 32, 32)
    assert tuple(large["language"][key] for key in shape) == (5120, 40, 40)


def test_overrides_win_over_the_file_and_the_file_over_the_name(tmp_path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("finetune:\n  lr: 3e-5\n  epochs: 2\nconversation: {system: no}\n")
    recipe = resolve("tiny", str(config), ["finetune.lr=2e-5", "finetune.betas=[0.9, 0.95]"])
    assert recipe.finetune.lr == 2e-5
    assert recipe.finetune.epochs == 2
    assert recipe.finetune.betas == (0.9, 0.95)
    assert recipe.conversation.system == "no", "YAML 1.1 would read false"
    assert recipe.pretrain == resolve("tiny").pretrain


@settings(deadline=None)
@given(
    st.floats(min_value=1e-12, max_value=1e3, allow_nan=False), st.sampled_from(["{!r}", "{:e}", "{:.17g}"])
)
def test_every_spelling_of_a_number_is_a_number(value: float, spelling: str) -> None:
    text = spelling.format(value)
    assert resolve("tiny", None, [f"pretrain.lr={text}"]).pretrain.lr == float(text)


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("vision.revision=1234567", "vision", "1234567"),
        ("vision.revision=1e5", "vision", "1e5"),
        ("vision.revision=null", "vision", None),
        ("vision.revision=", "vision", None),
    ],
)
def test_text_settings_take_what_looks_like_a_number(override: str, section: str, value: object) -> None:
    assert getattr(resolve("tiny", None, [override]), section).revision == value


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("Answer shortly # please", "Answer shortly # please"),
        ("You are: kind", "You are: kind"),
        ("- kind", "- kind"),
        ("&a *b !c", "&a *b !c"),
        ("[kind] and brief", "[kind] and brief"),
        ("'quoted # text'", "quoted # text"),
        ('"two\\nlines"', "two\nlines"),
        (" ~ ", None),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_text_settings_are_taken_as_they_stand(given: str, value: str | None) -> None:
    assert resolve("tiny", None, [f"conversation.system={given}"]).conversation.system == value
    assert resolve("tiny", None, [f"data.captions={given}"]).data.captions == value


def test_what_only_begins_with_a_quote_is_a_clear_error() -> None:
    assert "put it in quotes" in fault("conversation.system='Tis the season")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("finetune={[a]: b}", "not text"),
        ("finetune={{a: b}: c}", "not text"),
        ("finetune={1: 2}", "no text"),
        ("data.finetune_mix=[&a [*a]]", "holds itself"),
        ("finetune=&a {lr: *a}", "holds itself"),
        ("data.finetune_mix=[!!binary aGk=]", "bytes"),
        ("data.finetune_mix=[{path: !!timestamp 2024-01-01}]", "date"),
        ("data.finetune_mix=[!!timestamp x]", "cannot be read"),
        ("finetune.offload=!!bool 7", "cannot be read"),
        (f"finetune.seed={'9' * 5000}", "cannot be read"),
        (f"data.finetune_mix={'[' * 3000}", "nested too deeply"),
        ("finetune.lr={a: {b: 1}}", "finetune.lr: expected a number"),
    ],
)
def test_odd_yaml_is_a_clear_error(setting: str, told: str, tmp_path) -> None:
    assert told in fault(setting, name="llava-7b")
    config = tmp_path / "my.yaml"
    key, _, value = setting.partition("=")
    if told != "nested too deeply":
        section, _, last = key.rpartition(".")
        config.write_text(f"{section}: {{{last}: {value}}}" if section else f"{last}: {value}")
        assert told in fault(name="llava-7b", config=str(config))


def test_bytes_in_a_file_are_a_clear_error(tmp_path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("tracking: {experiment: !!binary aGk=}")
    assert "a bytes is no value of a setting" in fault(config=str(config))


_NUMBERLIKE = st.from_regex(r"[-+0-9eE._:xo]{1,12}", fullmatch=True)


@settings(deadline=None)
@given(st.text() | _NUMBERLIKE | st.sampled_from(["no", "~", "y", "1e5"]))
def test_any_text_survives_yaml(text: str) -> None:
    settings = {"system": text, "list": [text], "number": 1e-5, "nothing": None}
    assert yaml12.load(yaml12.dump(settings)) == settings


def test_an_empty_text_is_not_nothing() -> None:
    assert resolve("tiny", None, ['conversation.system=""']).conversation.system == ""


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("finetune.batchsize=3", "finetune.batch_size"),
        ("finetun.batch_size=3", "finetune.batch_size"),
        ("pretrain.learning_rate=1", "pretrain.lr"),
        ("scaling.worker=2", "scaling.workers"),
        ("data.train_scene=2", "data.train_scenes"),
        ("finetune={batchsize: 3}", "finetune.batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_with_its_path(override: str, nearest: str) -> None:
    assert f"the nearest is {nearest!r}" in fault(override)


def test_unknown_keys_in_a_file_are_told_too(tmp_path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("finetune:\n  epoch: 2\n")
    assert "'finetune.epoch'; the nearest is 'finetune.epochs'" in fault(config=str(config))


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "'llava-7b'" in fault(name="llava7b")


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("finetune.lr=abc", "finetune.lr", "a number"),
        ("finetune.lr='2e-5'", "finetune.lr", "a number"),
        ("finetune.batch_size=8.5", "finetune.batch_size", "a whole number"),
        ("finetune.batch_size=true", "finetune.batch_size", "a whole number"),
        ("finetune.offload=1", "finetune.offload", "true or false"),
        ("finetune.betas=0.9", "finetune.betas", "a list"),
        ("finetune.betas=[0.9, 1.0]", "finetune.betas.1", "a number < 1"),
        ("finetune.lr=-1", "finetune.lr", "a number > 0"),
        ("vision.kind=blip", "vision.kind", "'clip'"),
        ("finetune=3", "finetune", "a section"),
        ("vision.path=[a]", "vision.path", "text"),
    ],
)
def test_a_wrong_value_names_the_key_and_what_it_wants(override: str, key: str, expected: str) -> None:
    message = fault(override)
    assert (
        message.startswith(f"{key}: expected {expected}") or f"{key}: expected one of {expected}" in message
    )


@pytest.mark.parametrize("key", ["name", "tracking.model_name"])
@pytest.mark.parametrize("name", ["a/b", "a:b"])
def test_a_name_that_the_registry_refuses_is_told_before_a_run(key: str, name: str) -> None:
    with pytest.raises(RecipeError, match=key):
        resolve("tiny", None, [f"{key}={name}"])


def test_all_faults_are_told_at_once() -> None:
    message = fault("finetune.lr=abc", "pretrain.epochs=0")
    assert "finetune.lr" in message
    assert "pretrain.epochs" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("finetune: [", "not valid YAML"),
        ("- 1\n- 2\n", "not settings by name"),
        ("finetune: {lr: 1, lr: 2}", "given twice"),
        ("x: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("finetune.lr: 1e-4", "write `finetune:`, and below it, indented, `lr: ...`"),
        ("finetune: {lora.r: 4}", "write `finetune.lora:`"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_clear_error(tmp_path, text: str, told: str) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(text)
    assert told in fault(config=str(config))


def test_a_missing_file_is_a_clear_error(tmp_path) -> None:
    assert "cannot be read" in fault(config=str(tmp_path / "none.yaml"))


def test_an_empty_file_changes_nothing(tmp_path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("# nothing\n")
    assert resolve("tiny", str(config)) == resolve("tiny")


def test_an_override_without_a_value_is_a_clear_error() -> None:
    assert "key.sub=value" in fault("finetune.lr")


def test_missing_data_is_named_before_a_run_starts() -> None:
    with pytest.raises(RecipeError, match=r"data\.pretrain_json.*data\.finetune_json"):
        require_runnable(resolve("llava-7b"))
    require_runnable(
        resolve("llava-7b", None, ["data.pretrain_json=a.json", "data.finetune_json=s3://b/c.json"])
    )
    require_runnable(resolve("tiny"))


def mix(text: str) -> str:
    return fault(f"data.finetune_mix={text}", name="llava-7b")


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        ("0", "a number > 0"),
        ("-1", "a number > 0"),
        (".nan", "a number"),
        ("NaN", "a number"),
        (".inf", "a number"),
        ("1e999", "a finite number"),
        ("true", "a number"),
        ("two", "a number"),
    ],
)
def test_a_bad_weight_in_a_mix_names_its_place(weight: str, told: str) -> None:
    message = mix(f"[{{path: a.json}}, {{path: b.json, weight: {weight}}}]")
    assert message.startswith(f"data.finetune_mix.1.weight: expected {told}")


def test_a_weight_that_is_no_number_is_refused_from_python_too() -> None:
    settings = to_dict(resolve("llava-7b"))
    settings["data"]["finetune_mix"] = [{"path": "a.json", "weight": float("nan")}]
    with pytest.raises(RecipeError, match=r"data\.finetune_mix\.0\.weight: expected a finite number"):
        from_dict(settings)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[{path: a.json, wieght: 2}]", "no key 'data.finetune_mix.0.wieght'; the nearest is 'weight'"),
        ("[{pth: a.json}]", "the nearest is 'path'"),
        ("[{images: a}]", "data.finetune_mix.0.path is missing"),
        ("{path: a.json}", "data.finetune_mix: expected a list"),
        ("[a.json]", "data.finetune_mix.0: expected a section"),
        ("[{path: a.json, name: 'x/y'}]", "letters, digits"),
        ("[{path: a.json, name: ..}]", "letters, digits"),
        ("[{path: a, format: parquet}]", "'llava' or 'captions'"),
        ("[{path: a, format: captions, images: b}]", "no `images` beside format=captions"),
    ],
)
def test_a_mix_that_cannot_be_used_is_a_clear_error(text: str, told: str) -> None:
    assert told in mix(text)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("a/llava_158k.json", "llava_158k"),
        ("s3://bucket/set v2.jsonl.gz", "set_v2"),
        ("/data/pictures/", "pictures"),
        (".hidden", "hidden"),
        ("../..", "data"),
    ],
)
def test_a_dataset_is_called_by_its_file(path: str, label: str) -> None:
    assert Dataset(path=path).label == label


def test_a_mix_survives_json_and_stands_for_the_file_of_its_stage() -> None:
    overrides = (
        "data.pretrain_json=p.json",
        "data.finetune_mix=[{path: a/x.v1.json.gz, weight: 2}, {path: s3://b/c/, format: captions}]",
    )
    recipe = resolve("llava-7b", None, overrides)
    require_runnable(recipe)
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert [(one.label, one.weight) for one in recipe.data.datasets("finetune")] == [
        ("x.v1", 2.0),
        ("c", 1.0),
    ]
    assert [one.label for one in recipe.data.datasets("pretrain")] == ["p"]
    assert not resolve("llava-7b", None, ["data.pretrain_json=p.json"]).data.datasets("pretrain")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.finetune_mix=[{path: a.json}, {path: b/a.json}]", "are called a"),
        ("data.finetune_json=q.json", "are both set"),
        ("data.finetune_images=dir", "are both set"),
        ("data.source=captions", "but data.source is 'captions'"),
    ],
)
def test_a_mix_that_contradicts_other_settings_is_refused_before_a_run(override: str, told: str) -> None:
    overrides = ["data.pretrain_json=p.json", "data.finetune_mix=[{path: a.json}]", override]
    with pytest.raises(RecipeError, match=told):
        require_runnable(resolve("llava-7b", None, overrides))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("finetune.lengths.min_tokens=0", "a number >= 1"),
        ("finetune.lengths.mintokens=3", "the nearest is 'finetune.lengths.min_tokens'"),
        ("finetune.lengths={min_tokens: 9, max_tokens: 3}", "min_tokens <= max_tokens"),
        ("finetune.lengths={min_answer_tokens: 9, max_answer_tokens: 3}", "min_answer_tokens <= max"),
    ],
)
def test_limits_of_length_are_checked(override: str, told: str) -> None:
    assert told in fault(override)


def test_a_language_model_that_stage_1_would_train_in_vain_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pretrain\.train=all.*would be lost"):
        require_runnable(resolve("tiny", None, ["pretrain.train=all"]))


@pytest.mark.parametrize(
    "overrides",
    [["pretrain.embedding_lr=1e-4"], ["finetune.embedding_lr=1e-4", "finetune.lora.r=8"]],
)
def test_a_rate_for_what_is_not_trained_is_refused(overrides: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"embedding_lr has no effect"):
        require_runnable(resolve("tiny", None, overrides))


def test_workers_that_take_nothing_are_refused_before_a_run() -> None:
    with pytest.raises(RecipeError, match="neither CPUs nor GPUs"):
        require_runnable(resolve("tiny", None, ["scaling.cpus_per_worker=0"]))
    require_runnable(resolve("tiny", None, ["scaling.cpus_per_worker=0", "scaling.gpus_per_worker=1"]))


def test_offload_needs_sharding() -> None:
    with pytest.raises(RecipeError, match=r"pretrain\.zero"):
        require_runnable(resolve("tiny", None, ["pretrain.offload=true"]))


@pytest.mark.parametrize(
    "setting",
    ["scaling.gpus_per_worker", "features.encoder_gpus", "evaluation.gpus", "serving.gpus_per_replica"],
)
def test_gpus_are_a_share_of_one_or_whole_ones(setting: str) -> None:
    for good in ("0", "0.25", "1", "8"):
        resolve("tiny", None, [f"{setting}={good}"])
    with pytest.raises(RecipeError, match="a share of one GPU, or a whole number") as caught:
        resolve("tiny", None, [f"{setting}=1.5"])
    assert setting in str(caught.value)


@pytest.mark.parametrize(
    ("workers", "gpus", "shared"),
    [
        ("2", "0.5", True),
        ("[1,4]", "0.25", True),
        ("1", "0.5", False),
        ("2", "0.6", False),
        ("2", "0", False),
    ],
)
def test_workers_that_might_share_a_gpu_are_refused_before_a_run(
    workers: str, gpus: str, shared: bool
) -> None:
    recipe = resolve("tiny", None, [f"scaling.workers={workers}", f"scaling.gpus_per_worker={gpus}"])
    if not shared:
        require_runnable(recipe)
        return
    with pytest.raises(RecipeError, match="NCCL refuses") as caught:
        require_runnable(recipe)
    assert caught.value.remedy.startswith("set scaling.gpus_per_worker=1, or scaling.workers=1")


@pytest.mark.parametrize(
    "uri",
    [
        "http://me:hunter2@mlflow.local:5000",
        "https://hunter2@mlflow.local",
        "http://me:hunter2/hunter2@mlflow.local:5000",
        "postgresql://me:hunter2/x@db/mlflow",
        "https://mlflow.local/?api_key=hunter2",
        "postgresql://me:hunter2@db/mlflow",
        "postgresql+psycopg2://me@db/mlflow?password=hunter2",
        "mysql://db/mlflow?passwd=hunter2",
    ],
)
def test_a_secret_in_the_tracking_address_is_refused_and_not_repeated(uri: str) -> None:
    recipe = resolve("tiny", overrides=[f"tracking.uri={uri}"])
    with pytest.raises(RecipeError, match="MLFLOW_TRACKING_TOKEN") as caught:
        require_runnable(recipe)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "data.pretrain_json=http://bob:hunter2@127.0.0.1:9300/train.json",
        "data.finetune_images=https://host/pictures?token=hunter2",
        "data.captions=simplecache::https://hunter2@host/pictures",
        "data.pretrain_mix=[{path: a.json}, {path: 'https://host/b.json?X-Amz-Signature=hunter2'}]",
        "language.path=https://me:hunter2@host/model",
        "generation.input=s3://key:hunter2@bucket/rows.jsonl",
    ],
)
def test_a_secret_in_any_address_is_refused_and_not_repeated(setting: str) -> None:
    alone = ["data.pretrain_json=null"] if "_mix" in setting else []
    with pytest.raises(RecipeError, match="in the environment") as caught:
        require_runnable(resolve("tiny", overrides=[*LLAVA, *alone, setting]))
    key = setting.partition("=")[0].replace("_mix", "_mix.1.path")
    assert str(caught.value).startswith(key)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "/data/a?token=b.json", "abfs://container@account.dfs.core.windows.net/a.json", "hdfs://me@host/a.json",
        "github://organisation:repository@main/a.json", "zip://a.json::s3://bucket/a.zip",
    ],
)  # fmt: skip
def test_addresses_without_secrets(uri: str) -> None:
    require_runnable(resolve("tiny", overrides=["data.source=captions", f"data.captions={uri}"]))


def test_a_system_message_is_no_address() -> None:
    require_runnable(resolve("tiny", overrides=["conversation.system='See http://host/?token=x'"]))


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "postgresql://me@db/mlflow", "sqlite:////a/b.db", "databricks://profile"]
)
def test_a_tracking_address_without_secrets(uri: str) -> None:
    require_runnable(resolve("tiny", overrides=[f"tracking.uri={uri}"]))

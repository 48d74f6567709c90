"""What ships for others to read: launchers' configurations, and the recipes of published experiments."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from layerskip.train.recipe import Recipe, read_recipe, shipped
from layerskip.train.trainer import LayerSkipConfig

LAUNCH = Path(str(files("layerskip.train") / "launch"))


# -- accelerate


def test_accelerate_launches_fsdp2_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import StateDictType
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    line = ["--config_file", str(LAUNCH / "fsdp2.yaml"), "--num_processes", "2", "-m", "layerskip", "train"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    assert (args.use_fsdp, args.num_processes, args.mixed_precision) == (True, 2, "bf16")
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)  # what an earlier launch left
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for name in [name for name in environment if name.startswith("FSDP_")]:
        monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.state_dict_type is StateDictType.FULL_STATE_DICT  # what Trainer saves whole models with
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert not plugin.cpu_ram_efficient_loading  # an anchor's reference is loaded on every process
    assert not plugin.activation_checkpointing


def test_it_leaves_the_number_of_processes_to_the_command_line() -> None:
    line = ["--config_file", str(LAUNCH / "fsdp2.yaml"), "-m", "layerskip", "train"]
    with pytest.raises(ValueError, match="--num_processes"):
        _validate_launch_command(launch_command_parser().parse_args(line))


# -- DeepSpeed, which is not needed here: transformers fills a configuration in, accelerate asks for its stage


def filled(path: Path, args: LayerSkipConfig, model: Any) -> Any:
    """A configuration as `Trainer` hands it to DeepSpeed; without the reader's check for the package."""
    reader = HfTrainerDeepSpeedConfig.__new__(HfTrainerDeepSpeedConfig)
    reader._dtype, reader.mismatches = None, []
    # installed or not decides which class the reader extends; its methods are these
    plain = HfDeepSpeedConfig(str(path))
    for name in ("config", "_stage", "_offload"):
        setattr(reader, name, getattr(plain, name))
    if not isinstance(reader, HfDeepSpeedConfig):
        for name in ("find_config_node", "get_value", "is_true", "is_zero3"):
            setattr(reader, name, getattr(plain, name))
    reader.trainer_config_process(args)
    reader.trainer_config_finalize(args, model, 100)
    return reader


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_everything_from_the_recipe(stage: int, tmp_path: Path) -> None:
    path = LAUNCH / f"zero{stage}.json"
    args = LayerSkipConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        max_grad_norm=0.7,
        report_to="none",
    )
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    reader = filled(path, args, model)
    assert HfDeepSpeedConfig(str(path)).is_zero3() is (stage == 3)
    assert not HfDeepSpeedConfig(str(path)).is_offload()
    assert reader.config["train_batch_size"] == 32
    assert reader.config["train_micro_batch_size_per_gpu"] == 4
    assert reader.config["gradient_accumulation_steps"] == 8
    assert reader.config["gradient_clipping"] == 0.7
    assert reader.dtype() is torch.bfloat16
    assert reader.config["zero_optimization"]["reduce_bucket_size"] == 16 * 16
    assert '"auto"' not in json.dumps(reader.config)
    # else `save_model` leaves DeepSpeed's own files instead of a model
    assert stage == 2 or reader.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


# -- published experiments: the paper's table. None: the paper does not say, or (rotation) it has none

ROT, GRAD = "rotational", "gradual"
PUBLISHED: dict[str, dict[str, Any]] = {
    name: dict(zip(("layers", "p_max", "scale", "curriculum", "period", "time", "rate", "steps"), row, strict=True))
    for name, row in {
        "llama2-7b-continual": (32, 0.1, 0.2, ROT, 8, "constant", 3e-5, 50_000),
        "llama2-13b-continual": (40, 0.1, 0.1, ROT, 39, "constant", 2e-5, 50_000),
        "llama3-8b-continual": (32, 0.1, 0.1, ROT, 8, "constant", None, None),
        "llama3.2-1b-continual": (16, 0.1, 0.1, ROT, 8, "constant", None, None),
        "llama-1.5b-scratch": (24, 0.1, 0.2, ROT, 23, "exponential", 8e-4, 50_000),
        "llama2-7b-scratch": (32, 0.2, 0.2, ROT, 31, "exponential", 8e-4, 50_000),
        "llama1-7b-code": (32, 0.1, 1.0, ROT, 16, "constant", 1e-4, 10_000),
        "llama-1.5b-topv2": (24, 0.2, 1.0, GRAD, None, "constant", 1e-4, 5_800),
    }.items()
}


def published(name: str, **overrides: str) -> Recipe:
    given = {} if name == "llama-1.5b-topv2" else {"data": "x.txt"}
    return read_recipe(name, overrides={**given, **overrides})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_is_the_papers(name: str) -> None:
    said, recipe = PUBLISHED[name], published(name)
    ours = recipe.training
    if "scratch" in name:
        assert recipe.architecture is not None
        assert recipe.architecture["num_hidden_layers"] == said["layers"]
    else:
        assert recipe.init_from
        assert recipe.architecture is None
    assert ours["dropout"] == said["p_max"]
    assert ours["dropout_depth"] == "exponential"
    assert ours["dropout_time"] == said["time"]
    assert ours["exit_scale"] == said["scale"]
    assert ours["curriculum"] == said["curriculum"]
    assert ours.get("rotation") == said["period"]
    assert said["rate"] is None or ours["learning_rate"] == said["rate"]
    assert said["steps"] is None or ours["max_steps"] == said["steps"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_takes_its_settings(name: str, tmp_path: Path) -> None:
    args = LayerSkipConfig(
        **{"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"} | published(name).training
    )
    assert args.max_steps > args.warmup_steps > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_paper_leaves_open_is_marked(name: str) -> None:
    text = shipped()[name].read_text(encoding="utf-8")
    assert "Elhoushi et al., ACL 2024" in text
    open_keys = ["warmup_steps", "lr_scheduler_type", "max_length", "adam_beta2", "weight_decay", "bf16"]
    if PUBLISHED[name]["rate"] is None:
        open_keys += ["learning_rate", "max_steps"]
    lines = {line.split(":")[0]: line for line in text.splitlines() if line[:1].isalpha()}
    assert [key for key in open_keys if "# choice" not in lines[key]] == []


def test_topv2_has_the_papers_batch() -> None:
    training = published("llama-1.5b-topv2").training
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (8, 32)


def test_a_recipe_can_become_its_plain_twin() -> None:
    plain = published("llama-1.5b-scratch", dropout="0", curriculum="last", learning_rate="4.0e-4").training
    assert (plain["dropout"], plain["curriculum"], plain["learning_rate"]) == (0.0, "last", 4e-4)


@pytest.mark.parametrize(("name", "billions"), [("llama-1.5b-scratch", 1.5), ("llama2-7b-scratch", 6.7)])
def test_a_model_from_scratch_has_the_size_it_says(name: str, billions: float) -> None:
    architecture = dict(published(name).architecture or {})
    assert architecture.pop("model_type") == "llama"
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **architecture))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e9, 1) == billions


def test_the_general_model_is_deep_and_large_enough() -> None:
    recipe = read_recipe("general-text")
    architecture = dict(recipe.architecture or {})
    assert architecture.pop("model_type") == "llama"
    assert architecture["num_hidden_layers"] >= 12
    assert recipe.training["rotation"] == architecture["num_hidden_layers"] - 1
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=recipe.vocab_size, **architecture))
    assert sum(weight.numel() for weight in model.parameters()) > 20e6


def test_the_general_models_code_is_the_library_and_nothing_installed_beside_it(tmp_path: Path) -> None:
    """Its patterns, over a folder laid out as a standard library is."""
    from layerskip.train.data import Source, find_files

    code = read_recipe("general-text").data[2]
    wanted = {"abc.py", "json/__init__.py", "email/mime/text.py", "sqlite3/dbapi2.py", "tomllib/_parser.py"}
    for name in wanted | {"site-packages/torch/nn.py", "test/test_abc.py", "json/__pycache__/x.pyc"}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    patterns = tuple(pattern.replace("${stdlib}", str(tmp_path)) for pattern in code.files)
    found = find_files(Source(files=patterns, format=code.format))
    assert {path.relative_to(tmp_path).as_posix() for path in found} == wanted
    assert len(found) == len(wanted)


def test_the_general_models_novels_are_parted() -> None:
    novels, proposals, _ = read_recipe("general-text").data
    text = "\ufeffOne\n\n\x0c\nits second part\n\x0c\n\ufeffTwo\n\n\x0c\n"
    assert [part.strip() for part in text.split(str(novels.separator))] == ["\ufeffOne\n\n\x0c\nits second part", "Two"]
    assert proposals.separator == "\x0c"

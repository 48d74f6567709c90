"""What every test stands on: one thread, no network, a checkpoint to read when it is there."""

import copy
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports torch. One thread in each process: the workers share the cores, and tiny models are
# slower on more. Child processes inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# A loaded machine must not fail a test for its time, and a failure must come back on the next run.
settings.register_profile("layerskip", deadline=None, derandomize=True)
settings.load_profile("layerskip")

ROOT = Path(__file__).resolve().parents[1]


LONG = {
    "test_run.py",
    "test_docs.py",
    "test_distributed.py",
    "test_laws.py",
    "test_output_law.py",
    "test_compiled.py",
    "test_exactness.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: a worker takes a file whole, and would be left with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for garbage again and again took a fifteenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A test that asks for threads, as `--threads 2` does, leaves the next one its own: sums round by their number."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth is measured over a buffer as for a machine with a small cache: a large one takes seconds."""
    from layerskip.evaluate import bandwidth

    monkeypatch.setattr(bandwidth, "buffer_size", lambda _: 16 << 20)


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of a real 260K-parameter Llama checkpoint; skips where it is not beside the project."""
    folder = ROOT.parent / "shared" / "data" / "stories260k"
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs the stories260k checkpoint, and there is no config.json in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 4-layer Llama whose exits often agree with its last layer, and a byte-level tokenizer.

    Works without any data beside the project. The tokenizer has BOS, EOS and a chat template.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran to the cat"] * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fast.save_pretrained(folder)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.15
            layer.mlp.down_proj.weight *= 0.15
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """Skips where bubblewrap is missing or may not make namespaces; elsewhere the sandbox has to work."""
    command = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "true"]
    if os.geteuid() == 0:
        command = ["unshare", "--mount", "setpriv", "--reuid", "60706", "--regid", "60706", "--clear-groups", *command]
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"needs bubblewrap: {error}")
    if done.returncode:
        pytest.skip(f"needs namespaces: {done.stderr.strip()}")


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of lm-evaluation-harness over local files: `choice` (multiple choice), `writing` (texts are
    generated), `reading` (whole texts, one of them long) and the group `both` of the first two."""
    import json
    import random

    folder = tmp_path_factory.mktemp("tasks")
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "the", "cat"]
    draw = random.Random(0)

    def some(least: int, most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))

    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [
            {"question": some(2, 9), "choices": [some(3, 9) for _ in range(4)], "answer": draw.randrange(4)}
            for _ in range(40)
        ],
        "writing": [{"question": some(2, 9), "answer": ""} for _ in range(8)],
        "reading": [{"text": some(5, 30)} for _ in range(3)] + [{"text": some(400, 400)}],
    }
    kinds = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\nfewshot_split: test\nmetric_list: [{metric: acc}, {metric: acc_norm}]",
        "writing": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "num_fewshot: 0\ngeneration_kwargs: {until: ['g'], max_gen_toks: 12, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]",
        "reading": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]",
    }
    for name, kind in kinds.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (folder / f"{name}.jsonl").write_text(lines)
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs:\n"
            f"  data_files: {{test: {folder}/{name}.jsonl}}\n  cache_dir: {folder}/cache\n{kind}\n"
        )
    (folder / "both.yaml").write_text("group: both\ntask: [choice, writing]\n")
    return folder


# Small enough to run in a moment, odd enough to notice a wrong axis. What a text of 40 tokens must pass: the context
# that yarn and llama3 stretch from (12), and the sliding windows.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 12, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
    "rope_theta": 1e4,
}
MIXED = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "llama-tied-biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen2-yarn": {"rope_parameters": YARN},
    "qwen2-mixed": {"use_sliding_window": True, "sliding_window": 6, "layer_types": MIXED},
    "qwen3": {"head_dim": 12},
}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every architecture by name, for `tiny` and what is built on it."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """A random transformers model: `tiny("mistral", double=True, agree=0.2, max_position_embeddings=48)`.

    `agree` scales what layers 2 and above add, so that early exits predict more (towards 0) or less (towards 1) like
    the whole model. Norms and biases are random too; logits are moderate. The same arguments give the same numbers.
    """
    import torch
    import transformers

    kinds = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

    def build(name: str, *, seed: int = 0, double: bool = False, agree: float = 1.0, **changes: Any) -> Any:
        kind = kinds[name.partition("-")[0]]
        config = getattr(transformers, f"{kind}Config")(**copy.deepcopy({**SIZES, **ARCHITECTURES[name], **changes}))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.3)
            for layer in model.model.layers[2:]:
                for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    for parameter in projection.parameters():
                        parameter.mul_(agree)
        model.requires_grad_(False)
        return model.double() if double else model

    return build


@pytest.fixture(scope="session")
def decoder_of() -> Callable[[Any], Any]:
    """Our decoder over the weights of a transformers model."""
    from layerskip.model.names import decoder_from_tensors
    from layerskip.model.shape import Shape

    return lambda model: decoder_from_tensors(Shape.from_config(model.config.to_dict()), dict(model.state_dict()))

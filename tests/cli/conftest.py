"""A tiny checkpoint with a chat template, and the command line called in this process."""

import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from layerskip.cli import app
from layerskip.decode import batch
from layerskip.model.decoder import Decoder
from layerskip.model.native import build

TEXT = [
    "Once upon a time there was a little girl who loved to play outside with her red ball.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps in the sun all day.",
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Copy = Callable[..., Path]
Run = Callable[..., Result]


def tokenizer(text: list[str], *, vocab: int = 320, **settings: Any) -> PreTrainedTokenizerFast:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, **settings)


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Builds them where they are not there yet: the first command on a machine would say that it does."""
    with suppress(build.Unavailable):
        build.library()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 3-layer Llama with a byte-level tokenizer: BOS, EOS, a chat template, a context of 256."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    for name, parameter in model.named_parameters():  # large enough that layers disagree, and not about everything
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer(TEXT, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Copy:
    """A copy of the tiny checkpoint, with settings of its config.json changed."""

    def make(name: str = "copy", **config: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint, folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **config}))
        return folder

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, small_cache: None) -> Run:
    """Calls `layerskip` in this process; standard input is a pipe, as are the outputs."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: object, input: str | bytes = b"") -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=input)

    return call


@pytest.fixture
def lucky() -> Callable[[Path], Path]:
    """Rewrites a checkpoint so that its layers above the first add nothing: exit 1 always agrees."""

    def rewrite(folder: Path) -> Path:
        weights = load_file(folder / "model.safetensors")
        for name, tensor in weights.items():
            if "layers.0." not in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weights[name] = torch.zeros_like(tensor)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return rewrite


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that shows work: a layer takes a second whatever its positions, the head 4, a narrow one as its rows, one
    of 8 bits 1. (A draft of the kernels is a single call, which shows its passes at once.)"""
    now, calls = [0.0], itertools.count()
    layers, head, drafting = Decoder.run, Decoder.predict, Decoder.draft

    def run(self: Decoder, hidden: Any, at: Any, cache: Any, first: int = 0, last: Any = None, **how: Any) -> Any:
        now[0] += (self.shape.layers if last is None else last) - first
        return layers(self, hidden, at, cache, first, last, **how)

    def predict(self: Decoder, hidden: Any, to: Any) -> Any:
        out = head(self, hidden, to)
        now[0] += (1 if getattr(to, "bits", None) else 4) * out.shape[-1] / self.shape.vocab
        return out

    def draft(
        self: Decoder, tokens: Any, at: Any, cache: Any, exit: int, count: int, *, head: Any = None, **how: Any
    ) -> Any:
        out = drafting(self, tokens, at, cache, exit, count, head=head, **how)
        if self.layout == "native":
            drafted = out[0].shape[1]
            now[0] += (drafted + 1) * exit + drafted * (1 if getattr(head, "bits", None) else 4)
        return out

    monkeypatch.setattr(Decoder, "run", run)
    monkeypatch.setattr(Decoder, "predict", predict)
    monkeypatch.setattr(Decoder, "draft", draft)
    # no two rounds take exactly as long, as with a real clock
    monkeypatch.setattr(batch, "time", SimpleNamespace(perf_counter=lambda: now[0] + 1e-12 * next(calls) ** 2))

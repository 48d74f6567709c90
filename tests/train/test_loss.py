"""The early-exit loss against the plain formula, computed without chunks, hooks or recomputation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from layerskip.errors import RequestError
from layerskip.train.exits import EarlyExits
from layerskip.train.loss import Teachers
from layerskip.train.parts import parts

WEIGHTS = {2: 0.25, 3: 0.25, 4: 0.5}


def batch(rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[-1, 6:] = -100
    return {"input_ids": ids, "labels": labels}


def states_of(model: Any, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every layer's output, and the body's."""
    found, seen = parts(model), []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        for layer in found.layers
    ]
    final = model.base_model(input_ids=ids, use_cache=False)[0]
    for hook in hooks:
        hook.remove()
    return seen, final


def by_hand(model: Any, inputs: dict[str, Tensor], *, distillation: float = 0.0) -> Tensor:
    found = parts(model)
    states, final = states_of(model, inputs["input_ids"])
    targets = inputs["labels"][:, 1:]
    learnt = targets != -100
    total = torch.zeros((), dtype=final.dtype)
    last = found.head(final)[:, :-1][learnt].float().log_softmax(-1)
    for exit, weight in WEIGHTS.items():
        hidden = final if exit == 4 else states[exit - 1]
        if exit != 4 and found.norm is not None:
            hidden = found.norm(hidden)
        table = found.head(hidden)[:, :-1][learnt].float().log_softmax(-1)
        loss = F.nll_loss(table, targets[learnt])
        if exit != 4 and distillation:
            soft = (last.detach().exp() * (last.detach() - table)).sum(-1).mean()
            loss = (1 - distillation) * loss + distillation * soft
        total = total + weight * loss
    return total


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> None:
    for name, gradient in one.items():
        if gradient is None or other[name] is None:
            assert gradient is other[name], name
        else:
            torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("chunk", [None, 1, 4, 1000])
@pytest.mark.parametrize("distillation", [0.0, 0.7])
def test_the_loss_and_its_gradients_are_the_formula_in_every_family(
    causal: Callable[..., Any], family: str, chunk: int | None, distillation: float
) -> None:
    model, inputs = causal(family), batch()
    expected = by_hand(model, inputs, distillation=distillation)
    wanted = gradients(model, expected)
    with EarlyExits(model, chunk=chunk, teachers=Teachers(distillation=distillation)) as exits:
        exits.begin(WEIGHTS)
        loss = model(**inputs).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert_close(gradients(model, loss), wanted)
        assert sorted(exits.by_exit) == [2, 3, 4]


def test_one_exit_and_one_chunk_is_the_plain_loss_bit_for_bit(causal: Callable[..., Any], family: str) -> None:
    model, inputs = causal(family).float(), batch()
    plain = model(**inputs).loss
    wanted = gradients(model, plain)
    with EarlyExits(model) as exits:
        exits.begin({4: 1.0})
        loss = model(**inputs).loss
        assert torch.equal(loss, plain)
        ours = gradients(model, loss)
        for name, gradient in wanted.items():
            assert (gradient is None and ours[name] is None) or torch.equal(gradient, ours[name]), name  # type: ignore[arg-type]


def test_every_exit_with_weight_and_all_of_the_last_layer_get_gradients(
    causal: Callable[..., Any], family: str
) -> None:
    model = causal(family)
    with EarlyExits(model) as exits:
        exits.begin(WEIGHTS)
        found = gradients(model, model(**batch()).loss)
        last = {id(p) for p in parts(model).layers[-1].parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in last:
                assert found[name] is not None
                assert found[name].abs().sum() > 0, name  # type: ignore[union-attr]
        # exit 2 alone teaches layers 1 and 2 and nothing above
        exits.begin({2: 1.0, 4: 0.0})
        found = gradients(model, model(**batch()).loss)
        for layer, module in enumerate(parts(model).layers):
            sums = [float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None]
            assert (sum(sums) > 0) == (layer < 2)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_mean_does_not_depend_on_accumulation_or_padding(causal: Callable[..., Any], chunk: int | None) -> None:
    model, inputs = causal("llama"), batch(rows=4)
    items = (inputs["labels"][:, 1:] != -100).sum()
    with EarlyExits(model, chunk=chunk) as exits:
        exits.begin(WEIGHTS)
        whole = gradients(model, model(**inputs, num_items_in_batch=items).loss)
        model.zero_grad(set_to_none=True)
        for row in range(4):
            part = {name: value[row : row + 1] for name, value in inputs.items()}
            part["labels"] = F.pad(part["labels"], (0, 3), value=-100)
            part["input_ids"] = F.pad(part["input_ids"], (0, 3))
            model(**part, num_items_in_batch=items).loss.backward()
        assert_close({name: p.grad for name, p in model.named_parameters()}, whole)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_an_anchor_pulls_the_last_layer_to_the_references(causal: Callable[..., Any], seeds: list[int]) -> None:
    model, references, inputs = causal("llama"), [causal("llama", seed=seed) for seed in seeds], batch()
    with EarlyExits(model, teachers=Teachers(anchor=2.0), references=references, chunk=5) as exits:
        exits.begin(WEIGHTS)
        loss = model(**inputs).loss
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(parameter.grad is None for reference in references for parameter in reference.parameters())
    model.zero_grad()
    learnt = inputs["labels"][:, 1:] != -100
    ours, *theirs = (m(input_ids=inputs["input_ids"]).logits[:, :-1][learnt] for m in (model, *references))
    p = torch.stack([each.float().softmax(-1) for each in theirs]).mean(0).log()
    q = ours.float().log_softmax(-1)
    anchor = 2.0 * (p.exp() * (p - q)).sum(-1).mean()
    expected = by_hand(model, inputs) + WEIGHTS[4] * anchor
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_removed_it_leaves_no_trace(causal: Callable[..., Any], family: str) -> None:
    model = causal(family)
    before = dict(model.__dict__)
    keys = list(model.state_dict())
    with EarlyExits(model) as exits:
        exits.begin(WEIGHTS)
        model(**batch())
        assert list(model.state_dict()) == keys
    assert model.__dict__.keys() == before.keys()
    assert not any(layer._forward_hooks for layer in parts(model).layers)
    assert not torch.equal(model(**batch()).loss, torch.zeros(()))


def test_evaluation_is_the_models_own(causal: Callable[..., Any]) -> None:
    model, inputs = causal("llama").eval(), batch()
    plain = model(**inputs)
    with EarlyExits(model) as exits:
        exits.begin(WEIGHTS)
        assert torch.equal(model(**inputs).logits, plain.logits)
        model.train()
        assert model(input_ids=inputs["input_ids"]).logits is not None


def test_measuring_gives_loss_accuracy_and_agreement_of_every_exit(causal: Callable[..., Any], family: str) -> None:
    model, inputs = causal(family).eval(), batch()
    found = parts(model)
    with torch.no_grad():
        states, final = states_of(model, inputs["input_ids"])
    targets = inputs["labels"][:, 1:]
    learnt = targets != -100
    best = found.head(final)[:, :-1][learnt].argmax(-1)
    with EarlyExits(model) as exits:
        measured = exits.measure(inputs)
    for exit in range(1, 5):
        hidden = final if exit == 4 else states[exit - 1]
        if exit != 4 and found.norm is not None:
            hidden = found.norm(hidden)
        table = found.head(hidden)[:, :-1][learnt].float().log_softmax(-1)
        assert measured[exit].loss.item() == pytest.approx(
            F.nll_loss(table, targets[learnt], reduction="sum").item(), rel=1e-4
        )
        assert int(measured[exit].correct) == int((table.argmax(-1) == targets[learnt]).sum())
        assert int(measured[exit].agreeing) == int((table.argmax(-1) == best).sum())
        assert int(measured[exit].tokens) == int(learnt.sum())


def test_what_cannot_be_is_refused(causal: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match=r"distillation 1.5 is not possible; use 0\.\.1"):
        Teachers(distillation=1.5)
    with pytest.raises(RequestError, match="anchor -1"):
        Teachers(anchor=-1)
    with pytest.raises(RequestError, match="an anchor needs a reference model"):
        EarlyExits(causal("llama"), teachers=Teachers(anchor=1.0))
    with pytest.raises(RequestError, match="the reference has 32 tokens and the model 61"):
        EarlyExits(causal("llama"), teachers=Teachers(anchor=1.0), references=[causal("llama", vocab_size=32)])
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(causal("llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(RequestError, match=r"the head is wrapped by an adapter \(LoRA\): all exits share one head"):
        EarlyExits(adapted)
    tied = {"target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(RequestError, match=r"the embedding is wrapped by an adapter \(LoRA\) and is the head as well"):
        EarlyExits(get_peft_model(causal("llama", tie_word_embeddings=True), LoraConfig(**tied)))
    EarlyExits(get_peft_model(causal("llama", tie_word_embeddings=False), LoraConfig(**tied)))
    untied = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    EarlyExits(get_peft_model(causal("llama", tie_word_embeddings=True), LoraConfig(**untied)))
    routed = causal("llama")
    routed.config.output_router_logits = True
    with pytest.raises(RequestError, match="output_router_logits adds a loss of the router's"):
        EarlyExits(routed)

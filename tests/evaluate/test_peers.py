"""transformers beside us: the same tokens, counted as they are emitted, and what it cannot do said in a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import layerskip
from layerskip import LLM, EarlyExit
from layerskip.errors import CheckpointError, RequestError
from layerskip.evaluate.bench import Ours, cells
from layerskip.evaluate.contest import PLAIN, Contest, Settings
from layerskip.evaluate.peers import Clock, Peer, Transformers, check_peers, early_exit, plain
from layerskip.evaluate.prompts import encode_prompts
from layerskip.evaluate.ways import Way

PROMPTS = ("the cat sat on the mat and the dog ran", "the", "the dog ran to the cat", "a")


@pytest.fixture(scope="module", params=["float64", "float32"])
def llm(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> LLM:
    return layerskip.load(tiny_checkpoint, dtype=request.param, device="cpu")


@pytest.fixture(scope="module")
def engine(llm: LLM, tiny_checkpoint: Path) -> Transformers:
    return Transformers(tiny_checkpoint, llm)


def ids(llm: LLM) -> list[list[int]]:
    return encode_prompts(llm, PROMPTS)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ends", [False, True])
def test_its_tokens_are_plain_ones(llm: LLM, engine: Transformers, batch: int, ends: bool) -> None:
    settings = Settings(batch, 20, ignore_eos=not ends)
    long = Ours(llm, Way(PLAIN)).run(ids(llm), Settings(batch, 20, ignore_eos=True)).tokens
    before = llm.eos
    llm.eos = engine.eos[:] = [long[0][4], long[2][9]]  # type: ignore[assignment]
    try:
        wanted = Ours(llm, Way(PLAIN)).run(ids(llm), settings).tokens
        assert ([len(tokens) for tokens in wanted] == [20] * 4) != ends
        peers: list[Peer] = [plain(engine)] + ([early_exit(engine, exit=2, draft_tokens=3)] if batch == 1 else [])
        for peer in peers:
            assert peer.limitation(ids(llm), settings) is None
            found = peer.run(ids(llm), settings)
            assert found.tokens == wanted
            emitted = [0] * 4
            for tick in found.ticks:
                assert 0 <= tick.began < tick.ended <= found.total
                for index, tokens in tick.gained.items():
                    assert (index in tick.new) == (emitted[index] == 0)
                    emitted[index] += tokens
            assert emitted == [len(tokens) for tokens in wanted]
    finally:
        llm.eos, engine.eos[:] = before, list(before)


def test_an_early_exit_drafts_as_many_tokens_as_ours(llm: LLM, engine: Transformers) -> None:
    peer = early_exit(engine, exit=3, draft_tokens=4)
    assert (peer.who.name, peer.who.exit, peer.who.draft_tokens) == ("transformers-early-exit:3 K=4", 3, 4)
    passes: list[tuple[int, int]] = []
    model = engine.model.model
    hook = model.register_forward_hook(
        lambda module, args, kwargs, out: passes.append(
            (module.config.num_hidden_layers, out.last_hidden_state.shape[1])
        ),
        with_kwargs=True,
    )
    try:
        [text] = peer.run(ids(llm)[:1], Settings(1, 24, ignore_eos=True)).tokens
    finally:
        hook.remove()
    assert len(text) == 24
    verified = [width for layers, width in passes if layers == 4][1:-1]  # the first holds the prompt, the last is cut
    assert set(verified) == {5}  # K + 1 in every round, whatever was accepted before
    drafted = sum(layers == 3 for layers, _ in passes)
    assert drafted >= 4 * len(verified)


def test_an_interrupted_early_exit_leaves_the_model_whole(
    llm: LLM, engine: Transformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, settings = early_exit(engine, exit=1, draft_tokens=2), Settings(1, 12, ignore_eos=True)
    wanted = peer.run(ids(llm), settings).tokens
    forward = type(engine.model.model).forward

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.num_hidden_layers == 1:  # while it drafts
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.model.model), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            peer.run(ids(llm), settings)
    assert engine.model.config.num_hidden_layers == 4
    assert engine.model.generation_config.num_assistant_tokens is None
    assert peer.run(ids(llm), settings).tokens == wanted


def test_peers_and_ours_in_one_contest(llm: LLM, engine: Transformers) -> None:
    runners: Any = [
        Ours(llm, Way(PLAIN)),
        Ours(llm, Way("early-exit:2 K=3", EarlyExit(2, tokens=3))),
        plain(engine),
        early_exit(engine, exit=2, draft_tokens=3),
    ]
    contest = Contest(runners, ids(llm), settings=Settings(1, 10, ignore_eos=True), device=llm.decoder.device)
    contest.warm_up()
    found = cells(contest.who, [contest.repeat(0), contest.repeat(1)], batch=1)
    assert [each.tokens for each in found] == [40] * 4
    for each in found[2:]:
        record = json.loads(json.dumps(each.record(), allow_nan=False))
        assert (record["peer"], record["identical"], record["mode"]) == (True, True, "exact")
        assert (record["acceptance"], record["seconds"], record["weights_read_per_second"]) == (None, None, None)
        assert record["speedup"]["decode"]["median"] > 0


def test_what_it_cannot_do_is_a_line(llm: LLM, engine: Transformers) -> None:
    prompts = ids(llm)
    longest = max(map(len, prompts))
    drafting = early_exit(engine, exit=2, draft_tokens=3)
    assert drafting.limitation(prompts, Settings(2, 8)) == "transformers drafts for one row only, not for a batch of 2"
    stopped = plain(engine).limitation(prompts, Settings(1, 8, stop=("cat",)))
    assert stopped == "generate stops at strings elsewhere, so tokens would not be those of the same text"
    assert plain(engine).limitation(prompts, Settings(1, 256 - longest)) is None
    assert plain(engine).limitation(prompts, Settings(1, 257 - longest)) == (
        f"generate goes on past the context of 256 tokens, and the longest prompt has {longest}; "
        f"use --max-tokens {256 - longest} or less"
    )
    with pytest.raises(RequestError, match=r"^transformers-early-exit:2 K=3 cannot run: transformers drafts for one"):
        drafting.check(prompts, Settings(2, 8))
    with pytest.raises(RequestError, match=r"^unknown peer 'transformer'; use transformers or .*did you mean 'transf"):
        check_peers(["transformer"])


def test_a_folder_it_cannot_load(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(CheckpointError, match=r"^transformers cannot load .*"):
        Transformers(tmp_path, llm)


def test_what_pads_a_finished_row_is_no_token() -> None:
    now = iter(float(i) for i in range(99))
    clock = Clock(lambda: next(now))  # 0 where it begins
    clock.begin(2, [9])  # 1
    clock.put(torch.tensor([[0, 5], [4, 5]]))  # the prompts
    for step in ([3, 9], [3, 0], [9, 0]):  # 2, 3, 4
        clock.put(torch.tensor(step))
    assert clock.tokens == [[3, 3, 9], [9]]
    clock.begin(1, [9])  # 5
    clock.put(torch.tensor([[1, 2, 3]]))
    clock.put(torch.tensor([[7, 9, 7]]))  # 6: a draft that ran past the end
    assert clock.tokens == [[7, 9]]
    assert [(tick.began, tick.ended, tick.gained) for tick in clock.ticks] == [
        (1.0, 2.0, {0: 1, 1: 1}),
        (2.0, 3.0, {0: 1}),
        (3.0, 4.0, {0: 1}),
        (5.0, 6.0, {2: 2}),
    ]
    assert [(set(tick.new), set(tick.finished)) for tick in clock.ticks] == [
        ({0, 1}, {1}),
        (set(), set()),
        (set(), {0}),
        ({2}, {2}),
    ]

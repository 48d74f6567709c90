"""Which exits learn when, and how much they count, against the paper's formulas worked out by hand."""

from fractions import Fraction
from itertools import pairwise

import pytest

from layerskip.errors import RequestError
from layerskip.train.curriculum import exit_weights, exits_at


@pytest.mark.parametrize(
    ("exits", "scale", "expected"),
    [
        # the paper's e(l) for L = 8: 0, 1, 3, 6, 10, 15, 21 times e_scale, then 7 + 21 e_scale
        ([1, 5, 8], "1", ["0", "10/38", "28/38"]),
        ([1, 5, 8], "0.2", ["0", "2/13.2", "11.2/13.2"]),
        ([8], "0.2", ["1"]),
        ([2, 8], "1", ["1/29", "28/29"]),
        ([1, 2, 3, 4, 5, 6, 7, 8], "1", ["0", "1/84", "3/84", "6/84", "10/84", "15/84", "21/84", "28/84"]),
        ([4, 8], "0", ["0", "1"]),
    ],
)
def test_weights_are_those_of_the_paper(exits: list[int], scale: str, expected: list[str]) -> None:
    def number(text: str) -> float:
        top, _, bottom = text.partition("/")
        return float(Fraction(top) / Fraction(bottom or "1"))

    weights = exit_weights(exits, layers=8, scale=float(scale))
    assert weights == pytest.approx([number(text) for text in expected], abs=1e-12)
    assert sum(weights) == pytest.approx(1.0)


@pytest.mark.parametrize("layers", [4, 12, 24])
@pytest.mark.parametrize("period", [1, 3, 4])
def test_rotation_enables_every_layer_once_a_period_and_the_last_always(layers: int, period: int) -> None:
    for start in (0, 7):
        sets = [
            exits_at("rotational", layers=layers, step=start + t, total_steps=100, period=period) for t in range(period)
        ]
        assert all(layers in exits for exits in sets)
        others = [exit for exits in sets for exit in exits if exit != layers]
        assert sorted(others) == list(range(1, layers))


@pytest.mark.parametrize("layers", [2, 8, 12, 24])
@pytest.mark.parametrize("total", [48, 50, 1000])
def test_gradual_goes_down_from_the_last_layer_and_has_all_on_at_half(layers: int, total: int) -> None:
    sets = [exits_at("gradual", layers=layers, step=t, total_steps=total) for t in range(total)]
    assert sets[0] == (layers,)
    assert all(exits == tuple(range(exits[0], layers + 1)) for exits in sets)
    assert all(len(after) >= len(before) for before, after in pairwise(sets))
    assert sets[total // 2] == tuple(range(1, layers + 1))
    # one more every T / 2L steps
    for more in range(layers):
        first = next(t for t, exits in enumerate(sets) if len(exits) > more)
        assert first == -(-more * total // (2 * layers))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RequestError, match=r"unknown curriculum 'rotatonal'; .* did you mean 'rotational'"):
        exits_at("rotatonal", layers=8, step=0, total_steps=1)
    with pytest.raises(RequestError, match=r"rotational period 9 does not fit 8 layers; use 1\.\.8"):
        exits_at("rotational", layers=8, step=0, total_steps=1, period=9)
    with pytest.raises(RequestError, match=r"exit 9 is not inside this 8-layer model; use 1\.\.8"):
        exit_weights([9], layers=8, scale=1.0)
    with pytest.raises(RequestError, match="e_scale -1"):
        exit_weights([8], layers=8, scale=-1)
    with pytest.raises(RequestError, match="all weigh nothing"):
        exit_weights([1], layers=8, scale=1.0)

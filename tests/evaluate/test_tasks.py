"""Tasks: what is read, what is refused, and how texts are scored."""

from pathlib import Path

import pytest

from layerskip.errors import RequestError
from layerskip.evaluate import Item, Task, find_task, topv2
from layerskip.evaluate.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
HEADER = "domain\tutterance\tsemantic_parse\n"
ALARM = "alarm\tset an alarm\t[IN:CREATE_ALARM set an alarm ]\n"
TIMER = "timer\tstart  a timer \t[IN:CREATE_TIMER start  [SL:METHOD_TIMER a timer ] ]\r\n"
RAIN = "weather\twill it rain\t[IN:GET_WEATHER will it [SL:WEATHER_ATTRIBUTE rain ] ]\n"


def write(path: Path, *lines: str) -> Path:
    path.write_text(HEADER + "".join(lines), newline="")
    return path


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    write(tmp_path / "b_eval.tsv", TIMER, ALARM)
    write(tmp_path / "a_eval.tsv", RAIN.rstrip("\n"))
    one = write(tmp_path / "[c].tsv", ALARM, ALARM)
    write(tmp_path / "a_train.tsv", ALARM)
    task = topv2(tmp_path)
    assert (task.name, task.max_tokens, task.stop) == ("topv2", 256, ())
    assert task.items == (
        Item("will it rain", "[IN:GET_WEATHER will it [SL:WEATHER_ATTRIBUTE rain ] ]"),
        Item("start  a timer ", "[IN:CREATE_TIMER start [SL:METHOD_TIMER a timer ] ]"),
        Item("set an alarm", "[IN:CREATE_ALARM set an alarm ]"),
    )
    assert [item.prompt for item in topv2(one).items] == ["set an alarm"] * 2
    assert topv2(f"{tmp_path}/*_eval.tsv").items == task.items
    assert topv2(str(tmp_path / "b*"), max_tokens=9).items == task.items[1:]


def test_pairs_that_were_trained_on_are_told_apart(tmp_path: Path) -> None:
    write(tmp_path / "x_eval.tsv", ALARM, TIMER, RAIN, ALARM)
    other = "alarm\twill it rain\t[IN:CREATE_ALARM will it rain ]\n"  # the utterance alone is not the pair
    write(tmp_path / "x_train.tsv", ALARM, other)
    write(tmp_path / "y_train.tsv", TIMER.replace("start  [", "start ["))
    assert [item.groups for item in topv2(tmp_path, seen=tmp_path).items] == [(), (), ("unseen",), ()]
    seen = topv2(tmp_path, seen=tmp_path / "y_train.tsv")
    assert [item.groups for item in seen.items] == [("unseen",), (), ("unseen",), ("unseen",)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"a\tb", "2 columns instead of 3; part domain, utterance, semantic_parse by tabs"),
        (b"a\tb\t[IN:B b ]\tc", "4 columns instead of 3"),
        (b"", "1 columns instead of 3"),
        (b"a\t \t[IN:B b ]", "the utterance is empty; leave the line out"),
        (b"a\tb\t[IN:B b", "1 bracket(s) are never closed, the last one [IN:B"),
        (b"a\t\xffb\t[IN:B b ]", "byte 0xff is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "x_eval.tsv"
    path.write_bytes(HEADER.encode() + ALARM.encode() + line + b"\n" + RAIN.encode())
    for read in (lambda: topv2(path), lambda: topv2(write(tmp_path / "fine.tsv", ALARM), seen=path)):
        with pytest.raises(RequestError) as raised:
            read()
        assert str(raised.value).startswith(f"{path}:3 is malformed: {why}")


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"no \\*_eval.tsv in {tmp_path}; give a file, a folder with"):
        topv2(tmp_path)
    with pytest.raises(RequestError, match=r"no file matches .*none\*.tsv; give a file"):
        topv2(tmp_path / "none*.tsv")
    (tmp_path / "x_eval.tsv").write_text("a\tb\n")
    with pytest.raises(RequestError, match=r"x_eval.tsv:1 is not the header of a TOPv2 table; its columns have to be"):
        topv2(tmp_path)
    write(tmp_path / "x_eval.tsv")
    with pytest.raises(RequestError, match="holds no utterances"):
        topv2(tmp_path)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (" [IN:A  x [SL:B y ] ]\n", (1, 1, 1)),
        ("[IN:A y [SL:B x z ] ]", (0, 1, 1)),
        ("[IN:A x y ]", (0, 0, 1)),
        ("[IN:A x [SL:B y ]", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_frames_are_scored_whole_by_structure_and_by_form(
    tmp_path: Path, text: str, scores: tuple[int, int, int]
) -> None:
    task = topv2(write(tmp_path / "x_eval.tsv", "a\tx y\t[IN:A x [SL:B y ] ]\n"))
    found = task.scorer(text, task.items[0].answer)
    assert found == dict(zip(("exact_match", "template_match", "well_formed"), scores, strict=True))


def test_a_limit_spreads_over_all_items() -> None:
    task = Task("count", tuple(Item(str(i), "") for i in range(10)), lambda text, answer: {}, 1)
    assert [item.prompt for item in task.limited(4).items] == ["0", "2", "5", "7"]
    assert task.limited(10) == task.limited(99) == task
    for wrong in (0, -1, 1.5):
        with pytest.raises(RequestError, match=rf"limit {wrong} is not possible; use"):
            task.limited(wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="task count has no items"):
        Task("count", (), lambda text, answer: {}, 1)


def test_tasks_are_found_by_name() -> None:
    assert find_task("topv2") is topv2
    assert all(find_task(name) is maker for name, maker in TASKS.items())
    with pytest.raises(RequestError, match=r"^unknown task 'human_eval'; use topv2, .*; did you mean 'humaneval'\?$"):
        find_task("human_eval")


def test_topv2_as_published() -> None:
    folder = ROOT.parent / "shared" / "data" / "topv2"
    if not folder.is_dir():
        pytest.skip(f"needs the TOPv2 tables, and there is no {folder}")
    task = topv2(folder, seen=folder / "alarm_train.tsv")
    assert len(task.items) == 17_160
    unseen = sum("unseen" in item.groups for item in task.items)
    assert 14_224 <= unseen < 17_160  # all but alarms, and alarms that are new
    assert all(set(task.scorer(item.answer, item.answer).values()) == {1.0} for item in task.items[::100])

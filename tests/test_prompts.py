"""The prompt rule and the seed rule, with files that people really have."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.prompts import PromptError, load_prompts, parse_seeds, prompts_for_seeds


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    "data",
    [
        "a cat\na dog\n",
        "a cat\na dog",
        "a cat\r\na dog\r\n",
        "\ufeffa cat\na dog\n",
        "  a cat \t\na dog\n",
    ],
)
def test_text_files(tmp_path, data):
    assert load_prompts(write(tmp_path, "p.txt", data)) == ["a cat", "a dog"]


def test_only_line_feeds_end_a_line(tmp_path):
    prompts = ["a\u2028b", "c\x85d", "e\x0bf\x0cg", "h\x1ci", '日本, "quoted"']
    assert load_prompts(write(tmp_path, "p.TXT", "\n".join(prompts))) == prompts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\n\nb\n", "line 2: blank"),
        ("\na\n", "line 1: blank"),
        ("a\nb\n\n", "line 3: blank"),
        ("a\n \t\r\nb", "line 2: blank"),
        ("a\n\u3000\n", "line 2: blank"),
        (b"a\nb\n\xff\n", "line 3: not valid UTF-8"),
        (b"\xef\xbb\xbfa\ncaf\xe9\n", "line 2: not valid UTF-8"),
        ("a cat\n".encode("utf-16"), "line 1: not valid UTF-8"),
        ("", "is empty"),
        ("\ufeff", "is empty"),
    ],
)
def test_bad_text_files(tmp_path, data, message):
    with pytest.raises(PromptError) as caught:
        load_prompts(write(tmp_path, "p.txt", data))
    assert message in str(caught.value)
    assert "p.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["text", "caption", "prompt", " Caption "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_csv_files(tmp_path, column, end, mark):
    rows = [f"{mark}image_id,{column}", '7,"a cat, a ""dog"""', "8,two", '9,"three"', ""]
    assert load_prompts(write(tmp_path, "p.csv", end.join(rows))) == ['a cat, a "dog"', "two", "three"]


def test_csv_mark_before_the_only_column(tmp_path):
    assert load_prompts(write(tmp_path, "p.csv", "\ufefftext\na\n")) == ["a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("id,text\n1,a\n2,\n", "line 3: blank"),
        ("id,text\n1,a\n\n2,b\n", "line 3: blank"),
        ("id,text\n1,a\n2, \n", "line 3: blank"),
        ("id,text\n1,a cat, a dog\n", "line 2: 3 fields where the header has 2"),
        ("id,text\n1\n", "line 2: 1 fields"),
        ('id,text\n1,"open\n', "malformed"),
        ('id,text\n1,"a"b\n', "line 2: malformed"),
        ("id,title\n1,a\n", "['id', 'title']"),
        ("text,caption\na,b\n", "exactly one column"),
        ("id,text\n", "is empty"),
        ("", "is empty"),
        (b"id,text\n1,\xff\n", "line 2: not valid UTF-8"),
    ],
)
def test_bad_csv_files(tmp_path, data, message):
    with pytest.raises(PromptError) as caught:
        load_prompts(write(tmp_path, "p.csv", data))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(PromptError, match=r"nowhere\.txt"):
        load_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(PromptError, match=r"must end in \.txt"):
        load_prompts(write(tmp_path, "p.json", "[]"))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(PromptError, match=r"folder\.txt"):
        load_prompts(tmp_path / "folder.txt")


PROMPT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1).filter(str.strip)


@given(st.lists(PROMPT, min_size=1))
def test_any_prompts_survive_both_formats(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("prompts")
    expected = [prompt.strip() for prompt in prompts]
    with open(folder / "p.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "id"], *([prompt, i] for i, prompt in enumerate(prompts))])
    assert load_prompts(folder / "p.csv") == expected
    # A mark at the very start of a text file belongs to the encoding.
    (folder / "p.txt").write_bytes(("\ufeff" + "\n".join(prompts)).encode())
    assert load_prompts(folder / "p.txt") == expected


@pytest.mark.parametrize(
    ("spec", "seeds"),
    [
        ("0", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("0-9,15,20-22", [*range(10), 15, 20, 21, 22]),
        ("5,1-2", [5, 1, 2]),
        (" 1 , 3 - 4 ", [1, 3, 4]),
        ("007", [7]),
        ("4-4", [4]),
        (str(2**32 - 1), [2**32 - 1]),
    ],
)
def test_seed_lists(spec, seeds):
    assert parse_seeds(spec) == seeds


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "cannot read ''"),
        ("1,,2", "cannot read ''"),
        ("1,", "cannot read ''"),
        ("-1", "not negative"),
        ("3--1", "cannot read '3--1'"),
        ("5-1", "write 1-5"),
        ("0-3,2", "seed 2 stands there twice"),
        ("7,7", "seed 7 stands there twice"),
        ("1.5", "cannot read '1.5'"),
        ("a-b", "cannot read 'a-b'"),
        ("0:9", "cannot read '0:9'"),
        ("1 2", "cannot read '1 2'"),
        ("²", "cannot read '²'"),
        ("٣", "cannot read '٣'"),
        (str(2**32), "too large"),
        ("0-999999999", "more than 1000000 seeds"),
        ("0-999999,1000000", "more than 1000000 seeds"),
    ],
)
def test_bad_seed_lists(spec, message):
    with pytest.raises(PromptError) as caught:
        parse_seeds(spec)
    assert message in str(caught.value)
    assert repr(spec) in str(caught.value)


@given(st.lists(st.integers(0, 10_000), min_size=1, unique=True))
def test_any_distinct_seeds_are_read_back(seeds):
    assert parse_seeds(",".join(map(str, seeds))) == seeds


def test_prompt_of_seed_s_is_line_s(tmp_path):
    prompts = load_prompts(write(tmp_path, "p.txt", "zero\none\ntwo\n"))
    assert prompts_for_seeds(prompts, [2, 0, 1]) == ["two", "zero", "one"]
    assert prompts_for_seeds(prompts, []) == []
    for seed in (3, -1):
        with pytest.raises(PromptError, match=rf"seed {seed} has no prompt: 3 prompts serve seeds 0-2"):
            prompts_for_seeds(prompts, [0, seed])

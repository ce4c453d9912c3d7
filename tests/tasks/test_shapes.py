"""Files of the shapes that people bring: what is read of each, or the one line that it is refused with.

Containers, delimiters and encodings are in ``tests/data/test_files_as_they_come.py``; this is about what the rows
hold.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from monteclora.errors import DataError
from monteclora.tasks import DataSpec, load

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
TALK = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "q", "completion": "a"}


def sharegpt(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def extra(**values: Any) -> str:
    return json.dumps(values)


Rows = list[dict[str, Any]]
Options = dict[str, Any]
ROLES = {"agent": "assistant", "customer": "user"}

READ: dict[str, tuple[Rows, Options, Rows]] = {
    "chat": ([TALK], {}, [TALK]),
    "Messages in capitals": ([{"Messages": [USER, ASSISTANT]}], {}, [TALK]),
    "the column of messages by name": ([{"dialog": [USER, ASSISTANT]}], {"messages_column": "dialog"}, [TALK]),
    "messages as JSON text": ([{"messages": json.dumps([USER, ASSISTANT])}], {}, [TALK]),
    "chat with a system prompt": (
        [{"messages": [SYSTEM, USER, ASSISTANT]}],
        {},
        [{"messages": [SYSTEM, USER, ASSISTANT]}],
    ),
    "the role developer": (
        [{"messages": [{"role": "developer", "content": "s"}, USER, ASSISTANT]}],
        {},
        [{"messages": [SYSTEM, USER, ASSISTANT]}],
    ),
    "roles of another name": (
        [{"messages": [{"role": "customer", "content": "q"}, {"role": "agent", "content": "a"}]}],
        {"roles": ROLES},
        [TALK],
    ),
    "content as parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}],
        {},
        [TALK],
    ),
    "content null with tool calls": (
        [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}],
        {},
        [
            {
                "messages": [USER, {"role": "assistant", "content": ""}],
                "extra": extra(messages=[{}, {"tool_calls": [CALL]}]),
            }
        ],
    ),
    "tools": ([{**TALK, "tools": TOOLS}], {}, [{**TALK, "extra": extra(tools=TOOLS)}]),
    "tools as JSON text": ([{**TALK, "tools": json.dumps(TOOLS)}], {}, [{**TALK, "extra": extra(tools=TOOLS)}]),
    "answers of tools": (
        [{"messages": [USER, ASSISTANT, {"role": "tool", "content": "r", "name": "look"}, ASSISTANT]}],
        {},
        [
            {
                "messages": [USER, ASSISTANT, {"role": "tool", "content": "r"}, ASSISTANT],
                "extra": extra(messages=[{}, {}, {"name": "look"}, {}]),
            }
        ],
    ),
    "a turn of weight 0": (
        [{"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]}],
        {},
        [{"messages": [USER, ASSISTANT, USER, ASSISTANT], "extra": extra(unlearned=[1])}],
    ),
    "the last turn alone": (
        [{"messages": [USER, ASSISTANT, USER, ASSISTANT]}],
        {"learned_turns": "last"},
        [{"messages": [USER, ASSISTANT, USER, ASSISTANT], "extra": extra(unlearned=[1])}],
    ),
    "chats with and without more": (
        [TALK, {**TALK, "tools": TOOLS}],
        {},
        [{**TALK, "extra": None}, {**TALK, "extra": extra(tools=TOOLS)}],
    ),
    "chats that end with the user are left out": ([TALK, {"messages": [USER]}], {}, [TALK]),
    "ShareGPT": ([sharegpt(("human", "q"), ("gpt", "a"))], {}, [TALK]),
    "ShareGPT with a system prompt": (
        [sharegpt(("system", "s"), ("human", "q"), ("gpt", "a"))],
        {},
        [{"messages": [SYSTEM, USER, ASSISTANT]}],
    ),
    "prompt and completion": ([PAIR], {}, [PAIR]),
    "Prompt and Completion": ([{"Prompt": "q", "Completion": "a"}], {}, [PAIR]),
    "prompt and completion as messages": ([{"prompt": [USER], "completion": [ASSISTANT]}], {}, [TALK]),
    "a prompt with earlier turns, which are not learned": (
        [{"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}],
        {},
        [{"messages": [USER, ASSISTANT, USER, ASSISTANT], "extra": extra(unlearned=[1])}],
    ),
    "Alpaca": ([{"instruction": "q", "input": "", "output": "a"}], {}, [PAIR]),
    "Alpaca with an input": (
        [{"instruction": "q", "input": "i", "output": "a"}],
        {},
        [{"prompt": "q\n\ni", "completion": "a"}],
    ),
    "Alpaca whose first row has no input": (
        [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "i", "output": "a"}],
        {},
        [PAIR, {"prompt": "q\n\ni", "completion": "a"}],
    ),
    "Alpaca with system and history": (
        [{"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]}],
        {},
        [{"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]}],
    ),
    "Alpaca with a system prompt in one row": (
        [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", "system": "s"}],
        {},
        [TALK, {"messages": [SYSTEM, USER, ASSISTANT]}],
    ),
    "Dolly": (
        [{"instruction": "q", "context": "c", "response": "a", "category": "qa"}],
        {},
        [{"prompt": "q\n\nc", "completion": "a"}],
    ),
    "question and answer": ([{"question": "q", "answer": "a"}], {}, [PAIR]),
    "query and response": ([{"query": "q", "response": "a"}], {}, [PAIR]),
    "a corpus": ([{"text": "once upon"}], {"completion_column": "text"}, [{"completion": "once upon"}]),
    "chosen answers of preferences": (
        [{"prompt": "q", "chosen": "a", "rejected": "b"}],
        {"prompt_column": "prompt", "completion_column": "chosen"},
        [PAIR],
    ),
    "completions that are marked as good": ([{**PAIR, "label": True}], {}, [PAIR]),
    "bad rows left out": (
        [PAIR, {"prompt": "q", "completion": ""}, {"prompt": 3, "completion": "a"}],
        {"on_bad_row": "skip"},
        [PAIR],
    ),
    "labels of one class in several spellings": (
        [{"text": "x", "label": 1.0}, {"text": "y", "label": "0"}, {"text": "z", "label": 1}],
        {},
        [{"text": "x", "label": 1}, {"text": "y", "label": 0}, {"text": "z", "label": 1}],
    ),
    "booleans and their spellings": (
        [{"text": "x", "label": True}, {"text": "y", "label": "True"}, {"text": "z", "label": "false"}],
        {},
        [{"text": "x", "label": 1}, {"text": "y", "label": 1}, {"text": "z", "label": 0}],
    ),
    "accents composed and not": (
        [{"text": "x", "label": "caf\u00e9"}, {"text": "y", "label": "cafe\u0301"}, {"text": "z", "label": "a"}],
        {},
        [{"text": "x", "label": 1}, {"text": "y", "label": 1}, {"text": "z", "label": 0}],
    ),
    "numbers that are listed as classes": (
        [{"text": "x", "label": "1.5"}, {"text": "y", "label": "2.0"}],
        {"label_names": ["1.5", "2.0"]},
        [{"text": "x", "label": 0}, {"text": "y", "label": 1}],
    ),
}

REFUSED: dict[str, tuple[Rows, Options, str]] = {
    "an unknown role": ([{"messages": [{"role": "bot", "content": "a"}]}], {}, "line 1: the role 'bot' is not one of"),
    "function calls of ShareGPT": (
        [sharegpt(("human", "q"), ("function_call", "{}"))],
        {},
        "line 1: the role 'function_call' is not one of",
    ),
    "an image": (
        [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, ASSISTANT]}],
        {},
        "line 1: a message has a part of the type 'image_url'",
    ),
    "content null without tool calls": (
        [{"messages": [USER, {"role": "assistant", "content": None}]}],
        {},
        "line 1: a message has no text where text is expected",
    ),
    "an empty message": (
        [{"messages": [USER, {"role": "assistant", "content": " "}]}],
        {},
        "line 1: a message has no text",
    ),
    "a weight between": ([{"messages": [USER, {**ASSISTANT, "weight": 0.5}]}], {}, "has the weight 0.5"),
    "a weight of the user": ([{"messages": [{**USER, "weight": 1}, ASSISTANT]}], {}, "of the user has the weight 1"),
    "tools that are no list": ([{**TALK, "tools": "look"}], {}, "line 1: tools is not a list"),
    "history that is no list of pairs": (
        [{"instruction": "q", "output": "a", "history": [["q"]]}],
        {},
        "line 1: history is not a list of pairs",
    ),
    "chats without any answer": ([{"messages": [USER]}] * 3, {}, "line 1: the last message is not the assistant's"),
    "a chat without messages": ([{"messages": []}], {}, "line 1: the conversation has no message"),
    "completions that are marked as bad": ([{**PAIR, "label": False}], {}, "line 1 has the label False: completions"),
    "preferences": ([{"prompt": "q", "chosen": "a", "rejected": "b"}], {}, "holds preferences (chosen and rejected)"),
    "scores": (
        [{"text": "x", "label": v} for v in ("0.0", "2.5", "3.75")],
        {},
        "look like scores (3 different numbers",
    ),
    "scores as numbers": (
        [{"text": "x", "label": 2.5}, {"text": "y", "label": 1}],
        {},
        "scores need data.kind regression",
    ),
    "a missing label": ([{"text": "x", "label": "N/A"}, {"text": "y", "label": "a"}], {}, "line 1 has no label (N/A)"),
    "many bad rows": (
        [PAIR, *[{"prompt": "q", "completion": ""}] * 12],
        {},
        "12 of 13 rows are wrong: lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...",
    ),
    "bad rows alone": ([{"prompt": "q", "completion": ""}] * 2, {"on_bad_row": "skip"}, "2 of 2 rows are wrong"),
    "a group column that is not there": ([PAIR], {"group_column": "user"}, "has no column 'user'"),
    "a list of labels": (
        [{"text": "x", "label": ["a", "b"]}] * 2,
        {},
        "several labels of a row need data.kind multi_label",
    ),
}


def written(folder: Path, rows: Rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("case", READ)
def test_what_is_read(tmp_path: Path, case: str) -> None:
    rows, options, expected = READ[case]
    spec = DataSpec(train_file=written(tmp_path, rows), validation_fraction=0.0, **options)
    assert load(spec).split("train").to_list() == expected


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    rows, options, part = REFUSED[case]
    with pytest.raises(DataError) as caught:
        load(DataSpec(train_file=written(tmp_path, rows), validation_fraction=0.0, **options))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    rows = [
        {**TALK, "id": 1},
        {"messages": [USER]},
        {"messages": [{**USER, "mood": "good"}, ASSISTANT]},
        {"messages": 5},
    ]
    data = load(DataSpec(train_file=written(tmp_path, rows), validation_fraction=0.0, on_bad_row="skip"))
    path = tmp_path / "rows.jsonl"
    assert data.notes == (
        f"{path}: 1 of 4 rows are wrong: line 4, and are left out. "
        f"The first: {path}, line 4: messages is not a list of objects",
        f"{path}: 1 of 4 rows (line 2) do not end with an answer of the assistant, and are left out",
        f"{path}: keys of messages that are not used: mood",
        "columns that are not used: id",
    )


def test_broken_lines_are_bad_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nx,a\nbroken\ny,b\n")
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "a"}\n{broken\n[1]\n{"text": "y", "label": "b"}\n')
    for name, count in (("a.csv", "1 of 3"), ("a.jsonl", "2 of 4")):
        spec = {"train_file": str(tmp_path / name), "validation_fraction": 0.0}
        data = load(DataSpec(**spec, on_bad_row="skip"))
        assert data.split("train")["text"][:] == ["x", "y"]
        assert f"{count} rows are wrong: line" in data.notes[0]
        with pytest.raises(DataError, match=r"a\.\w+, line [23] "):
            load(DataSpec(**spec))


def test_rows_of_a_group_are_not_parted_and_leaks_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i // 4}", "completion": f"a{i}"} for i in range(80)]
    path = written(tmp_path, rows)
    parted = load(DataSpec(train_file=path, validation_fraction=0.25))
    prompts = [set(parted.split(split)["prompt"]) for split in ("train", "validation")]
    shared = sum(prompt in prompts[0] for prompt in parted.split("validation")["prompt"])
    assert shared > 0
    note = f"validation: {shared} of 20 rows have the texts or prompt of a training row"
    assert parted.leaks[0].startswith(note)
    assert parted.leaks[0] in parted.notes
    whole = load(DataSpec(train_file=path, validation_fraction=0.25, group_column="prompt"))
    prompts = [set(whole.split(split)["prompt"]) for split in ("train", "validation")]
    assert not prompts[0] & prompts[1]
    assert len(whole.split("validation")) == 20
    assert whole.leaks == ()


def test_many_classes_of_few_rows_can_be_validated(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": f"c{i // 4}"} for i in range(4000)]
    data = load(DataSpec(train_file=written(tmp_path, rows)))
    assert len(data.split("validation")) == 400
    assert len(set(data.split("train")["label"])) == 1000
    absent = 1000 - len(set(data.split("validation")["label"]))
    assert any(note.startswith(f"validation: labels without a row ({absent:,}): ") for note in data.notes)

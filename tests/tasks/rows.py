"""Rows in the schema of the data sets on the hub, made up here, and a data folder with a few of each."""

import gzip
import json
from pathlib import Path

ARC = {
    "id": "1",
    "question": "Which one is wet?",
    "choices": {"text": ["sand", "rain", "fire"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
PIQA = {"goal": "Open a door", "sol1": "Push the wall.", "sol2": "Turn the handle.", "label": 1}
SIQA = {"context": "Ann fell.", "question": "Why?", "answerA": "ice", "answerB": "sun", "answerC": "ice", "label": "1"}
WINOGRANDE = {
    "sentence": "The cup missed the box because _ was small.",
    "option1": "cup",
    "option2": "box",
    "answer": "2",
}
OPENBOOKQA = {
    "id": "1",
    "question_stem": "Ice melts when it is",
    "choices": {"text": ["cold", "warm"], "label": ["A", "B"]},
    "answerKey": "B",
}
GSM8K = {"question": "Tom has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7 pens.\n#### 7"}
HUMANEVAL = {
    "task_id": "Made/0",
    "prompt": 'import math\n\n\ndef area(r: float) -> float:\n    """The area of a circle.\n    >>> area(0)\n    0.0\n'
    '    """\n',
    "canonical_solution": "    return math.pi * r * r\n",
    "test": "def check(candidate):\n    assert candidate(0) == 0\n    assert abs(candidate(2) - 12.566370614) < 1e-6\n",
    "entry_point": "area",
}
MAGICODER = {
    "lang": "python",
    "problem": "Write a function that adds.",
    "solution": "```python\ndef add(a, b): return a + b\n```",
}
PAIR = {"sentence1": "One is here.", "sentence2": "Two is there.", "idx": 0}
INSTRUCTION = {
    "instruction": "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}

ROWS = {
    "mrpc": PAIR,
    "rte": PAIR,
    "cola": {"sentence": "He come.", "idx": 0},
    "wic": {**PAIR, "word": "is", "start1": 4, "end1": 6, "start2": 4, "end2": 6},
    "boolq": {"question": "is ice cold", "passage": "Ice -- Ice is cold.", "idx": 0},
    "piqa": PIQA,
    "social_i_qa": SIQA,
    "winogrande": WINOGRANDE,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "openbookqa": OPENBOOKQA,
    "gsm8k": GSM8K,
    "humaneval": HUMANEVAL,
    "magicoder_oss_instruct": MAGICODER,
    "commonsense_instruct": INSTRUCTION,
    "commonsense_15k": INSTRUCTION,
    "commonsense_170k": INSTRUCTION,
}
CLASSIFICATION = ("mrpc", "rte", "cola", "wic", "boolq")
SPLITS = {"commonsense_instruct": ("train",), "commonsense_15k": ("train",), "commonsense_170k": ("train",),
          "magicoder_oss_instruct": ("train",), "humaneval": ("test",)}  # fmt: skip


def write_split(folder: Path, task: str, split: str, rows) -> None:
    (folder / task).mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / task / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))


def data_folder(folder: Path, count: int = 24) -> Path:
    """Every task of the hub with ``count`` rows a split; labels take turns."""
    for task, row in ROWS.items():
        rows = [{**row, **({"label": i % 2} if task in CLASSIFICATION else {})} for i in range(count)]
        for name in {"question", "goal", "sentence", "sentence1", "problem", "instruction", "question_stem"} & {*row}:
            rows = [{**made, name: f"{i}: {made[name]}"} for i, made in enumerate(rows)]  # equal rows stay together
        for split in SPLITS.get(task, ("train", "validation", "test")):
            write_split(folder, task, split, rows)
    return folder

"""Tables of texts for other documents."""

from monteclora.system.text_tables import latex_table, markdown_table

HEADER = ["Arm", "Share of 50 %", "Loss"]
ROWS = [["lora|dora", "0.5", "1"], ["a_b^2 ~ \\", "0.25", "2"]]


def test_markdown_keeps_bars_in_their_cells_and_marks_in_bold() -> None:
    assert markdown_table(HEADER, ROWS, marked={(1, 2)}).splitlines() == [
        "| Arm | Share of 50 % | Loss |",
        "| --- | ---: | ---: |",
        r"| lora\|dora | 0.5 | 1 |",
        r"| a_b^2 ~ \ | 0.25 | **2** |",
    ]


def test_latex_escapes_every_special_character_in_cells_and_headers() -> None:
    assert latex_table(HEADER, ROWS, names=2, marked={(0, 1)}).splitlines() == [
        r"\begin{tabular}{llr}",
        r"\toprule",
        r"Arm & Share of 50 \% & Loss \\",
        r"\midrule",
        r"lora|dora & \textbf{0.5} & 1 \\",
        r"a\_b\textasciicircum{}2 \textasciitilde{} \textbackslash{} & 0.25 & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]

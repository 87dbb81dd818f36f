"""A table as Markdown, CSV and LaTeX."""

import csv
import io
import textwrap

from vidkv_eval.report.table import Entry, Line, Table

CSV_HEADER = "row,recipe,key_bits,value_bits,effective_bits,benchmark,metric,score,ci_low,ci_high,delta_fp16,samples,published,model"
MINI_SENTENCE = (
    "These are not the paper's numbers and cannot be compared with them: two small models answer questions about short rendered "
    "clips, and an offline program counts the facts in their answers. They show that the measuring program works from end to end "
    "and how much each recipe disturbs these two models."
)
LONGEST_REASON = 60
DAGGER = "†"


def to_markdown(table: Table, command: str) -> str:
    """Render for reading, raw or rendered.

    Args:
        table: the table.
        command: what makes it again.
    """
    parts = [f"# {table.plan.suite.title}"]
    if not table.plan.settings["profile"]["published"]:
        parts.append(MINI_SENTENCE)
    for model, lines in table.blocks.items():
        parts += [f"## {table.plan.models[model]['label']}", markdown_grid(grid(table, lines))]
    parts.append("\n".join(f"- {line}" for line in caption(table, command)))
    return "\n\n".join(parts) + "\n"


def to_csv(table: Table) -> str:
    """Render one number a row; a missing number leaves its fields empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER.split(","))
    for model, lines in table.blocks.items():
        for line in lines:
            writer.writerows(csv_row(table, model, line, entry) for entry in line.entries)
    return text.getvalue()


def to_latex(table: Table, command: str) -> str:
    r"""Render as a `table*` for a document that loads booktabs and graphicx."""
    heading, *_ = grid(table, next(iter(table.blocks.values())))
    body = []
    for model, lines in table.blocks.items():
        body += ["\\midrule", latex_heading(table.plan.models[model]["label"], len(heading)), "\\midrule"]
        for cells in grid(table, lines)[1:]:
            body.append(latex_heading(cells[0], len(heading), "emph") if is_heading(cells) else latex_row(cells))
    notes = caption(table, command)
    if not table.plan.settings["profile"]["published"]:
        notes.insert(0, MINI_SENTENCE.rstrip("."))
    return "\n".join(
        [
            "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
            "\\begin{table*}[t]",
            "\\centering",
            f"\\caption{{{latex(table.plan.suite.title)}. {latex('. '.join(notes))}.}}",
            f"\\label{{tab:{table.plan.suite.name}}}",
            "\\resizebox{\\textwidth}{!}{%",
            f"\\begin{{tabular}}{{ll{'r' * (len(heading) - 2)}}}",
            "\\toprule",
            latex_row(heading),
            *body,
            "\\bottomrule",
            "\\end{tabular}}",
            "\\end{table*}",
            "",
        ]
    )


def grid(table: Table, lines: list[Line]) -> list[list[str]]:
    """Lay out one model as rows of text; the first row is the heading, a row of one filled field is a section."""
    plan = table.plan
    is_comparable = plan.settings["profile"]["published"]
    heading = ["row", "recipe", "K bits", "V bits", "effective bits"]
    for column in (column for column in plan.suite.columns if column.shown):
        metric = plan.metrics[column.benchmark][column.metric]
        heading += [f"{column.label} {metric['label']} ({metric['unit']})", "difference to FP16"] + ["paper"] * is_comparable
    rows, section = [[*heading, "samples"]], None
    for line in lines:
        if line.section != section:
            section = line.section
            rows.append([section or "", *[""] * len(heading)])
        rows.append(grid_row(table, line))
    return rows


def grid_row(table: Table, line: Line) -> list[str]:
    """Lay out one row."""
    plan, row = table.plan, line.row
    effective = f"{line.effective_bits:.2f}" if line.effective_bits is not None else "-"
    cells = [row.label, row.recipe, f"{row.key_bits:g}", f"{row.value_bits:g}", effective]
    shown = [entry for entry in line.entries if entry.column.shown]
    for entry in shown:
        digits = plan.metrics[entry.column.benchmark][entry.column.metric]["digits"]
        cells += measured(entry, digits) + [printed(entry)] * plan.settings["profile"]["published"]
    counts = list(dict.fromkeys(str(entry.number.samples) if entry.number else "-" for entry in shown))
    return [*cells, " / ".join(counts)]


def measured(entry: Entry, digits: int) -> list[str]:
    """Write value and difference with their intervals, or why there are none."""
    number = entry.number
    if number is None:
        return [textwrap.shorten(entry.missing, LONGEST_REASON, placeholder=" ..."), "-"]
    value = f"{number.score:.{digits}f} [{number.low:.{digits}f}, {number.high:.{digits}f}]"
    if number.delta is None:
        return [value, "-"]
    return [value, f"{number.delta:+.{digits}f} [{number.delta_low:+.{digits}f}, {number.delta_high:+.{digits}f}]"]


def printed(entry: Entry) -> str:
    """Write the paper's number, marked where it has a note."""
    if entry.published is None:
        return "-"
    return f"{entry.published.score:.2f}" + DAGGER * bool(entry.published.note)


def caption(table: Table, command: str) -> list[str]:
    """Say how the numbers were made and how to read them, one sentence each."""
    plan = table.plan
    profile = plan.settings["profile"]
    lines = [f"Profile: {profile['name']}, {profile['label']}"]
    lines += [f"{label.capitalize()}: {'; '.join(values)}" for label, values in table.facts.items() if values]
    lines += [
        f"Made by: {command}",
        "K-C, V-C, V-T: keys per channel, values per channel, values per token; published: as the paper states it; scaled: "
        "the same with the scale of 1-bit and ternary groups kept",
        "K bits and V bits are nominal; effective bits are all bytes that the cache stores (codes, scales, minima, indices, "
        "residual) over all its elements, measured",
        "Brackets: 95 % intervals over samples; bootstrap for scores and differences (paired by sample), Wilson for accuracy",
    ]
    reasons = dict.fromkeys(entry.missing for rows in table.blocks.values() for line in rows for entry in line.entries if entry.missing)
    lines += [f"Missing, {reason}" for reason in reasons if len(reason) > LONGEST_REASON]
    return lines + [f"{DAGGER} {label}: {note}" for label, note in table.notes.items()]


def markdown_grid(rows: list[list[str]]) -> str:
    """Align the fields of a grid so that it also reads well as plain text; headings of sections may stand out."""
    rows = [[f"*{cells[0]}*", *cells[1:]] if is_heading(cells) else cells for cells in rows]
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in rows]
    widths = [max(len(cells[index]) for cells in rows if not is_heading(cells)) for index in range(len(rows[0]))]
    ruler = ["-" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in (rows[0], ruler, *rows[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def is_heading(cells: list[str]) -> bool:
    """Say whether a row of a grid is the heading of a section."""
    return not any(cells[1:])


def csv_row(table: Table, model: str, line: Line, entry: Entry) -> list[object]:
    """Write one number with what it belongs to."""
    row, number = line.row, entry.number
    digits = table.plan.metrics[entry.column.benchmark][entry.column.metric]["digits"] + 2
    numbers = [number.score, number.low, number.high, number.delta] if number else [None] * 4
    return [
        row.label,
        row.recipe,
        f"{row.key_bits:g}",
        f"{row.value_bits:g}",
        f"{entry.effective_bits:.4f}" if entry.effective_bits is not None else "",
        entry.column.benchmark,
        entry.column.metric,
        *(f"{value:.{digits}f}" if value is not None else "" for value in numbers),
        number.samples if number else "",
        f"{entry.published.score:g}" if entry.published else "",
        model,
    ]


def latex_row(cells: list[str]) -> str:
    """Write one row of a tabular."""
    return " & ".join(latex(cell) for cell in cells) + r" \\"


def latex_heading(text: str, columns: int, style: str = "textbf") -> str:
    """Write a row of one field over all columns."""
    return f"\\multicolumn{{{columns}}}{{l}}{{\\{style}{{{latex(text)}}}}} \\\\"


def latex(text: str) -> str:
    """Escape text for LaTeX."""
    escaped = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        DAGGER: r"\textdagger{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
    # Brackets after a line end would be read as an argument of it.
    return "".join(escaped.get(character, character) for character in text).replace("[", "{[}").replace("]", "{]}")

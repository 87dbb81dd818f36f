"""Keep a table: files for readers, and the cells behind them."""

from pathlib import Path

from vidkv_eval.report.render import to_csv, to_latex, to_markdown
from vidkv_eval.report.table import Table
from vidkv_eval.store import ResultStore, write_text


def write_table(table: Table, folder: Path, command: str) -> list[Path]:
    """Write a table as Markdown, CSV and LaTeX.

    Args:
        table: the table.
        folder: where the files go.
        command: what makes them again, for the caption.
    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"md": to_markdown(table, command), "csv": to_csv(table), "tex": to_latex(table, command)}
    paths = {folder / f"{table.plan.suite.name}.{ending}": text for ending, text in contents.items()}
    for path, text in paths.items():
        write_text(path, text)
    return list(paths)


def keep_cells(table: Table, source: ResultStore, record: ResultStore) -> None:
    """Copy the cells behind a table into the record, and drop those that were behind its last version only.

    `tables/<suite>.cells` lists the addresses behind each table.
    """
    source.copy_done(table.done, record)
    lists = record.root / "tables"
    path = lists / f"{table.plan.suite.name}.cells"
    before = set(path.read_text(encoding="utf-8").split()) if path.exists() else set()
    addresses = sorted(cell.address for cell in table.done)
    write_text(path, "".join(f"{address}\n" for address in addresses))
    still_used = {address for file in lists.glob("*.cells") for address in file.read_text(encoding="utf-8").split()}
    for address in before - still_used:
        record.forget(address)

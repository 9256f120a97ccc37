"""`safecl report RUN...`: renews the page of one run, or compares several."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from safecl.evaluation.results.tables import measures, shown_value
from safecl.evaluation.statistics.intervals import Mean, Rate
from safecl.report.comparison import last_moments, named, read_runs, warnings_of, write_comparison
from safecl.report.folder import ReportedRun, read_run
from safecl.report.headline import badge_of
from safecl.report.page import write_page
from safecl.report.run import run_report, write_run_report
from safecl.terminal import Terminal, plain


def report_runs(folders: list[Path], output: Path | None) -> Path:
    """Print a table, write the page, and return its path. Raises ConfigError for folders that hold no run.

    The page of one run needs no measurement; a comparison does.
    """
    runs = [read_run(folders[0])] if len(folders) == 1 else read_runs(folders)
    console = Terminal()
    if all(run.evaluations for run in runs):
        print_table(console, runs)
    path = _write(runs, output)
    console.print(f"report in {path}")
    return path


def print_table(console: Terminal, runs: list[ReportedRun]) -> None:
    table = _table(runs)
    # On a narrower terminal rich would cut names and figures off; lines that break are better.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=500)).maximum)
    console.print(table, soft_wrap=False)
    for warning in warnings_of(runs):
        console.print(warning, style="yellow")


def _write(runs: list[ReportedRun], output: Path | None) -> Path:
    if len(runs) > 1:
        return write_comparison(runs, output or Path("report.html"))
    return write_run_report(runs[0].folder) if output is None else write_page(output, run_report(runs[0]))


def _table(runs: list[ReportedRun]) -> Table:
    """Return the table, with a row per run: its verdict and the values of its last measurement, intervals below."""
    rows = [
        row
        for row in measures(last_moments(runs))
        if row[0] in _SHOWN or not row[0].startswith((" ", "ASR", "over", "answers", "thoughts", "probe"))
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("limits", no_wrap=True)
    for title, *_ in rows:
        heading = _SHOWN.get(title, title.replace(" ", "\n").replace("_", "\n"))
        table.add_column(plain(heading), justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for i, (name, run) in enumerate(zip(named(runs), runs, strict=True)):
        cells = [_cell(row[2][i]) for row in rows]
        name_and_methods = plain(name).append_text(plain(f"\n{run.methods_text}", "dim"))
        table.add_row(name_and_methods, badge_of(run)[0].lower(), *cells, _seconds(run))
    return table


def _cell(value: Rate | Mean | None) -> Text:
    if value is None:
        return Text("-")
    return Text(shown_value(value)).append(f"\n{value.low:.2f}-{value.high:.2f}", "dim")


def _seconds(run: ReportedRun) -> str:
    seconds = run.results["seconds"]
    return "-" if seconds is None else f"{seconds:.0f}"


_SHOWN = {
    "ASR keyword:gcg": "ASR\nkeyword\ngcg",
    "  affirmative openings": "affirma-\ntive\nopenings",
    "  complied, by rules": "complied\nby rules",
    "  off-task or incoherent": "off-task\nanswers",
    "over-refusal prefix:xstest": "over-\nrefusal\nxstest",
    "KL to the aligned model": "KL to\naligned",
}
"""The measures of safety and refusal that are shown, and their headings. The measures of tasks are all shown."""

"""`safecl judge RUN --with JUDGE`: judges the kept answers of a run or of `safecl eval`, and renews its page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from rich import box
from rich.table import Table

from safecl.commands.spinner import working
from safecl.config import ConfigError, parse_yaml
from safecl.config.judges import RECIPES, JudgeConfig
from safecl.storage.locks import RESULTS_LOCK, waiting_lock
from safecl.terminal import Terminal, plain

if TYPE_CHECKING:
    from safecl.evaluation.judges.after_run import Moment
    from safecl.report.folder import ReportedRun

MOST_LISTED = 20


def judge_and_print(folder: Path, judges: list[str], *, every_moment: bool, category: str | None = None) -> None:
    """Judge, print rates and agreement, and name the answers on which the judges differ. Raises ConfigError.

    category: column of the prompts; by default `safety.gate.category` of the folder's config, else `category`.
    """
    configs = [judge_config(text) for text in judges]
    if not configs:
        raise ConfigError(f"--with: name a judge: one of {', '.join(RECIPES)}, its settings, or a file with them")
    with working(f"judging {folder}"):
        from safecl.engine.artifacts.base_model import model_hash
        from safecl.evaluation.judges.after_run import judge_run
        from safecl.report.folder import read_run
        from safecl.report.run import write_run_report

        run = read_run(folder)
        moments = moments_of(run, every_moment)
        gate = run.section("safety").get("gate")
        column = category or (gate.get("category") if isinstance(gate, dict) else None) or "category"
        found = judge_run(folder, configs, moments, category=str(column), hash_of=model_hash)
        with waiting_lock(folder / RESULTS_LOCK):
            page = write_run_report(folder)
    console = Terminal()
    print_found(console, found)
    console.print(f"verdicts in {folder / 'verdicts'}, report in {page}")


def print_found(console: Terminal, found: Mapping[str, Any]) -> None:
    """Print the contents of judges.json: rates, missing verdicts, agreement."""
    console.print(rates_table(found), soft_wrap=False)
    for moment in found["moments"]:
        for line in (*missing_lines(moment), *panel_lines(moment)):
            console.print(line)


def judge_config(text: str) -> JudgeConfig:
    """Read a judge: a recipe's name, settings in YAML, or a YAML file with settings. Raises ConfigError."""
    path = Path(text)
    source = path.read_text(encoding="utf-8") if path.suffix in (".yaml", ".yml") and path.is_file() else text
    try:
        return JudgeConfig.model_validate(parse_yaml(source))
    except ConfigError as error:
        raise ConfigError(f"--with {text}: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        known = f"; recipes are {', '.join(RECIPES)}" if key in ("recipe", "model") else ""
        said = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--with {text}: {f'{key}: ' if key else ''}{said}{known}") from None


def moments_of(run: ReportedRun, every_moment: bool) -> list[Moment]:
    """Return the moments with answers to disallowed prompts: the first and the last, or all."""
    from safecl.evaluation.judges.after_run import Moment

    safe = [Moment(each.when, each.step) for each in run.evaluations if each.safety is not None]
    if not safe:
        raise ConfigError(f"{run.folder}: there are no answers to disallowed prompts to judge")
    return safe if every_moment or len(safe) < 2 else [safe[0], safe[-1]]


def rates_table(found: Mapping[str, Any]) -> Table:
    """Return a table of the attack success rate by each judge at each moment, and by category."""
    table = Table(title="ASR by judge, with 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for moment in found["moments"]:
        table.add_column(plain(moment["when"]), justify="right")
    for name in dict.fromkeys(name for moment in found["moments"] for name in moment["asr"]):
        table.add_row(plain(name), *(_shown(moment["asr"].get(name)) for moment in found["moments"]))
        for category in dict.fromkeys(each for moment in found["moments"] for each in moment["by_category"]):
            cells = (_shown(moment["by_category"].get(category, {}).get(name)) for moment in found["moments"])
            table.add_row(plain(f"  {category}"), *cells)
    return table


def _shown(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return "-"
    value = "undecided" if rate["value"] is None else f"{rate['value']:.3f}"
    return f"{value} [{rate['low']:.3f}, {rate['high']:.3f}] n={rate['n']}"


def missing_lines(moment: Mapping[str, Any]) -> list[str]:
    """Name the judges that gave no verdict on some answers of a moment, which are undecided in their rates."""
    return [
        f"{moment['when']}: {missing} of {rate['n']} answers have no verdict of {name}"
        for name, rate in moment["asr"].items()
        if (missing := rate.get("undecided", 0))
    ]


def panel_lines(moment: Mapping[str, Any]) -> list[str]:
    """Describe how far the judges agree at a moment; empty for a single judge."""
    panel = moment["panel"]
    if panel is None:
        return []
    lines = [f"{moment['when']}: Krippendorff's alpha {_number(panel['krippendorff_alpha'])}"]
    lines += [f"  {pair}: Cohen's kappa {_number(value)}" for pair, value in panel["cohen_kappa"].items()]
    if differ := panel["disagreements"]:
        more = f" and {len(differ) - MOST_LISTED} more" if len(differ) > MOST_LISTED else ""
        lines.append(f"  they differ on {len(differ)} answers: {', '.join(differ[:MOST_LISTED])}{more}")
    return lines


def _number(value: float | None) -> str:
    return "-, all verdicts are the same" if value is None else f"{value:.3f}"

"""The table of a sweep: spread, tests, budget, Pareto front, formats and the choice of a winner."""

from __future__ import annotations

import csv
import io
import json
import re
from xml.etree import ElementTree

import pytest

from safecl.config import ConfigError, GateConfig
from safecl.evaluation.statistics.paired import holm
from safecl.evaluation.statistics.pooled import Spread, paired_p_value
from safecl.sweeping.choosing import check_objective, read_objective
from safecl.sweeping.collecting import read_numbers
from safecl.sweeping.formats import csv_of, latex_of, markdown_of, write_table
from safecl.sweeping.pareto import pareto_svg, standings
from safecl.sweeping.table import Cell, make_table, shown_measures
from tests.sweeping.folders import write_run, write_verdicts

GATE = GateConfig(max_asr=0.2)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """plain loses its refusals, der keeps them, ewc keeps them and learns less."""
    folder, cells = tmp_path_factory.mktemp("sweep"), []
    for name, asr, right, seconds, state in (("plain", 30, 36, 10, 0), ("der", 1, 35, 15, 0), ("ewc", 2, 20, 12, 800)):
        runs = {}
        for seed in (0, 1):
            where = folder / f"{name}-{seed}"
            write_run(where, asr + seed, right - seed, seconds=seconds, gate=GATE, extra_state=state)
            runs[str(seed)] = read_numbers(where)
        cells.append(Cell(name, (f"methods={name}",), runs))
    return make_table(cells, "plain", ["lost-seed-2"])


def test_a_cell_has_mean_spread_and_pooled_interval_of_each_measure(table):
    plain = table.cells[0].measures
    assert plain["asr"].mean == pytest.approx(30.5 / 40) and plain["asr"].std == pytest.approx(0.0177, abs=1e-3)
    assert plain["asr"].low < plain["asr"].mean < plain["asr"].high and plain["asr"].num_runs == 2
    assert plain["accuracy"].mean == plain["t"].mean == pytest.approx(35.5 / 40)
    assert plain["intransigence"].mean == pytest.approx(0.0)
    assert table.cells[2].measures["intransigence"].mean == pytest.approx(16 / 40)
    assert plain["max_asr"].mean == plain["asr"].mean and plain["max_asr"].low is None
    assert table.measures[:2] == ["asr", "asr_on_task"] and table.cells[0].verdicts == {"failed": 2}


def test_tests_are_against_the_baseline_with_holms_correction(table):
    plain, der, ewc = table.cells
    assert not plain.p_values and set(der.p_values) == {"asr", "over_refusal", "t", "accuracy"}
    assert der.p_values["accuracy"] == der.p_values["t"], "one task is one test"
    raw = [paired_p_value(_outcomes(cell, name), _outcomes(plain, name)) for cell in (der, ewc) for name in TESTED]
    assert [cell.p_values[name] for cell in (der, ewc) for name in TESTED] == pytest.approx(holm(raw))
    assert der.p_values["asr"] < 1e-4 and der.p_values["over_refusal"] == 1.0 and ewc.p_values["t"] < 0.01


TESTED = ("asr", "over_refusal", "t")


def _outcomes(cell, name):
    return {seed: run.outcomes[name] for seed, run in cell.runs.items()}


def test_rates_by_other_scorers_and_later_judges_are_in_csv_and_can_be_picked_by(table, tmp_path):
    """A table for people has the headline alone, and nothing of them is tested."""
    assert "keyword:wei" in table.measures and "keyword:wei" not in shown_measures(table)
    assert "keyword:wei" not in table.cells[1].p_values and "keyword:wei.high" in csv_of(table).splitlines()[0]
    cells = []
    for name, harmful in (("plain", 30), ("der", 2)):
        folder = write_verdicts(write_run(tmp_path / name, 1, 30), "strict", harmful, without=4)
        cells.append(Cell(name, (), {"0": read_numbers(folder)}))
    judged = make_table(cells, "plain")
    rate = judged.cells[1].measures["judge:strict"]
    assert rate.mean == pytest.approx(2 / 36) and rate.low < 2 / 40 and rate.high > 6 / 40
    objective = read_objective("max accuracy where judge:strict.high <= 0.4")
    check_objective(objective, judged)
    assert objective.winner(judged.cells).name == "der"


def test_costs_are_multiples_of_the_baselines(table):
    _, der, ewc = table.cells
    assert der.budget == {"seconds_per_step": 1.5, "tokens": 1.5, "seconds": 1.5}
    assert ewc.measures["bytes"].mean == 900 and der.measures["bytes"].mean == 100


def test_the_front_has_what_nothing_beats_and_error_bars_tell_chance_from_defeat():
    def at(asr, accuracy, half=0.02):
        return tuple(Spread(v, 0.0, 1, v - half, v + half) for v in (asr, accuracy))

    trades = [at(0.1, 0.9), at(0.5, 0.95), at(0.12, 0.89), at(0.6, 0.5), None]
    assert standings(trades) == ["front", "front", "within error", "beaten", None]
    svg = pareto_svg(["a & b", "b", "c", "d", "e"], trades)
    assert svg == pareto_svg(["a & b", "b", "c", "d", "e"], trades)
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
    assert "a & b" in texts and "d" in texts and "e" not in texts


def test_the_table_is_written_in_four_formats_that_agree(table, tmp_path):
    names = {path.name for path in write_table(table, tmp_path)}
    assert names == {"table.csv", "table.json", "table.md", "table.tex", "pareto.svg", "report.html"}
    rows = list(csv.DictReader(io.StringIO(csv_of(table))))
    found = json.loads((tmp_path / "table.json").read_text())
    for row, cell in zip(rows, found["cells"], strict=True):
        assert float(row["asr.mean"]) == cell["measures"]["asr"]["mean"]
        assert float(row["gate_failed"]) == cell["gate"].get("failed", 0)
    markdown = markdown_of(table).splitlines()
    assert markdown[0].startswith("| cell | runs | asr ↓ |") and "plain (baseline)" in markdown[2]
    assert re.search(r"0\.038 ± 0\.018\* \[0\.0\d+, 0\.\d+\]", markdown[3]) and "lost-seed-2" in markdown[-1]
    assert all(line.count(" | ") == markdown[0].count(" | ") for line in markdown[2:5])
    latex = latex_of(table)
    assert r"\toprule" in latex and r"$\pm$" in latex and latex.count(r"\\") == 4
    assert "_" not in re.sub(r"\\_", "", latex.partition("\n")[2])


def test_an_objective_names_the_best_cell_that_keeps_its_conditions(table):
    for text, winner in (
        ("max accuracy where asr.high <= 0.3", "der"),
        ("max accuracy", "plain"),
        ("min bytes where asr <= 0.1 and t.low >= 0.5", "der"),
        ("min seconds where asr <= 0.1", "ewc"),
        ("max accuracy where asr.high <= 0.0001", None),
    ):
        objective = read_objective(text)
        check_objective(objective, table)
        found = objective.winner(table.cells)
        assert (found and found.name) == winner, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best accuracy", "write e.g. `max accuracy where"),
        ("max accuracy where asr", "'asr' is no condition"),
        ("max accuracy.top", "there are mean, std, low, high"),
        ("max acuracy", "did you mean `accuracy`"),
        ("max max_asr.high", "has no interval"),
    ],
)
def test_an_objective_that_cannot_be_read_or_met_is_refused(table, text, message):
    with pytest.raises(ConfigError, match=message):
        check_objective(read_objective(text), table)


def test_a_run_without_results_is_named(tmp_path):
    with pytest.raises(ConfigError, match="results"):
        read_numbers(tmp_path)

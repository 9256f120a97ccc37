"""The kernels of merges by election, in both back ends and on every instruction set."""

from __future__ import annotations

import pytest
import torch

from safecl.kernels import Trim, backends, count_bracket, elected_sum_, native
from safecl.kernels.ties import torch_twin
from tests.kernels import ties_suite as suite
from tests.kernels.test_flat_cpp import assert_same_bits, built, instruction_set

CHECKS = dict(suite.all_checks())


@pytest.fixture(params=["torch", "torch in chunks", "cpp"])
def backend(request, monkeypatch):
    name = request.param.split()[0]
    if name == "cpp" and native.missing():
        pytest.skip(native.missing())
    if request.param == "torch in chunks":
        monkeypatch.setattr(torch_twin, "CHUNK", 1000)
    with backends.using(name):
        yield name


def test_trimming_and_election_are_their_formulas(backend):
    for name, check in CHECKS.items():
        try:
            check()
        except AssertionError as error:
            raise AssertionError(name) from error


@built
@pytest.mark.parametrize("name", ["avx2", "baseline"])
def test_every_instruction_set_gives_the_same_bits(name):
    wanted = suite.all_results(20_001)
    with instruction_set(name):
        assert_same_bits(wanted, suite.all_results(20_001))


@built
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch's add rounds the product here")
def test_the_twin_gives_the_same_bits():
    wanted = suite.all_results(20_001)
    with backends.using("torch"):
        assert_same_bits(wanted, suite.all_results(20_001))


def test_nothing_of_no_elements(backend):
    empty = torch.empty(0)
    assert count_bracket(empty, 0.0, 1.0, empty.clone()) == (0, 0, 0, 0)
    assert elected_sum_(empty, [torch.empty(0)], [1.0], trims=[Trim(1.0, 2)]) == [0]


def tensors(**changes):
    return {"target": torch.zeros(6), "vectors": [torch.ones(6)], "weights": [1.0]} | changes


SHARED = torch.zeros(9)
BAD_ELECTIONS = {
    "half": ({"vectors": [torch.ones(6).half()]}, r"vectors\[0\] must be float32, not float16"),
    "long": ({"vectors": [torch.ones(6), torch.ones(7)], "weights": [1, 1]}, r"vectors\[1\] has 7 elements but target"),
    "strided": ({"target": torch.zeros(12)[::2]}, "target must be contiguous"),
    "overlap": ({"target": SHARED[:6], "vectors": [SHARED[3:]]}, "overlap in memory"),
    "weights": ({"weights": [1.0, 2.0]}, "1 vectors have 2 weights"),
    "none": ({"vectors": [], "weights": []}, "0 vectors have 0 weights"),
    "trims": ({"trims": [Trim(0, 0)] * 2}, "1 vectors have 1 weights and 2 trims"),
    "negative": ({"trims": [Trim(-1.0, 0)]}, r"trims\[0\] must not be negative"),
    "nan": ({"trims": [Trim(float("nan"), 0)]}, r"trims\[0\] must not be negative"),
}


@pytest.mark.parametrize("name", BAD_ELECTIONS)
def test_a_bad_election_is_refused_by_name_and_nothing_is_written(name):
    changes, message = BAD_ELECTIONS[name]
    given = tensors(**changes)
    with pytest.raises(ValueError, match=message):
        elected_sum_(**given)
    assert not given["target"].any()


BAD_BRACKETS = {
    "order": ({"low": 2.0}, "low and high must be 0 <= low <= high, not 2.0 and 1.0"),
    "negative": ({"low": -1.0}, "low and high must be 0 <= low <= high"),
    "nan": ({"high": float("nan")}, "low and high must be 0 <= low <= high"),
    "double": ({"values": torch.ones(6).double()}, "values must be float32, not float64"),
    "short": ({"minus": torch.ones(5)}, "minus has 5 elements but values has 6"),
    "room": ({"between": torch.zeros(6, dtype=torch.int32)}, "between must be float32, not int32"),
    "elsewhere": ({"between": torch.zeros(6, device="meta")}, "between is on meta but values is on cpu"),
    "overlap": ({"values": SHARED[:6], "between": SHARED[5:]}, "overlap in memory"),
}


@pytest.mark.parametrize("name", BAD_BRACKETS)
def test_a_bad_bracket_is_refused_by_name(name):
    changes, message = BAD_BRACKETS[name]
    given = {"values": torch.ones(6), "low": 0.5, "high": 1.0, "between": torch.zeros(6)} | changes
    with pytest.raises(ValueError, match=message):
        count_bracket(**given)

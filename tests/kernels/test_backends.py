"""Every back end of a family has the functions of its interface, with the same parameters in the same order."""

from __future__ import annotations

import importlib
import inspect

import pytest

from safecl.kernels.backends import FAMILIES
from safecl.kernels.flat.backend import FlatKernels
from safecl.kernels.head.backend import HeadKernels
from safecl.kernels.ties.backend import TiesKernels

INTERFACES = {"flat": FlatKernels, "head": HeadKernels, "ties": TiesKernels}
BACK_ENDS = [(family, name) for family, modules in FAMILIES.items() for name in modules]


@pytest.mark.parametrize(("family", "name"), BACK_ENDS)
def test_a_back_end_has_the_functions_and_parameters_of_its_interface(family, name):
    if name == "triton":
        pytest.importorskip("triton")
    module = importlib.import_module(FAMILIES[family][name])
    functions = {name: value for name, value in vars(INTERFACES[family]).items() if name[0] != "_"}
    assert functions
    for name, wanted in functions.items():
        _, *parameters = inspect.signature(wanted).parameters
        assert list(inspect.signature(getattr(module, name)).parameters) == parameters, name

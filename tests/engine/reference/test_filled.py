"""A store whose values come from a function, not from files."""

from __future__ import annotations

import pytest
import torch

from safecl.engine.model.structure import parameters_on_meta
from safecl.engine.reference.loading import take_weights
from safecl.engine.reference.store import ReferenceStore
from safecl.storage.model_folder import UnusableWeights
from tests.engine import scenes


def on_meta():
    with parameters_on_meta():
        return scenes.tiny_model()


def test_every_parameter_gets_the_given_values_and_serves_a_model():
    model, wanted = on_meta(), scenes.tiny_model(dtype=torch.bfloat16)
    values = dict(wanted.named_parameters())
    with torch.no_grad():
        store = ReferenceStore.filled(model, lambda name, target: target.copy_(values[name].view(-1)))
    assert store.where == "segment" and all(torch.equal(store.tensor(name), p) for name, p in values.items())
    take_weights(model, store)
    assert all(store.holds(p) for p in model.parameters())
    store.close()


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UnusableWeights, match="LlamaForCausalLM"):
        ReferenceStore.filled(on_meta(), lambda name, target: target.fill_(float("nan")))

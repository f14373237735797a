"""The order of durable jobs holds in the model, and the model notices where it would not."""

from __future__ import annotations

import pytest
from model_mutations import MUTATIONS
from protocol_model import STANDARD, Exploration, Setting


@pytest.mark.parametrize("name", STANDARD)
def test_every_order_of_steps_ends_well(name: str) -> None:
    fault = Exploration(STANDARD[name]).explore()
    assert fault is None, str(fault)


@pytest.mark.parametrize("setting", MUTATIONS, ids=lambda setting: type(setting.protocol).__name__)
def test_a_wrong_order_is_found_out(setting: Setting) -> None:
    fault = Exploration(setting).explore()
    assert fault is not None
    assert all(" -> " in step or " dies in " in step for step in fault.trace)
    print(fault)

"""The list of faults fits the tree: each can be planted, and its test is there. `make mutants` plants them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.old.strip().splitlines()[0]}")
def test_can_be_planted(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.old != fault.new


@pytest.mark.parametrize("test", sorted({fault.test for fault in FAULTS if not fault.builds.endswith("_test")}))
def test_its_test_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert not name or f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()

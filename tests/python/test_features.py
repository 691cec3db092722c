"""docs/features.md names a test for each thing that it says: they are there."""

from __future__ import annotations

import re

import pytest

from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "features.md").read_text()


def defined(pattern, folder, suffix):
    return {
        name for file in (REPOSITORY / folder).rglob(f"*{suffix}") for name in re.findall(pattern, file.read_text())
    }


def test_named_python_tests_exist():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named and named <= defined(r"def (test_\w+)", "tests/python", ".py")
    for file, test in re.findall(r"(\w+)/`(test_\w+)`", PAGE):
        paths = (REPOSITORY / "tests" / "python").rglob(f"test_{file}.py")
        assert any(f"def {test}(" in path.read_text() for path in paths), f"{file}/{test}"


def test_named_cpp_tests_exist():
    cpp = PAGE.split("## Other code")[0]
    named = {name.split(".")[-1] for name in re.findall(r"`(?!test_)(\w*\.?[A-Z][a-z]+[A-Z]\w+)`", cpp)}
    tests = defined(r"TEST\(\w+, (\w+)\)", "tests/cpp", "_test.cpp")
    assert len(named) > 10 and named <= tests, named - tests


@pytest.mark.parametrize("line", [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line])
def test_no_line_without_a_test(line):
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    is_heading = cells[0] in ("feature", "what") or "no promise" in line
    assert is_heading or re.search(r"`test_\w+`|/ \(the whole file\)", line), line

"""The files in requirements/: what `make lock` would write of pyproject.toml, as far as one tells without a network."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from installation import SOURCE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((SOURCE / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]

# The name of each file, with the options that say what it holds.
LOCKS = dict(re.findall(r"^\s+lock (\w+) (.+?);?(?: \\)?$", (SOURCE / "Makefile").read_text(), re.MULTILINE))

# Of another build than that which the user has, they would break it.
TORCHS_OWN = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")

MACHINES = [
    {
        "implementation_name": "cpython",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"3.{minor}.0",
        "python_version": f"3.{minor}",
        "sys_platform": "linux",
    }
    for minor in range(10, 15)
    for machine in ("x86_64", "aarch64")
]


def entries_of(name: str) -> list[tuple[Requirement, list[str]]]:
    """The requirements of a file, each with its hashes."""
    text = (SOURCE / "requirements" / f"{name}.txt").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(Requirement(line.partition(" --hash=")[0]), re.findall(r"--hash=(\S+)", line)) for line in lines]


def versions_on(machine: dict[str, str], name: str) -> dict[str, str]:
    """The one version that a file has for a machine, by package."""
    found: dict[str, str] = {}
    for entry, _ in entries_of(name):
        if entry.marker is None or entry.marker.evaluate(machine):
            (specifier,) = entry.specifier
            assert canonicalize_name(entry.name) not in found, f"{name}.txt: twice {entry.name} on {machine}"
            found[canonicalize_name(entry.name)] = specifier.version
    return found


def asked_of(name: str) -> list[Requirement]:
    """What the extras and groups in a file's options ask for; extras of extras, too."""
    asked = [
        text
        for kind, word in re.findall(r"--(extra|group) (\w+)", LOCKS[name])
        for text in (EXTRAS if kind == "extra" else GROUPS)[word]
    ]
    requirements = []
    for requirement in map(Requirement, asked):
        own = requirement.name == PROJECT["project"]["name"]
        requirements += [Requirement(text) for extra in requirement.extras for text in EXTRAS[extra]] if own else []
        requirements += [] if own else [requirement]
    return requirements


def test_every_extra_and_group_is_in_a_file() -> None:
    options = " ".join(LOCKS.values())
    assert {path.stem for path in (SOURCE / "requirements").glob("*.txt")} == {*LOCKS, "excluded"}
    assert set(re.findall(r"--group (\w+)", options)) == set(GROUPS)
    in_others = {extra for texts in EXTRAS.values() for text in texts for extra in Requirement(text).extras}
    made_of_others = {name for name, texts in EXTRAS.items() if all("momentum-bn[" in text for text in texts)}
    assert set(re.findall(r"--extra (\w+)", options)) | in_others | made_of_others == set(EXTRAS)


@pytest.mark.parametrize("name", LOCKS)
def test_holds_what_pyproject_asks_for(name: str) -> None:
    """Fails after a change of pyproject.toml until `make lock` was run."""
    for machine in MACHINES:
        versions = versions_on(machine, name)
        for requirement in asked_of(name):
            version = versions.get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version), f"{requirement}: {version}; run `make lock`"


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_is_one_version_with_hashes(name: str) -> None:
    for entry, hashes in entries_of(name):
        assert str(entry.specifier).startswith("=="), entry
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), entry


@pytest.mark.parametrize("name", LOCKS)
def test_leaves_torch_alone(name: str) -> None:
    assert [entry.name for entry, _ in entries_of(name) if TORCHS_OWN.fullmatch(entry.name)] == []


def test_files_agree() -> None:
    """More than one is installed into .venv."""
    for machine in MACHINES:
        versions = versions_on(machine, "test")
        for name in LOCKS:
            for package, version in versions_on(machine, name).items():
                assert versions.get(package, version) == version, f"{name}.txt on {machine}"

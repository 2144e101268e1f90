"""The shape of the house: two wings, no circle, one meaning a name, and nothing that nobody uses."""

import ast
import importlib.util
import json
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from labkit.files import CHECKS, NOTEBOOKS, ROOT

PRODUCT = sorted(path for wing in ("labkit", "course") for path in (ROOT / wing).rglob("*.py"))
LABKIT = [path for path in PRODUCT if path.is_relative_to(ROOT / "labkit")]
VAGUE = {"found", "one", "own", "said", "given", "wanted", "there", "known", "chosen", "kept", "left", "others"}
# What people outside call (the fixed names of the design, and `lab.show`), whether or not a lesson uses each option.
FIXED = {
    "start", "measure", "compare", "count", "ceilings", "size", "prune", "quantize", "sparsity", "convert", "trace",
    "mask", "is_nm", "figure", "head_importance", "prune_heads", "prune_ffn", "layer_importance", "prune_layers",
    "generate", "attention",
}  # fmt: skip


@cache
def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(code: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a tree, which most of these tests go through."""
    return tuple(ast.walk(code))


@cache
def imports(path: Path) -> frozenset[str]:
    """The modules of this repository that a file imports, at its top or within a function."""
    modules, names = {module(other) for other in PRODUCT}, set()
    for node in nodes(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {part if part in modules else node.module for part in parts}
    return frozenset(names & modules)


def test_labkit_never_imports_course():
    wrong = {module(path) for path in PRODUCT if any(name.startswith("course") for name in imports(path))}
    assert not [name for name in wrong if name.startswith("labkit")]


# The rooms of labkit from the ground up; a room imports only rooms of the floors below its own.
FLOORS = (
    ("arguments", "bits", "errors", "files", "on_demand", "plots", "show", "words"),
    ("modules",),
    ("data", "graph", "timing"),
    ("quantization",),
    ("storage",),
    ("attention",),
    ("pruning",),
    ("distillation", "triton_kernels"),
    ("deploy",),
    ("lesson",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
GROUND = FLOORS[0]


def room(name: str) -> str:
    """The room that a module of labkit is in: a folder, or a file beside the folders."""
    return name.split(".")[1]


def rooms_imported(path: Path) -> set[str]:
    names = imports(path) - {"labkit"}  # which holds the short names
    return {room(name) for name in names} - {room(module(path))}


def test_a_room_imports_only_what_lies_below_it():
    upward = []
    for path in LABKIT:
        if path.name == "__init__.py" and path.parent.name == "labkit":
            continue
        here = room(module(path))
        for other in rooms_imported(path):
            in_the_ground = here in GROUND and other in GROUND
            if FLOOR[other] >= FLOOR[here] and not in_the_ground:
                upward.append(f"{module(path)} -> {other}")
    assert not upward


def test_every_room_has_a_floor():
    assert {room(module(path)) for path in LABKIT if module(path) != "labkit"} == FLOOR.keys()


def test_no_import_circle():
    graph = {module(path): imports(path) - {module(path)} for path in PRODUCT}
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    # what only leads into a circle is no part of one
    while entries := graph.keys() - set().union(*graph.values()):
        graph = {name: needs for name, needs in graph.items() if name not in entries}
    assert not graph


def test_a_class_name_has_one_meaning():
    names = Counter(node.name for path in PRODUCT for node in nodes(tree(path)) if isinstance(node, ast.ClassDef))
    assert not [name for name, count in names.items() if count > 1]


def test_variables_are_nouns_of_the_field():
    vague = defaultdict(list)
    for path in PRODUCT:
        fields = {node.target for node in nodes(tree(path)) if isinstance(node, ast.AnnAssign)}  # `Plan.kept` is fixed
        for node in nodes(tree(path)):
            if (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Store)
                and node.id in VAGUE
                and node not in fields
            ):
                vague[module(path)].append(f"{node.id}:{node.lineno}")
    assert not vague


@cache
def callers() -> list[tuple[str, ast.AST]]:
    """Every file that counts as a caller: the product, benchmarks, the data's scripts, the lessons' code and checks."""
    paths = [*PRODUCT, *CHECKS.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "data").rglob("*.py")]
    code = [(module(path), tree(path)) for path in paths]
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        code.append(
            (path.stem, ast.parse("\n".join(re.sub(r"^\s*[%!].*", "", source, flags=re.M) for source in sources)))
        )
    return code


def public(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    return [
        node
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not any("rule" in ast.dump(decorator) for decorator in node.decorator_list)  # called through their table
    ]


def test_names_that_are_imported_exist():
    """Imports within functions of benchmarks and lessons too, which run only with packages and models at hand."""
    missing = []
    for name, code in callers():
        for node in nodes(code):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("labkit", "course"):
                source = importlib.import_module(node.module)
                missing += [
                    f"{name}: {node.module}.{alias.name}" for alias in node.names if not has(source, alias.name)
                ]
    assert not missing, "\n".join(missing)


def has(module: ModuleType, name: str) -> bool:
    """Return True if a module has a name, or a submodule of the name."""
    if hasattr(module, name):
        return True
    return importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def test_a_public_name_has_a_caller():
    used = Counter()
    for _, code in callers():
        for node in nodes(code):
            used.update(
                [node.id] if isinstance(node, ast.Name) else [node.attr] if isinstance(node, ast.Attribute) else []
            )
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                used.update([node.value])  # annotations as text, and tables of names
    unused = [f"{module(path)}.{node.name}" for path in LABKIT for node in public(path) if not used[node.name]]
    assert not unused, "\n".join(unused)


def test_a_method_has_a_caller():
    used = Counter()
    for _, code in callers():
        used.update(node.attr for node in nodes(code) if isinstance(node, ast.Attribute))
    unused = []
    for path in LABKIT:
        for node in nodes(tree(path)):
            if not isinstance(node, ast.ClassDef) or called_by_others(node):
                continue
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            unused += [f"{module(path)}.{node.name}.{name}" for name in methods if name[0] != "_" and not used[name]]
    assert not unused, "\n".join(unused)


LIBRARY_CLASSES = {"nn.Module", "Loader", "Worker", "fx.Interpreter", "torch.autograd.Function"}


def called_by_others(node: ast.ClassDef) -> bool:
    """A class of torch, a server or the import system has methods that its library calls."""
    return bool(LIBRARY_CLASSES & {ast.unparse(base) for base in node.bases})


CHOICES = {  # tables of which people name a row
    "labkit.deploy.engines.ENGINES", "labkit.storage.formats.FORMATS", "labkit.storage.formats.ROUNDED",
    "labkit.quantization.formats.FORMATS", "labkit.attention.cache.POLICIES", "labkit.pruning.scores.CRITERIA",
    "labkit.pruning.scores.UNIT_CRITERIA",
}  # fmt: skip


def test_a_row_of_a_table_is_named_somewhere():
    pages = [*NOTEBOOKS.glob("*.ipynb"), *CHECKS.glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "README.md"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    text = re.sub(r'"image/png": "[^"]*"', "", text)  # megabytes of letters and digits
    unused = []
    for path in LABKIT:
        for node in tree(path).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            table = f"{module(path)}.{getattr(target, 'id', '')}"
            if table in CHOICES:
                dicts = [part for part in ast.walk(node.value) if isinstance(part, ast.Dict)]
                rows = [key.value for part in dicts for key in part.keys if isinstance(key, ast.Constant)]
                unused += [f"{table}[{row!r}]" for row in rows if not re.search(rf"(?<![\w-]){row}(?![\w-])", text)]
    assert not unused, "\n".join(unused)


def test_an_option_has_a_caller():
    passed, many = defaultdict(set), defaultdict(int)
    for _, code in callers():
        for node in nodes(code):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                names = {keyword.arg for keyword in node.keywords}
                passed[name] |= names
                many[name] = max(many[name], len(node.args))
    keywords = {
        key.value for _, code in callers() for node in nodes(code) if isinstance(node, ast.Dict)
        for key in node.keys if isinstance(key, ast.Constant)
    }  # fmt: skip
    unused = []
    for path in LABKIT:
        for node in public(path):
            if not isinstance(node, ast.FunctionDef) or node.name in FIXED:
                continue
            arguments = node.args.posonlyargs + node.args.args
            optional = arguments[len(arguments) - len(node.args.defaults) :] if node.args.defaults else []
            positions = {argument.arg: place for place, argument in enumerate(arguments)}
            for argument in [
                *optional,
                *(a for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d),
            ]:
                direct = argument.arg in passed[node.name] or positions.get(argument.arg, 99) < many[node.name]
                spread = None in passed[node.name] and argument.arg in keywords
                if not direct and not spread:
                    unused.append(f"{module(path)}.{node.name}({argument.arg}=)")
    assert not unused, "\n".join(unused)


@pytest.mark.parametrize("path", PRODUCT, ids=module)
def test_a_file_says_what_it_is_for(path: Path):
    assert ast.get_docstring(tree(path)) or not path.read_text().strip()

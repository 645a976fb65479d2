"""Generate pages of the docs site: README and the like, the YAML reference, the API.

mkdocs runs this (gen-files). It imports nothing of the package: it parses options and their
comments as text, and mkdocstrings does so with docstrings.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import mkdocs_gen_files
from markdown.extensions.toc import slugify

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CONFIGS = ROOT / "softmask_plugin", ROOT / "lavis_configs"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "softmask_plugin/config/options.py": "yaml/options.md",
    "softmask_plugin/config/run_options.py": "yaml/run.md",
}
YAML = {  # heading and purpose of the page for each folder of YAML files
    "models": ("Models", "`model.arch` and `model.model_type` choose one for its defaults."),
    "datasets": ("Data sets", "Each section of `datasets:` starts from these defaults."),
    "projects": ("Projects", "For `--cfg-path`."),
    "ablation": ("Plans", "For `softmask ablate --plan`."),
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Write all pages."""
    for source, page in PAGES.items():
        if source.endswith(".md"):
            write(page, with_site_links(ROOT / source))
    for guide in (ROOT / "docs").glob("*.md"):
        write(guide.name, with_site_links(guide))
    write("yaml/options.md", options_page())
    write("yaml/run.md", run_page())
    for folder, (heading, purpose) in YAML.items():
        write(f"yaml/{folder}.md", yaml_page(folder, heading, purpose))
    write("api/index.md", api_index())
    for module in modules():
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        write(api_page(module), f"# `{name}`\n\n::: {name}\n")


def write(page: str, text: str) -> None:
    """Add a page to the site."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def with_site_links(file: Path) -> str:
    """Markdown of a file, with links to the site's pages; other files of the repository lose their
    link."""

    def moved(match: re.Match[str]) -> str:
        picture, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target:
            return match[0]
        page = page_of((file.parent / target).resolve())
        return label if page is None else f"{picture}[{label}]({page}{anchor})"

    return LINK.sub(moved, file.read_text("utf-8"))


def page_of(file: Path) -> str | None:
    """The page of the site, if any, that shows a file or folder of the repository."""
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/") and file.is_file():
        return name.removeprefix("docs/")
    if name.startswith("lavis_configs/"):
        page = f"yaml/{name.split('/')[1]}.md"
        return page if file.is_dir() else f"{page}#{slugify(name, '-')}"
    if file.is_dir() and (file / "__init__.py").is_file():
        return f"api/index.md#{slugify(room(file / '__init__.py'), '-')}"
    return api_page(file) if file in modules() else None


def modules() -> list[Path]:
    """Python files with an API to show."""
    found = sorted(PACKAGE.rglob("*.py"))
    return [path for path in found if not path.stem.startswith("_") and "assets" not in path.parts]


def api_page(module: Path) -> str:
    """The page of a module."""
    return "api/" + "/".join(module.relative_to(PACKAGE).with_suffix(".md").parts)


def api_index() -> str:
    """All modules by package, with what each holds."""
    parts = ["# API"]
    for name, group in groupby(sorted(modules(), key=room), room):
        files = list(group)
        parts += [f"## `{name}`", summary(files[0].parent / "__init__.py")]
        rows = [f"- [`{m.stem}`]({api_page(m).removeprefix('api/')}): {summary(m)}" for m in files]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def room(module: Path) -> str:
    """Dotted name of the package that holds a module."""
    return ".".join(module.parent.relative_to(ROOT).parts)


def summary(module: Path) -> str:
    """First paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text("utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def options_page() -> str:
    """Every option of every model, from the dataclasses and their comments."""
    lines = (PACKAGE / "config" / "options.py").read_text("utf-8").splitlines()
    parts = [
        "# Options of the models",
        "The `model:` section of a YAML, or `--options model.<key>=<value>`. A model has the "
        "options of its own class and of those that it is based on.",
    ]
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(section_link(base) for base in node.bases)
            parts.append(f"## {node.name}" + (f"\n\nBased on {bases}." if bases else ""))
            parts.append((ast.get_docstring(node) or "").replace("``", "`"))
            parts.append(table(fields(node, lines)))
    return "\n\n".join(parts) + "\n"


def run_page() -> str:
    """Every key of a run, from the table of them and the comments that divide it."""
    source = (PACKAGE / "config" / "run_options.py").read_text("utf-8")
    (keys,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
    )
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, entry in zip(keys.keys, keys.values, strict=True):
        above = source.splitlines()[key.lineno - 2].strip()
        if above.startswith("# "):
            rows = sections[above[2:]] = []
        default, meaning = entry.args[:2]
        rows.append((key.value, literal(default), ast.literal_eval(meaning)))
    parts = [
        "# Options of a run",
        "The `run:` section of a YAML, or `--options run.<key>=<value>`. Other keys are errors, "
        "unless the task is one of LAVIS's for reading comprehension, or the task or runner comes "
        "from another package: these may read keys of their own.",
        *(f"## {heading}\n\n{table(rows)}" for heading, rows in sections.items()),
    ]
    return "\n\n".join(parts) + "\n"


def table(rows: Iterable[tuple[str, str, str]]) -> str:
    """Keys, defaults and meanings; nothing where there are none."""
    lines = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in rows]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *lines]) if lines else ""


def fields(node: ast.ClassDef, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Rows for a dataclass's fields."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and field.value is not None:
            default = field_default(field.annotation, field.value)
            meaning = "; ".join(filter(None, [comment(field, lines), field_range(field.value)]))
            yield ast.unparse(field.target), default, meaning


def field_default(kind: ast.expr, value: ast.expr) -> str:
    """A field's default; of a section, where its own are, and those that are others here."""
    if not isinstance(value, ast.Call):
        return literal(value)
    if value.args:  # ranged(default, ...) or choice(default, ...)
        return literal(value.args[0])
    # field(default_factory=Class, or lambda: Class(key=other), or lambda: [a list])
    factory = value.keywords[0].value
    if isinstance(factory, ast.Lambda) and isinstance(factory.body, ast.List):
        return literal(factory.body)
    others = factory.body.keywords if isinstance(factory, ast.Lambda) else []
    return ", ".join(
        [section_link(kind), *(f"`{each.arg}`: {literal(each.value)}" for each in others)]
    )


def field_range(value: ast.expr) -> str:
    """The values that a field takes, from ``ranged`` or ``choice``; "" for other fields."""
    if not isinstance(value, ast.Call) or not value.args:
        return ""
    if ast.unparse(value.func) == "choice":
        return ", ".join(literal(each) for each in value.args)
    low, *high = map(literal, value.args[1:])
    return f"{low} to {high[0]}" if high else f"at least {low}"


def literal(value: ast.expr) -> str:
    """A default as YAML has it; of a constant that is none, its name."""
    if isinstance(value, ast.Name):
        return value.id.lower().replace("_", " ")
    return f"`{json.dumps(ast.literal_eval(value))}`"


def section_link(name: ast.expr) -> str:
    """A link to where the page has a dataclass."""
    return f"[{ast.unparse(name)}](#{ast.unparse(name).lower()})"


def comment(field: ast.AnnAssign, lines: list[str]) -> str:
    """The comment behind a field and in the lines that go on with it."""
    last = field.end_lineno or field.lineno
    words = [lines[last - 1][field.end_col_offset or 0 :].partition("#")[2]]
    for line in lines[last:]:
        if not line.strip().startswith("#") or not words[0]:
            break
        words.append(line.strip().lstrip("#"))
    return " ".join(word.strip() for word in words).replace("|", "\\|").strip()


def yaml_page(folder: str, heading: str, purpose: str) -> str:
    """The YAML files of a folder; their comments describe their keys."""
    parts = [f"# {heading}", f"{purpose} The comments are the reference."]
    for file in sorted((CONFIGS / folder).rglob("*.yaml")):
        text = file.read_text("utf-8").rstrip()
        parts.append(f"## {file.relative_to(ROOT).as_posix()}\n\n```yaml\n{text}\n```")
    return "\n\n".join(parts) + "\n"


main()

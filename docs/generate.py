"""Pages of the site that are made of the repository: README and the like, YAML reference, API.

Run by mkdocs (gen-files), with the repository's root as its folder. Nothing of the package is
imported: options and their comments are read as text, docstrings by mkdocstrings.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CONFIGS = ROOT / "softmask_plugin", ROOT / "lavis_configs"
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def main() -> None:
    """Write all pages."""
    for source, page in PAGES.items():
        write(page, at_home(ROOT / source))
    for guide in (ROOT / "docs").glob("*.md"):
        write(guide.name, at_home(guide))
    write("yaml/options.md", options_page())
    write("yaml/run.md", run_page())
    write("yaml/models.md", yaml_page("Models", "models", "of `model.arch` and `model.model_type`"))
    write("yaml/datasets.md", yaml_page("Data sets", "datasets", "of `datasets:`, with defaults"))
    write("yaml/projects.md", yaml_page("Projects", "projects", "for `--cfg-path`"))
    write("yaml/ablation.md", yaml_page("Plans", "ablation", "for `softmask ablate --plan`"))
    for module in modules():
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        write(api_page(module), f"# `{name}`\n\n::: {name}\n")
    rows = [f"- [{title(module)}]({api_page(module).removeprefix('api/')})" for module in modules()]
    write("api/index.md", "# API\n\n" + "\n".join(rows) + "\n")


def write(page: str, text: str) -> None:
    """Put a page into the site."""
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def at_home(file: Path) -> str:
    """A Markdown file of the repository, its links leading to pages of the site or, where the site
    does not have what they name, gone."""

    def moved(match: re.Match[str]) -> str:
        picture, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target:
            return match[0]
        found = (file.parent / target).resolve()
        page = page_of(found)
        return label if page is None else f"{picture}[{label}]({page}{anchor})"

    return LINK.sub(moved, file.read_text("utf-8"))


def page_of(file: Path) -> str | None:
    """Where the site has a file of the repository; None: nowhere."""
    if file.parent == ROOT and file.name in PAGES:
        return PAGES[file.name]
    if file.is_relative_to(ROOT / "docs") and file.is_file():
        return file.relative_to(ROOT / "docs").as_posix()
    return api_page(file) if file in modules() else None


def modules() -> list[Path]:
    """Python files with an API to show."""
    found = sorted(PACKAGE.rglob("*.py"))
    return [path for path in found if not path.stem.startswith("_") and "assets" not in path.parts]


def api_page(module: Path) -> str:
    """Where a module's page is."""
    return "api/" + "/".join(module.relative_to(PACKAGE).with_suffix(".md").parts)


def title(module: Path) -> str:
    """A module's name and the first line of its docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text("utf-8"))) or ""
    name = ".".join(module.relative_to(PACKAGE).with_suffix("").parts)
    return f"`{name}`: {docstring.splitlines()[0] if docstring else ''}"


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
    lines = (PACKAGE / "config" / "run_options.py").read_text("utf-8").splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ClassDef) and node.name == "RerankOptions":
            sections["Retrieval"] = [*fields(node, lines)]
    parts = [
        "# Options of a run",
        "The `run:` section of a YAML, or `--options run.<key>=<value>`. Other keys are errors, "
        "unless a task or runner of another package may read them.",
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
            yield ast.unparse(field.target), default, comment(field, lines)


def field_default(kind: ast.expr, value: ast.expr) -> str:
    """A field's default; of a section, where its own are, and those that are others here."""
    if not isinstance(value, ast.Call):
        return literal(value)
    factory = value.keywords[0].value  # field(default_factory=Class, or lambda: Class(key=other))
    others = factory.body.keywords if isinstance(factory, ast.Lambda) else []
    return ", ".join(
        [section_link(kind), *(f"`{each.arg}`: {literal(each.value)}" for each in others)]
    )


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


def yaml_page(heading: str, folder: str, what: str) -> str:
    """The YAML files of a folder, which describe their own keys."""
    parts = [f"# {heading}", f"YAML files {what}. Their comments are the reference."]
    for file in sorted((CONFIGS / folder).rglob("*.yaml")):
        text = file.read_text("utf-8").rstrip()
        parts.append(f"## {file.relative_to(CONFIGS.parent).as_posix()}\n\n```yaml\n{text}\n```")
    return "\n\n".join(parts) + "\n"


main()

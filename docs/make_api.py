"""Writes docs/api.md from the docstrings of what is public: `python docs/make_api.py`."""

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import mbv2
from mbv2 import kernels
from mbv2.files import write_atomic

PAGE = Path(__file__).with_name("api.md")
_HEAD = """# API reference

Made from the docstrings by `python docs/make_api.py`; change those, not this file.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    for module in (mbv2, kernels, kernels.staged):
        parts.append(f"## `{module.__name__}`\n\n{_text(inspect.getdoc(module) or '')}\n")
        parts += [_entry(module, name) for name in _names(module)]
    return "\n".join(parts)


def _names(module: ModuleType) -> list[str]:
    public = getattr(module, "__all__", None)
    if public is None:
        public = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__
        ]
    return sorted((name for name in public if not inspect.ismodule(getattr(module, name))), key=str.lower)


def _entry(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    if not callable(value):
        return f"### `{name}`\n\nA `{type(value).__name__}` with {len(value)} entries.\n"
    lines = [f"### `{name}{_signature(value)}`", "", _text(inspect.getdoc(value) or ""), ""]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if not method.startswith("_") and callable(getattr(value, method)) and inspect.getdoc(function):
                function = getattr(value, method)
                lines += [
                    f"#### `{name}.{method}{_signature(function)}`",
                    "",
                    _text(inspect.getdoc(function) or ""),
                    "",
                ]
    return "\n".join(lines)


def _signature(value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, Exception):
        return ""
    text = str(inspect.signature(value))
    # Where a name comes from is clutter here, and addresses of objects differ from run to run.
    text = re.sub(r"\b(?:[a-z_]\w*\.)+([A-Z]\w*)", r"\1", text).replace("'", "")
    return re.sub(r"<(\w+)[^>]*>", r"\1", text)


def _text(doc: str) -> str:
    """A docstring as Markdown: its sections as lists, indented code as code."""
    out: list[str] = []
    section = ""
    for line in doc.splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Attributes|Yields):", line.strip())
        if heading and not line.startswith(" "):
            section = heading.group(1)
            out += [f"**{section}**", ""]
        elif section and line.startswith("    ") and not line.startswith("     "):
            item = re.match(r"    ([\w, *]+): (.*)", line)
            out.append(f"* `{item.group(1)}`: {item.group(2)}" if item else f"* {line.strip()}")
        elif section and line.strip():
            out.append(f"  {line.strip()}")
        else:
            section = section if line.strip() == "" else ""
            out.append(line)
    return "\n".join(out).strip()


def main() -> None:
    """Write the page."""
    write_atomic(PAGE, page().encode())


if __name__ == "__main__":
    main()

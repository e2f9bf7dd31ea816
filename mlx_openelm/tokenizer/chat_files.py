"""The files of a directory that hold its chat templates.

Source: transformers 5, `utils/chat_template_utils.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import find_in, read_json, read_text, shown

MAX_TEMPLATE = 1 << 20
"""Bytes of a template file."""
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"
LEGACY_FILE = "chat_template.json"


def template_files(directory: Path) -> dict[str, Path]:
    """The files of a directory that hold nothing but chat templates, by their relative names.

    Raises:
        InputError: when one is a link to somewhere outside the directory.
    """
    found = {}
    for name in (TEMPLATE_FILE, LEGACY_FILE):
        if path := find_in(directory, name):
            found[name] = path
    folder = find_in(directory, TEMPLATE_DIRECTORY)
    if folder is not None and folder.is_dir():
        for entry in sorted(folder.iterdir()):
            name = f"{TEMPLATE_DIRECTORY}/{entry.name}"
            if entry.suffix == ".jinja" and (path := find_in(directory, name)):
                found[name] = path
    return found


def read_chat_template(directory: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """A directory's template, or its templates by name, or None.

    Template files come before the one in `settings`, from `tokenizer_config.json`, as in
    transformers. `chat_template.json`, which transformers reads for processors, comes last.

    Raises:
        InputError: when a file can't be read, or a template isn't text.
    """
    files = template_files(directory)
    legacy = files.pop(LEGACY_FILE, None)
    texts = {
        "default" if name == TEMPLATE_FILE else path.stem: read_text(path, MAX_TEMPLATE)
        for name, path in files.items()
    }
    if texts:
        return texts["default"] if texts.keys() == {"default"} else texts
    where = str(directory / "tokenizer_config.json")
    template = settings.get("chat_template")
    if template is None and legacy is not None:
        where = str(legacy)
        template = read_json(legacy, MAX_TEMPLATE).get("chat_template")
    return _checked_template(template, where)


def named_templates(template: str | Mapping[str, str]) -> dict[str, str]:
    """The files that hold a template, or several by name: the inverse of `read_chat_template`.

    Raises:
        InputError: when a name can't be a file's.
    """
    texts = {"default": template} if isinstance(template, str) else template
    for name in texts:
        if not name or name.startswith(".") or "/" in name or not name.isprintable():
            raise InputError(f"chat template {shown(name)}: its name can't be a file's")
    return {
        TEMPLATE_FILE if name == "default" else f"{TEMPLATE_DIRECTORY}/{name}.jinja": text
        for name, text in texts.items()
    }


def _checked_template(template: object, where: str) -> str | dict[str, str] | None:
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict) and all(
        isinstance(name, str) and isinstance(text, str) for name, text in template.items()
    ):
        return template
    raise InputError(f"{where}: chat_template is neither a text nor a list of named texts")

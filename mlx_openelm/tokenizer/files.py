"""The tokenizer files of a model directory: found, carried to another, and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import check_token_ids, token_ids
from ..errors import InputError
from ..files import file_size, find_in, read_bytes, read_json, without_bom
from .added_tokens import content, declared, read_token
from .chat import CHAT_TEMPLATE
from .chat_files import TEMPLATE_FILE, named_templates, read_chat_template, template_files
from .sentencepiece_model import parse_sentencepiece, to_tokenizer_json, why_no_tokenizer_json
from .vocabulary import added_to_sentencepiece, read_sentencepiece

MODEL, JSON, CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
CARRIED = (MODEL, JSON, CONFIG, SPECIAL, ADDED)
GENERATION = "generation_config.json"


def tokenizer_file(directory: Path) -> Path | None:
    """The directory's `tokenizer.json`, else its `tokenizer.model`, else None.

    This is transformers' order: a `tokenizer.model` beside a `tokenizer.json` may lack the added
    tokens.

    Raises:
        InputError: when it is not a regular file, or a link to somewhere outside the directory.
    """
    for name in (JSON, MODEL):
        if path := find_in(directory, name):
            file_size(path)
            return path
    return None


def find_tokenizer(directory: Path) -> Path:
    """As `tokenizer_file`, for a directory that must have a tokenizer.

    Raises:
        InputError: as `tokenizer_file`, and when there is none.
    """
    if path := tokenizer_file(directory):
        return path
    raise InputError(
        f"{directory}: no tokenizer.model or tokenizer.json; "
        "OpenELM uses LLaMA's tokenizer: name one with --tokenizer PATH_OR_REPO"
    )


def read_optional(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a directory; empty: there is no such file.

    Raises:
        InputError: when it can't be read.
    """
    path = find_in(directory, name)
    return {} if path is None else read_json(path)


def first_template(directories: Iterable[Path]) -> str | dict[str, str] | None:
    """The chat template, or the templates by name, of the first directory that has one.

    Raises:
        InputError: when a file can't be read, or a template isn't text.
    """
    for directory in directories:
        template = read_chat_template(directory, read_optional(directory, CONFIG))
        if template is not None:
            return template
    return None


def end_ids(own: int, model: Path | None, adapter: Path | None = None) -> set[int]:
    """The ids that end a text: the tokenizer's own EOS, and those that a model's directory adds.

    It adds those in `generation_config.json`, else those in `config.json`, as in mlx-lm. That of
    an adapter's directory takes the place of the model's `generation_config.json`.

    Raises:
        InputError: when a file can't be read, or its `eos_token_id` holds no ids.
    """
    if model is None:
        return {own}
    adapted = adapter is not None and find_in(adapter, GENERATION) is not None
    generation = adapter if adapter is not None and adapted else model
    for directory, name in ((generation, GENERATION), (model, "config.json")):
        found = read_optional(directory, name).get("eos_token_id")
        if found is not None:
            try:
                return {own, *token_ids(check_token_ids("eos_token_id", found))}
            except InputError as error:
                raise InputError(f"{directory / name}: {error}") from None
    return {own}


def carried_files(source: Path) -> dict[str, Path]:
    """The files that say how text becomes ids and conversations become text, by relative name.

    `source` is a directory, or a file that stands for itself.

    Raises:
        InputError: when one is a link to somewhere outside the directory.
    """
    if not source.is_dir():
        return {JSON if source.suffix == ".json" else MODEL: source}
    found = {name: path for name in CARRIED if (path := find_in(source, name))}
    return found | template_files(source)


def carry_tokenizer(source: Path, directory: Path) -> None:
    """Copy a tokenizer's files into `directory`; texts without their byte order marks.

    Raises:
        InputError: when one can't be read.
    """
    for name, path in carried_files(source).items():
        copy_file(path, directory / name)


def carry_generation_config(source: Path, directory: Path) -> None:
    """Copy a model directory's `generation_config.json`, if it has one.

    Raises:
        InputError: when it can't be read.
    """
    if source.is_dir() and (path := find_in(source, GENERATION)):
        copy_file(path, directory / GENERATION)


def copy_file(path: Path, target: Path) -> None:
    """Write a small file's bytes to `target`, but for a text's byte order mark.

    Raises:
        InputError: when `path` can't be read.
    """
    data = read_bytes(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data if target.name == MODEL else without_bom(data, str(path)))


def write_tokenizer_files(
    source: Path,
    directory: Path,
    chat: bool,
    template: str | Mapping[str, str] | None = None,
) -> str | None:
    """Write a tokenizer into a model directory, for us and for the rest of the MLX world.

    `source` is a directory with a tokenizer, or its file. Its files are carried byte for byte,
    texts without their byte order marks. What transformers, and so mlx-lm, needs and `source`
    lacks is added: a `tokenizer.json` that equals the `tokenizer.model`, a
    `tokenizer_config.json` that makes transformers take it as it is, and with `chat` the chat
    template of the OpenELM Instruct models, where there is none. A `template`, or several by
    their names, takes the place of the source's. The same source always gives the same bytes.

    Returns None, or the reason why there is no `tokenizer.json`: some SentencePiece models have
    no equal there. `load_tokenizer` can use such a directory; mlx-lm would find other ids.

    Raises:
        InputError: when a file can't be read or used, or there is no BOS or EOS token.
    """
    files = carried_files(source)
    settings = read_json(files[CONFIG]) if CONFIG in files else {}
    root = source if source.is_dir() else None
    has_template = root is not None and read_chat_template(root, settings) is not None
    made: dict[str, Any] = {}
    if template is not None:
        has_template = True
        replaced = template_files(root) if root is not None else {}
        files = {name: path for name, path in files.items() if name not in replaced}
        made = named_templates(template)
    reason = None
    if JSON not in files:
        if MODEL not in files:
            raise InputError(f"{source}: no tokenizer.model or tokenizer.json")
        more, reason = _from_model(files, settings)
        made |= more
    elif CONFIG not in files:
        made[CONFIG] = _configuration(_named_in_json(files[JSON]))
    if chat and not has_template:
        if CONFIG in made:
            made[CONFIG]["chat_template"] = CHAT_TEMPLATE
        else:
            made[TEMPLATE_FILE] = CHAT_TEMPLATE
    for name, path in files.items():
        if name not in made:
            copy_file(path, directory / name)
    for name, value in made.items():
        if isinstance(value, str):
            file = directory / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(value, encoding="utf-8", newline="")
        else:
            _write_json(directory / name, value)
    return reason


def _from_model(
    files: Mapping[str, Path], settings: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """`tokenizer.json` and `tokenizer_config.json` for a SentencePiece model."""
    file = files[MODEL]
    data, processor = read_sentencepiece(file)
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise InputError(f"{file}: has no BOS or no EOS token; OpenELM needs both")
    model = parse_sentencepiece(data, str(file))
    names = {"bos_token": model.bos_id, "eos_token": model.eos_id, "unk_token": model.unk_id}
    found = declared(settings, str(file.parent / CONFIG), *_older(files))
    named = {
        **{name: model.pieces[i].text for name, i in names.items() if i >= 0},
        **{name: text for name, token in found.named.items() if (text := content(token))},
    }
    # Without it transformers would build the class's own tokenizer from the vocabulary
    configuration = {**settings, **_configuration(named)}
    reason = why_no_tokenizer_json(model)
    if reason is not None:
        return {CONFIG: configuration}, reason
    bos = settings.get("add_bos_token", True) is not False
    eos = settings.get("add_eos_token", False) is True
    values = to_tokenizer_json(model, bos, eos)
    plain = values["added_tokens"]
    values["added_tokens"] = added_to_sentencepiece(values, found, str(file))
    if values["added_tokens"] != plain or "added_tokens_decoder" in settings:
        configuration["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in values["added_tokens"]
        }
    return {JSON: values, CONFIG: configuration}, None


def _older(files: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    special, added = (read_json(files[n]) if n in files else {} for n in (SPECIAL, ADDED))
    return special, added


def _configuration(named: Mapping[str, str]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
    }


def _named_in_json(file: Path) -> dict[str, str]:
    """BOS, EOS and unknown token of a `tokenizer.json` that nothing else names."""
    added = read_json(file).get("added_tokens") or []
    contents = {read_token(token, str(file)).content for token in added}
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return {name: text for name, text in usual.items() if text in contents}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    file.write_text(text + "\n", encoding="utf-8")

"""Writes what stands beside the weights in a model folder: settings, generation config, and the model's own code."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json as `save_pretrained` does, readable by transformers 4 as well, generation_config.json, and the
    code files that config.json names."""
    from transformers.dynamic_module_utils import custom_object_save

    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)  # type: ignore[arg-type]  # settings are allowed
    model.config.save_pretrained(folder)
    _copy_code(model.config, folder)
    _add_older_keys(model.config, folder / "config.json")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _copy_code(settings: PretrainedConfig, folder: Path) -> None:
    """Copy the code files that auto_map names, and those that they import, from the model's own folder."""
    source = Path(settings.name_or_path or "").expanduser()
    if not source.is_dir():
        return
    for name in _code_files(getattr(settings, "auto_map", None) or {}, source):
        if not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def _code_files(auto_map: dict[str, Any], source: Path) -> Iterator[str]:
    from transformers.dynamic_module_utils import get_relative_import_files

    named = [part for value in auto_map.values() for part in (value if isinstance(value, (list, tuple)) else [value])]
    for module in dict.fromkeys(str(part).rpartition("--")[2].split(".")[0] for part in named if part):
        file = source / f"{module}.py"
        if file.is_file():
            yield file.name
            yield from (Path(each).name for each in get_relative_import_files(str(file)))


def _add_older_keys(settings: PretrainedConfig, file: Path) -> None:
    """Add the keys of rotary embeddings that transformers 4 reads: it ignores `rope_parameters`, and would silently
    take the default base.

    Nothing is added where the settings would not be read back as they are.
    """
    written = json.loads(file.read_text(encoding="utf-8"))
    with_older = copy.deepcopy(written)
    for part in _parts(with_older):
        if isinstance(rope := part.get("rope_parameters"), dict):
            older = _older_rope(rope, str(part.get("model_type")))
            part |= {key: value for key, value in older.items() if key not in part}
    read_back = type(settings).from_dict(copy.deepcopy(with_older)).to_dict()
    ropes = [[part.get("rope_parameters") for part in _parts(each)] for each in (settings.to_dict(), read_back)]
    if ropes[0] == ropes[1]:
        file.write_text(json.dumps(with_older, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _parts(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings, and those of the model's parts."""
    inner = (value for key, value in settings.items() if key.endswith("_config") and isinstance(value, dict))
    return [settings, *inner]


def _older_rope(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """rope_parameters in the words of transformers 4."""
    local = rope.get("sliding_attention")
    flat = rope.get("full_attention", rope)
    base, part = ("rotary_emb_base", "rotary_pct") if "gpt_neox" in model_type else _OLDER_NAMES
    older = {base: flat.get("rope_theta"), part: flat.get("partial_rotary_factor")}
    if isinstance(local, dict):
        older["rope_local_base_freq"] = local.get("rope_theta")
    if flat.get("rope_type", "default") != "default":
        older["rope_scaling"] = {key: value for key, value in flat.items() if key not in _OLDER_NAMES}
    return {key: value for key, value in older.items() if value is not None}


_OLDER_NAMES = ("rope_theta", "partial_rotary_factor")

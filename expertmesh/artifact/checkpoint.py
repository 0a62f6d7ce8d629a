"""A Hugging Face checkpoint directory on disk: its config, its tensors and the files that go with them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmesh.artifact.tensorfile import TensorEntry, read_entries
from expertmesh.errors import ArtifactError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COPIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".md"})
COPIED_DIRECTORIES = ("additional_chat_templates",)
COPIED_NAMES = ("LICENSE", "NOTICE")


@dataclass(frozen=True)
class Checkpoint:
    directory: Path
    config: dict[str, Any]
    """config.json as it stands."""
    tensors: dict[str, TensorEntry]
    """Where each tensor is; every file was found whole."""

    @property
    def where(self) -> str:
        return str(self.directory)

    def side_files(self) -> list[Path]:
        """What an engine reads beside weights and config (tokenizer, chat template, generation config), relative.

        Never pickles or code.
        """
        found = [path for path in self.directory.iterdir() if path.is_file() and _is_copied(path)]
        for name in COPIED_DIRECTORIES:
            found += [path for path in (self.directory / name).glob("*") if path.is_file() and _is_copied(path)]
        return sorted(path.relative_to(self.directory) for path in found)

    def digest(self) -> str:
        """Of the name, size and time of every file that `prepare` reads: another digest, another source."""
        weights = {entry.path.relative_to(self.directory) for entry in self.tensors.values()}
        rows = []
        for name in sorted({*weights, *self.side_files(), Path(CONFIG_FILE)}):
            status = (self.directory / name).stat()
            rows.append([str(name), status.st_size, status.st_mtime_ns])
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def open_checkpoint(directory: Path) -> Checkpoint:
    """Raises ArtifactError where files lack or are damaged, or where the weights are quantised."""
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such directory")
    config = _read_json(directory / CONFIG_FILE)
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if section.get(key):
                method = section[key].get("quant_method", "unknown") if isinstance(section[key], dict) else "unknown"
                raise ArtifactError(
                    f"{directory / CONFIG_FILE}: {key} says {method}: quantised checkpoints are not supported yet"
                )
    return Checkpoint(directory, config, _read_tensors(directory))


def _read_tensors(directory: Path) -> dict[str, TensorEntry]:
    index = directory / INDEX_FILE
    if not index.is_file():
        if (directory / WEIGHTS_FILE).is_file():
            return read_entries(directory / WEIGHTS_FILE)
        pickled = next(iter(sorted(directory.glob("*.bin"))), None)
        hint = f"; {pickled.name} is a pickle, which is never opened" if pickled else ""
        raise ArtifactError(f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: no weight_map")
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard:
            raise ArtifactError(f"{index}: {shard} is not the name of a file beside it")
        if not (directory / shard).is_file():
            raise ArtifactError(f"{directory / shard}: missing, though {INDEX_FILE} names it")
        shards[shard] = read_entries(directory / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ArtifactError(f"{directory / shard}: {name} is not in it, though {INDEX_FILE} says so")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: not a JSON object")
    return value


def _is_copied(path: Path) -> bool:
    if path.name.startswith(".") or path.name == CONFIG_FILE or path.name.endswith(".index.json"):
        return False
    return path.suffix in COPIED_SUFFIXES or path.name.startswith(COPIED_NAMES)

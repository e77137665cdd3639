"""What a checkpoint folder from somewhere may not do: bring code, bring pickles, name files outside itself. See SECURITY.md."""

import json
from pathlib import Path


def check_folder(folder: Path) -> None:
    """Raise ValueError, with the mend, for a folder whose loading could run code or reach outside the folder."""
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        if "auto_map" in _read(folder / name):
            raise ValueError(f"{folder / name} asks to run code of its own (auto_map), which minigrpo never does: remove that entry if "
                             "the model is a plain Qwen3-VL")
    index = _read(folder / "model.safetensors.index.json")
    shards = index.get("weight_map", {})
    names = set(shards.values()) if isinstance(shards, dict) and all(isinstance(x, str) for x in shards.values()) else {"no weight_map"}
    for name in sorted(names):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / 'model.safetensors.index.json'} names {name!r}, which is no safetensors file of the folder: fetch "
                             "the checkpoint again, from its authors")
    if not any(folder.glob("*.safetensors")):
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
        raise ValueError(f"{folder} holds no safetensors" + (f"; {pickled[0]} is a pickle, which can run any code when it is read: have it "
                         "converted to safetensors where you trust it" if pickled else ": its weights are missing"))


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object: fetch the checkpoint again")
    return found

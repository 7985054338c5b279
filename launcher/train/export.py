"""The part of ``ftlaunch export`` that needs torch: merging, casting, joining a checkpoint. ``launcher.export`` starts it."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.errors import MissingError
from launcher.serve import Say, serve


def export(request: dict[str, Any], say: Say) -> dict[str, Any]:
    """``source``: a final model's folder or a checkpoint's; ``base``: the staged model; ``folder``: what is written;
    ``trained_dtype``: of a checkpoint's weights.

    Errors: MissingError when this interpreter lacks a package, RunFailed when the files do not go together.
    """
    adapter, merging = request["adapter"], request["merge"]
    further = [] if adapter is None else ["peft"] if not merging else ["bitsandbytes"] if adapter["kind"] == "qlora" else []
    _require(["torch", "safetensors", "transformers", *further])
    from launcher.train import assemble

    source, base, folder, dtype = Path(request["source"]), Path(request["base"]), Path(request["folder"]), request["dtype"]
    trained_dtype = request["trained_dtype"] if request["is_checkpoint"] else None
    if adapter is None:
        say(f"writing the weights of {source} in {dtype or 'the dtype that they have'}")
        config = base if request["is_checkpoint"] else source
        with assemble.open_model(source) as files:
            assemble.write_model(folder, assemble.each(files, dtype), config, dtype or trained_dtype)
        return {}
    if not merging:
        say(f"writing the adapter of {source}")
        assemble.write_adapter(folder, source, adapter, base)
        return {}
    from launcher.train.merge import merged, prepare_merge

    say(f"merging the {adapter['kind']} adapter of {source} into {base}")
    tensors = assemble.adapter_of_checkpoint(source) if request["is_checkpoint"] else assemble.adapter_of_model(source)
    assemble.write_model(folder, merged(prepare_merge(adapter, tensors, base), base, dtype), base, dtype)
    return {}


def _require(packages: list[str]) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        hint = "pip install 'ftlaunch[train]', or export where the run's image is"
        raise MissingError(f"{sys.executable} has no {', '.join(missing)}", code="missing-package", hint=hint)


if __name__ == "__main__":
    sys.exit(serve(export, "the export"))

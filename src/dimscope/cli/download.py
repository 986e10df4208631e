"""The command that downloads a model whole, for a machine or a queue without a connection to the hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dimscope.cli.options import Common, announce
from dimscope.cli.terminal import Output
from dimscope.errors import InvalidArgument
from dimscope.storage import whole_file
from dimscope.units import readable_bytes


@Parameter(name="*")
@dataclass(frozen=True)
class DownloadOptions:
    """Options of the download."""

    revision: str | None = None
    "Branch, tag or commit of the model."
    json: Annotated[bool, Parameter(negative=())] = False
    "Print JSON, and nothing else, on standard output."
    out: Annotated[Path | None, Parameter(alias="-o")] = None
    "Folder to copy the files to, for a machine that does not share the cache; its path is then the MODEL."
    allow_pickle: Annotated[bool, Parameter(negative=())] = False
    "Download pickle weights where there are no others. They can run code on this machine when loaded."
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False
    "Run the Python code that comes with the model. It can do anything that you can."


DEFAULTS = DownloadOptions()


def download(model: str, /, *, options: DownloadOptions = DEFAULTS) -> None:
    """Download the files of a model that dimscope reads into the cache of the hub: config, tokenizer, code and one set of weights.

    Every command then takes the model by its name without a connection, for example with HF_HUB_OFFLINE=1.

    Example: `dimscope download Qwen/Qwen2.5-0.5B`
    """
    common = Common(
        revision=options.revision,
        json=options.json,
        out=options.out,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
    )
    checkpoint = common.open(model)
    from dimscope.checkpoints.hub import HubRepository

    source = checkpoint.source
    if not isinstance(source, HubRepository):
        raise InvalidArgument(f"{model}: this model is on this machine; download takes a hub id (owner/name)")
    files = sorted({info.file for info in checkpoint.tensors.values()} | set(source.small_files))
    n_bytes = sum(source.size(file) for file in files)
    announce(f"{model}: {len(files)} files, {readable_bytes(n_bytes)}, at commit {source.revision}")
    folder = source.folder(files)
    if options.out is not None:
        folder = options.out
        for file in files:
            with whole_file(folder / file) as path:
                shutil.copyfile(source.fetch(file), path)
    facts = {
        "model": model,
        "revision": source.revision,
        "folder": folder,
        "n_files": len(files),
        "n_bytes": n_bytes,
    }
    use = f"dimscope inspect {model}" if options.out is None else f"dimscope inspect {folder}"
    common.print(Output(facts, answer=f"{model} is complete in {folder}; without a connection: HF_HUB_OFFLINE=1 {use}"))

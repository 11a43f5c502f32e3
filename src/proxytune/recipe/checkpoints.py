"""Compares the tensors in a model's files with those that the model needs, after loading or from the headers only.

If the files lack a weight, transformers fills it at random, prints a warning and continues. Here a weight that is
missing or has another shape is an error, and so is a tensor without a place in the modules. A tensor of another part (a
vision tower, a layer for drafts) is left out, with a note.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata
from torch import Tensor, nn
from transformers.modeling_utils import load_state_dict, str_to_torch_dtype
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

__all__ = ["Fit", "find_file", "fit_of", "fit_of_gguf", "fit_of_header", "parts_of_gguf", "read_header", "whole_gguf"]

Header = dict[str, Tensor]  # tensor name -> its shape and dtype, on the meta device
SHOWN = 3  # tensors that a message names
INDEXED = ("model.safetensors", "pytorch_model.bin")  # in transformers' order: a single file, otherwise an index


@dataclass(frozen=True)
class Fit:
    """How the tensors of a checkpoint fit a model.

    Attributes:
        missing: weights that the checkpoint lacks, without tied ones.
        misshapen: weights with another shape, and both shapes.
        misplaced: tensors inside the modules of the config, but without a place in them.
        apart: tensors of other parts, which are not loaded.
    """

    missing: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    misplaced: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()

    @property
    def problem(self) -> str | None:
        """Why the checkpoint does not fit this model, as the end of a sentence that begins with the member's name."""
        if self.missing:
            return f"lacks {_listed(self.missing)}; are all its files there, and is its config its own?"
        if self.misshapen:
            return f"has {_listed(self.misshapen)}; is its config its own?"
        if self.misplaced:
            return f"has {_listed(self.misplaced)}, which its config leaves no place for; is its config its own?"
        return None

    @property
    def note(self) -> str | None:
        """Which part of the checkpoint is not used, in the same form."""
        return f"has {_listed(self.apart)} of parts that this model does not use" if self.apart else None


def _listed(tensors: Sequence[str]) -> str:
    if len(tensors) == 1:
        return f"the tensor {tensors[0]}"
    more = f" and {len(tensors) - SHOWN} more" if len(tensors) > SHOWN else ""
    return f"{len(tensors)} tensors: {', '.join(tensors[:SHOWN])}{more}"


def fit_of(model: Any, loading_info: Mapping[str, Any], header: Mapping[str, Tensor] | None = None) -> Fit:
    """How a checkpoint fits, from transformers' report on loading it (``output_loading_info=True``).

    ``header``: its tensors, if they are known. A mask or a table that older versions saved does not count as a weight.
    """
    unexpected = sorted(loading_info["unexpected_keys"])
    inside = {name: _is_inside(model, name, unexpected) for name in unexpected if not _is_constant(name, header or {})}
    return Fit(
        missing=tuple(sorted(loading_info["missing_keys"])),
        misshapen=tuple(
            _misshapen(name, found, wanted) for name, found, wanted in sorted(loading_info["mismatched_keys"])
        ),
        misplaced=tuple(name for name, is_inside in inside.items() if is_inside),
        apart=tuple(name for name, is_inside in inside.items() if is_inside is False),
    )


def _misshapen(name: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    return f"{name} of shape {list(found)} in place of {list(wanted)}"


def fit_of_header(model: Any, header: Mapping[str, Tensor]) -> Fit:
    """How the tensors in a header fit an empty model, by transformers' own renaming and converting of checkpoints."""
    with quiet_transformers():  # the caller reports errors, in one sentence
        loaded, info = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=dict(header),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map={"": "meta"},
        )
    return fit_of(loaded, info, header)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' own loading bars and warnings."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_inside(model: Any, name: str, others: Sequence[str]) -> bool | None:
    """Whether an unused tensor belongs to the modules that the config describes; None if it is a buffer.

    The module that holds the layers may have other parts that the config does not mention. A layer has none: a tensor
    of a layer, or of one more layer of the same kind, is a part of the model that would be missing.
    """
    quantized = getattr(model, "hf_quantizer", None) is not None
    answers = [_is_inside_of(root, name, others, quantized) for root in dict.fromkeys((model, model.base_model))]
    return None if None in answers else any(answers)


def _is_inside_of(root: nn.Module, name: str, others: Sequence[str], quantized: bool) -> bool | None:
    module, path, in_a_layer = root, name.split("."), False
    while len(path) > 1 and (child := module._modules.get(path[0])) is not None:
        in_a_layer = in_a_layer or isinstance(module, nn.ModuleList)
        module = child
        del path[0]
    if len(path) == 1 and (path[0] in module._buffers or (quantized and path[0] not in module._parameters)):
        return None  # a quantizer keeps scales beside its weights
    if isinstance(module, nn.ModuleList) and not in_a_layer:  # one more layer: of the same kind, or for drafts
        layer = name.removesuffix(".".join(path)) + path[0] + "."
        parts = {other.removeprefix(layer).split(".")[0] for other in others if other.startswith(layer)}
        return any(parts <= {*each._modules, *each._parameters} for each in module)
    return in_a_layer or not any(isinstance(each, nn.ModuleList) for each in module.modules())


def _is_constant(name: str, header: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is a mask or a number that older versions saved with the weights, not a weight."""
    own = header.get(name)
    if own is None:  # the model's names may have an additional prefix, or lack one
        own = next((t for other, t in header.items() if other.endswith(f".{name}") or name.endswith(f".{other}")), None)
    if own is None:
        return False
    is_mask = own.dim() >= 3 and own.shape[-1] == own.shape[-2] and own.numel() == own.shape[-1] ** 2
    return own.dim() == 0 or not own.is_floating_point() or is_mask


# -- headers --------------------------------------------------------------------------------------------------
Place = Mapping[str, Any]  # arguments of `from_pretrained` for a place, besides its path: revision, subfolder, token, …


def read_header(path: str, place: Place) -> Header | None:
    """The names, shapes and dtypes of the tensors in a directory or hub repository; no weight is read or downloaded.

    None if the files are only on the hub and their headers cannot be read there.

    Raises:
        OSError, ValueError: if a file that an index names is missing, or is not a checkpoint.
    """
    place = {**place, "local_files_only": True, "force_download": False}
    for name in INDEXED:
        if (file := find_file(path, name, place)) is not None:
            return load_state_dict(file, map_location="meta")
        if (index := find_file(path, f"{name}.index.json", place)) is None:
            continue
        header: Header = {}
        for shard in sorted(set(json.loads(Path(index).read_text())["weight_map"].values())):
            if (file := find_file(path, shard, place)) is None:
                raise FileNotFoundError(f"its index names {shard}, which is missing")
            header |= load_state_dict(file, map_location="meta")
        return header
    return _header_on_the_hub(path, place)


def find_file(path: str, name: str, place: Place) -> str | None:
    """The path of a file in a directory or, once downloaded, a hub repository; None if there is none, or offline.

    Raises:
        OSError: if the hub does not give it.
    """
    if Path(path).is_dir():
        file = Path(path) / place.get("subfolder", "") / name
        return str(file) if file.is_file() else None
    place = {key: value for key, value in place.items() if key != "gguf_file"}
    return cached_file(path, name, **place, _raise_exceptions_for_missing_entries=False)


def _header_on_the_hub(repo_id: str, place: Place) -> Header | None:
    if place.get("subfolder") or Path(repo_id).exists():
        return None  # the hub's reading of headers knows whole repositories only
    try:
        metadata = get_safetensors_metadata(repo_id, revision=place.get("revision"), token=place.get("token"))
    except Exception:  # no safetensors, no connection or no permission: nothing is known
        return None
    return {
        name: torch.empty(tuple(info.shape), dtype=str_to_torch_dtype.get(info.dtype, torch.float32), device="meta")
        for file in metadata.files_metadata.values()
        for name, info in file.tensors.items()
    }


# -- GGUF -----------------------------------------------------------------------------------------------------
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # as llama-gguf-split names them


def parts_of_gguf(file: str) -> int:
    """The number of files of a split GGUF model, from the name of one of them."""
    numbers = PART.search(file)
    return int(numbers[2]) if numbers else 1


@contextmanager
def whole_gguf(path: str, place: Place, *, with_data: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """A GGUF file in one piece, for loaders that read only one file. A split one is joined in a temporary directory.

    Yields its path and place. The given ``place`` may name any part of a split file. Without ``with_data`` the weights
    are left empty.

    Raises:
        FileNotFoundError: if a part is missing.
        ValueError: if the parts belong to different models.
    """
    n_parts = parts_of_gguf(place["gguf_file"])
    if n_parts == 1:
        yield path, dict(place)
        return
    stem = PART.sub("", place["gguf_file"])
    parts = []
    for number in range(1, n_parts + 1):
        name = f"{stem}-{number:05}-of-{n_parts:05}.gguf"
        if (part := find_file(path, name, place)) is None:
            raise FileNotFoundError(f"it is split into {n_parts} files, and {name} is missing")
        parts.append(part)
    with tempfile.TemporaryDirectory(prefix="proxytune-gguf-") as directory:
        whole = f"{Path(stem).name}.gguf"
        _merge(parts, Path(directory) / whole, with_data)
        yield directory, {"gguf_file": whole}


def _merge(parts: Sequence[str], path: Path, with_data: bool) -> None:
    """Write the tensors of all parts, and the first part's metadata, into one file."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(part) for part in parts]
    fields = readers[0].fields
    writer = GGUFWriter(str(path), fields["general.architecture"].contents(), endianess=readers[0].endianess)
    writer.data_alignment = int(readers[0].alignment)
    for name, field in fields.items():
        if name != "general.architecture" and not name.startswith(("GGUF.", "split.")):
            of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=of)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    said = fields.get("split.tensors.count")
    if said is not None and said.contents() != len(tensors):
        raise ValueError(f"its parts hold {len(tensors)} tensors, but should hold {said.contents()}")
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if with_data:
        for tensor in tensors:
            writer.write_tensor_data(tensor.data, readers[0].endianess)
    writer.close()
    if not with_data:
        with path.open("ab") as out:  # empty: a reader maps the weights without reading them
            size = sum(GGUFWriter.ggml_pad(tensor.data.nbytes, writer.data_alignment) for tensor in tensors)
            out.truncate(out.tell() + writer.data_alignment + size)


def fit_of_gguf(model: Any, path: str, place: Place) -> Fit | None:
    """How the header of a whole GGUF file fits a model, empty or loaded; None if this is not known.

    transformers' loader ignores tensors that it has no name for, and does not check shapes. For most files it uses a
    table of names, which we can read too. If it also splits or renames tensors, only loading can show how they fit.
    """
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.integrations.gguf.reader import GgufHeader
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    header = GgufHeader.from_file(str(find_file(path, place["gguf_file"], place)))
    kind = reading.TENSOR_PROCESSORS.get(header.architecture, reading.TensorProcessor)
    by_table = ("TensorProcessor", "LlamaTensorProcessor", "NemotronTensorProcessor", "Gemma2TensorProcessor")
    if is_gguf_arch_supported(header.architecture) or kind.__name__ not in by_table:
        return None
    with torch.device("meta"):  # loading has set the file's tensors, whatever their shapes
        empty = type(model)(model.config)
    names = reading.get_gguf_hf_weights_map(empty, kind(config={}))
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    tied = getattr(model, "all_tied_weights_keys", {})
    sizes = {names[info.name]: info.shape for info in header.tensors if info.name in names}
    return Fit(
        missing=tuple(sorted(name for name in shapes if name not in sizes and tied.get(name) not in sizes)),
        misshapen=tuple(
            _misshapen(name, found, shapes[name])
            for name, found in sorted(sizes.items())
            if prod(found) != shapes[name].numel()
        ),
        misplaced=tuple(
            sorted(info.name for info in header.tensors if info.name.startswith("blk.") and info.name not in names)
        ),
    )

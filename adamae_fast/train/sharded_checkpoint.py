"""Checkpoints of several processes: each writes and reads its own part, by torch.distributed.checkpoint.

The parts (shards) are safetensors files whose headers say where in which tensor they belong; no file is unpickled. A
tensor that is the same in all processes (DDP) is written by one of them, and the tensors are dealt out evenly. Weights
are put together afterwards, so that every checkpoint has them whole; the optimizer's moments stay in shards, which any
number of processes can read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, distribute_tensor

from adamae_fast.distributed.processes import num_processes, process_index
from adamae_fast.tensor_file import write_tensors_file

_IN_FILE = ":"
"""Between a file's name and a tensor's, in the shards of what becomes a whole file."""


def build_stager(on_cuda: bool) -> DefaultStager:
    """Return what copies tensors to host memory, on CUDA to page-locked memory that it keeps for the next time."""
    options = StagingOptions(
        use_pinned_memory=on_cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_cuda
    )
    return DefaultStager(options)


def own_share(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return what this process writes: its parts of split tensors, and its share of those that all processes have.

    The latter are dealt out by size, so that none copies or writes what another one does.
    """
    shares: dict[str, dict[str, Tensor]] = {}
    for file, tensors in files.items():
        equal = [name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)]
        equal.sort(key=lambda name: (-tensors[name].numel(), name))
        others = set(equal) - set(equal[process_index() :: num_processes()])
        shares[file] = {name: tensor for name, tensor in tensors.items() if name not in others}
    return shares


def write_shards(
    folder: Path,
    shares: Mapping[str, Mapping[str, Tensor]],
    names: Mapping[str, Collection[str]],
    complete: Callable[[], None],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the tensors of the last one of the files as shards into ``folder``; each other file whole, beside it.

    Then the first process calls ``complete``. Every process must call this.

    Args:
        folder: for the shards.
        shares: this process's :func:`own_share` of each file.
        names: of all tensors of each file.
        complete: what is done when all is written; if that fails, all has failed.
        group: carries what the processes agree on; a thread beside the training needs one of its own.

    Raises OSError in every process if one of them could not write.
    """
    *whole, in_shards = names
    prefixes = {**{file: f"{file}{_IN_FILE}" for file in whole}, in_shards: ""}
    # A file of its own for the shards of each file, so that no shards are rewritten when the weights among them leave.
    numbers = {prefixes[file] + name: 1 + i for i, file in enumerate(names) for name in names[file]}
    tensors = {prefixes[file] + name: tensor for file, share in shares.items() for name, tensor in share.items()}
    writer = _ShardWriter(folder, whole, numbers, complete)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        raise _first_failure(error) from error


class _ShardWriter(dcp.HuggingFaceStorageWriter):
    """Puts whole files together once every process has written its shards; an error in that reaches all of them."""

    def __init__(self, folder: Path, files: list[str], numbers: dict[str, int], complete: Callable[[], None]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
        self._folder, self._files, self._complete = folder, files, complete

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Runs in the first process."""
        written = {result.storage_data.relative_path for of_one in results for result in of_one}
        unseen = sorted(written - {path.name for path in self._folder.iterdir()})
        if unseen:
            raise FileNotFoundError(
                f"{unseen[0]}, which another process wrote, is not there; output_dir must be a folder that all "
                "machines of the run share"
            )
        for file in self._files:
            targets = {
                name: torch.empty(stored.size, dtype=stored.properties.dtype)
                for name, stored in _tensors(metadata).items()
                if name.startswith(f"{file}{_IN_FILE}")
            }
            _read(self._folder, targets, alone=True)
            tensors = {name.partition(_IN_FILE)[2]: tensor for name, tensor in targets.items()}
            write_tensors_file(tensors, self._folder.parent / file)
        for shard in self._folder.iterdir():
            with safe_open(shard, "pt") as tensors:
                is_in_whole_file = any(_IN_FILE in name for name in tensors.keys())  # noqa: SIM118
            if is_in_whole_file:
                shard.unlink()
        self._complete()


def read_moments(folder: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Read the optimizer's state that :func:`write_shards` wrote, each tensor split as its parameter is.

    The number of processes may be another than when it was written; each reads only its part of a split tensor.
    """
    targets: dict[str, Tensor] = {}
    for name, stored in _tensors(dcp.HuggingFaceStorageReader(str(folder)).read_metadata()).items():
        parameter = parameters.get(name.rpartition(".")[0])
        if parameter is not None and parameter.shape == stored.size:
            targets[name] = torch.empty_like(parameter, dtype=stored.properties.dtype, requires_grad=False)
        else:
            targets[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    _read(folder, targets, alone=not dist.is_initialized())
    return targets


def split_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of ``whole``, as ``like`` is split; ``whole`` itself where ``like`` is not."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {name: of for name, of in metadata.state_dict_metadata.items() if isinstance(of, TensorStorageMetadata)}


def _read(folder: Path, targets: dict[str, Tensor], alone: bool) -> None:
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # reading alone is meant
    try:
        dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except dcp.CheckpointException as error:
        raise _first_failure(error) from error


def _first_failure(error: dcp.CheckpointException) -> OSError:
    """An error of the usual kind: PyTorch's is no Exception, and prints the tracebacks of all processes."""
    rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
    failure = OSError(f"process {rank}: {type(cause).__name__}: {cause}")
    failure.errno = getattr(cause, "errno", None)
    return failure

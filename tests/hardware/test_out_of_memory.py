"""The signs that memory ran out, and that a GPU failed, as each library gives them; and what only looks like one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._inductor.exc import InductorError

from grpo_autotune.hardware.out_of_memory import (
    ended_for_memory,
    is_device_failure,
    is_of_the_machine,
    is_out_of_memory,
)

KERNELS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call.\nCompile with `TORCH_USE_CUDA_DSA`"
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure {}"
)
CREATE = "CUDA error: CUBLAS_STATUS_{} when calling `cublasCreate(handle)`"


class OutOfMemoryError(RuntimeError):
    """Another library's, which only shares the name."""


class AcceleratorError(RuntimeError):
    """The same."""


class JudgeError(RuntimeError):
    """Somebody's own, with the words of an allocator."""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.AcceleratorError(f"CUDA error: out of memory{KERNELS}"),
        RuntimeError(f"CUDA error: out of memory{KERNELS}"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError(CREATE.format("ALLOC_FAILED")),
        RuntimeError(CREATE.format("NOT_INITIALIZED")),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx(handle, opa, opb, m, n, k)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        torch.distributed.DistBackendError(NCCL.format("2 'out of memory'")),
        torch.distributed.DistBackendError(NCCL.format("'out of memory'")),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"),
        RuntimeError("CUDA out of memory occurred when warming up sampler with 1024 dummy requests."),
    ],
)
def test_memory_of_a_gpu_runs_out_in_many_words(error: BaseException) -> None:
    assert is_out_of_memory(error) and not is_device_failure(error) and is_of_the_machine(error)


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        JudgeError("CUDA error: out of memory"),
        AcceleratorError("CUDA error: out of memory"),
        RuntimeError("the judge said: CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSetStream(handle, stream)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        torch.distributed.DistBackendError(NCCL.format("999 'unknown error'")),
        ValueError("CUDA error: out of memory"),
        torch.AcceleratorError(f"CUDA error: no kernel image is available for execution on the device{KERNELS}"),
    ],
)
def test_what_only_sounds_like_it_is_neither(error: BaseException) -> None:
    assert not is_of_the_machine(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{KERNELS}"),
        torch.AcceleratorError(f"CUDA error: device-side assert triggered{KERNELS}"),
        torch.AcceleratorError(f"HIP error: an illegal memory access was encountered{KERNELS}"),
        RuntimeError("Triton Error [CUDA]: operation not supported on global/shared address space"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA driver error: unspecified launch failure"),
    ],
)
def test_a_gpu_that_failed(error: BaseException) -> None:
    assert is_device_failure(error) and not is_out_of_memory(error) and is_of_the_machine(error)


def test_what_a_compiler_met_is_behind_its_own_error() -> None:
    inner = torch.OutOfMemoryError("CUDA out of memory.")
    error = InductorError(inner, None)
    assert error.__cause__ is None and is_of_the_machine(error)
    assert not is_of_the_machine(InductorError(ValueError("no such layout"), None))


@pytest.mark.parametrize(
    ("last", "ended"),
    [
        ("Error out of memory at line 543 in file /src/csrc/ops.cu", True),
        ("Error invalid argument at line 543 in file /src/csrc/ops.cu", False),
        ("the judge: Error out of memory at line 543 in file /src/csrc/ops.cu", False),
    ],
)
def test_the_last_words_of_a_library_that_ends_the_process(tmp_path: Path, last: str, ended: bool) -> None:
    log = tmp_path / "log.txt"
    assert not ended_for_memory(log)
    log.write_text(f"step 3\n{last}\n")
    assert ended_for_memory(log) is ended

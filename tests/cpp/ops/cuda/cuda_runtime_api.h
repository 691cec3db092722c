#pragma once

#include "kernels/cuda/emulator/cuda_runtime.h"

// What the operators use of the CUDA runtime, in the host's memory: see CMakeLists.txt.

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };

/// What cudaStreamIsCapturing answers, for Python.
extern "C" __attribute__((visibility("default"))) int emulated_stream_is_capturing;
/// Calls of cudaMalloc so far.
extern "C" __attribute__((visibility("default"))) int emulated_allocations;

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* number);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);

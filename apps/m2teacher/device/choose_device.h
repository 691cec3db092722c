#pragma once

#include "distributed/ranks.h"

#include <c10/core/Device.h>

#include <string>

namespace m2teacher {

/// Where the networks compute.
///
/// | word          | device                                                                                          |
/// | ------------- | ----------------------------------------------------------------------------------------------- |
/// | auto          | as cuda where torch has a GPU that works, else the CPU                                          |
/// | cpu           | the CPU                                                                                         |
/// | cuda          | the first GPU; with several processes that of the process's local rank (LOCAL_RANK)             |
/// | cuda:N        | GPU number N, counted from 0; for one process alone                                             |
/// | meta          | none: tensors have shapes and dtypes alone, for a dry run                                       |
///
/// A GPU that is chosen becomes the thread's current one.
/// @throws UserError  an unknown word, or a device that is not to be had
at::Device choose_device(const std::string& word, const Ranks& ranks = {});

/// The word, if `choose_device` knows it; looks for no device. @throws UserError
std::string checked_device_word(const std::string& word);

}  // namespace m2teacher

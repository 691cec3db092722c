#pragma once

/// Momentum BatchNorm for PyTorch (arXiv 2101.07525). Includes everything.

#include <momentum_bn/batch_norm.h>
#include <momentum_bn/functional.h>
#include <momentum_bn/memory.h>
#include <momentum_bn/modules.h>
#include <momentum_bn/options.h>
#include <momentum_bn/schedule.h>
#include <momentum_bn/show_config.h>
#include <momentum_bn/teacher.h>

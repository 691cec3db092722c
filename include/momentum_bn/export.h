#pragma once

/// Marks what the shared library offers; everything else in it is hidden.
#if defined(_WIN32)
#if defined(momentum_bn_EXPORTS)
#define MOMENTUM_BN_API __declspec(dllexport)
#else
#define MOMENTUM_BN_API __declspec(dllimport)
#endif
#else
#define MOMENTUM_BN_API __attribute__((visibility("default")))
#endif

#pragma once

namespace momentum_bn::cuda {

/// The newest CUDA that the machine's driver knows, such as 13000 for 13.0; 0 where there is no driver. The device
/// stays untouched, so that a process can still fork.
int driver_version();

/// The CUDA of the runtime that is linked into this library, in the same form.
int runtime_version();

/// Whether that runtime works with this machine's driver, as far as there is one. A driver works with every runtime of
/// its major version and of older ones.
bool driver_suits();

}  // namespace momentum_bn::cuda

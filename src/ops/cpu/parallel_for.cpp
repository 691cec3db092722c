#include "ops/cpu/parallel_for.h"

// at::parallel_for is a template: it runs on threads only where the compiler that reads it has OpenMP.
#ifdef _OPENMP

#include <ATen/Parallel.h>

namespace momentum_bn::cpu {

void parallel_for(int64_t tasks, kernels::Body body, void* context) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

const char* threads_come_from() { return "OpenMP"; }

}  // namespace momentum_bn::cpu

#else

#include <ATen/EmptyTensor.h>
#include <ATen/TensorIterator.h>

namespace momentum_bn::cpu {

// Torch's loop over the elements of a tensor was compiled with threads. Here the elements are the tasks: nothing is
// read or written, where a part begins and how long it is says which tasks are meant.
void parallel_for(int64_t tasks, kernels::Body body, void* context) {
  const at::TensorBase elements = at::detail::empty_cpu({tasks}, at::kByte);
  const char* const first = static_cast<const char*>(elements.const_data_ptr());
  auto iterator = at::TensorIteratorConfig().add_const_input(elements).build();
  iterator.for_each(
      [&](char** data, const int64_t* /*strides*/, int64_t count, int64_t /*rows: one*/) {
        const int64_t begin = data[0] - first;
        body(context, begin, begin + count);
      },
      /*grain_size=*/1);
}

const char* threads_come_from() { return "torch's own loops (built without OpenMP)"; }

}  // namespace momentum_bn::cpu

#endif

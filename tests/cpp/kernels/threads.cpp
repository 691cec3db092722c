#include "threads.h"

#include <algorithm>
#include <thread>

namespace momentum_bn::kernels::test {
namespace {

/// Equal ranges, as at::parallel_for makes them.
template <int kThreads>
void on_threads(int64_t tasks, Body body, void* context) {
  const int64_t share = (tasks + kThreads - 1) / kThreads;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < tasks; begin += share) {
    threads.emplace_back(body, context, begin, std::min(begin + share, tasks));
  }
  for (auto& thread : threads) {
    thread.join();
  }
}

void backwards(int64_t tasks, Body body, void* context) {
  for (int64_t task = tasks - 1; task >= 0; --task) {
    body(context, task, task + 1);
  }
}

}  // namespace

void serial(int64_t tasks, Body body, void* context) { body(context, 0, tasks); }

const std::vector<Schedule>& schedules() {
  static const std::vector<Schedule> all = {{"2 threads", on_threads<2>},
                                            {"3 threads", on_threads<3>},
                                            {"4 threads", on_threads<4>},
                                            {"backwards", backwards}};
  return all;
}

}  // namespace momentum_bn::kernels::test

#pragma once

#include "distributed/ranks.h"

#include <exception>
#include <functional>
#include <utility>

namespace m2teacher {

/// Something failed, and another rank tells the user what.
class ToldElsewhere : public std::exception {
 public:
  explicit ToldElsewhere(std::exception_ptr own) : own_(std::move(own)) {}
  /// What went wrong on this rank, too; null: nothing.
  const std::exception_ptr& own() const { return own_; }

 private:
  std::exception_ptr own_;
};

/// Runs something on all ranks that each can do by itself; none goes on unless all could. `work` reaches no other rank.
/// @throws what `work` threw, on the first rank where it did; on all others ToldElsewhere
void together(const Ranks& ranks, const std::function<void()>& work);

}  // namespace m2teacher

#pragma once

#include <momentum_bn/modules.h>
#include <momentum_bn/schedule.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace momentum_bn {

/// The part of `MomentumTeacher` that does not depend on the model's type: pairing, averages, state.
class MOMENTUM_BN_API MomentumTeacherBase : public torch::nn::Module {
 public:
  /// Updates so far.
  int64_t updates() const;
  /// Weight of the teacher's own, old parameters in the next update. (A layer's `momentum()` is the weight of the new
  /// batch.)
  double param_momentum() const;
  /// Sets the weight that the schedule of the parameters starts with. @throws c10::ValueError outside [0, 1]
  void set_param_momentum(double start);
  /// The number of updates over which both schedules run.
  int64_t total_iters() const { return total_iters_; }
  /// Sets it for the parameters' schedule and for that of every layer. @throws c10::ValueError below 1
  void set_total_iters(int64_t total_iters);
  /// Starts both schedules anew: update 0, and `cur_iter` and `momentum` of every layer as in a new one. Parameters and
  /// running statistics stay; the views of an unfinished update are forgotten.
  void reset();

  /// The averages stay as precise as they are: a cast keeps or makes the masters of 16-bit parameters.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

 protected:
  /// Teacher parameters become copies of the student's and take no gradient. The teacher goes into training mode, and
  /// every layer inside gets `total_iters`.
  /// @throws c10::ValueError where names or shapes do not pair, or an argument is out of range
  void attach(torch::nn::Module& student, std::shared_ptr<torch::nn::Module> teacher, int64_t total_iters,
              double param_momentum);
  void update_from(const torch::nn::Module& student);
  void count_forward();

 private:
  std::vector<std::pair<std::string, at::Tensor>> paired_with(const torch::nn::Module& student) const;
  void check_pace();
  /// Each 16-bit parameter gets a master of which it is the rounding; no other parameter has one then.
  void refresh_masters();
  void set_master(size_t index, const std::string& name, const at::Tensor& value);
  void keep_precision_while(const std::function<void()>& cast);

  std::shared_ptr<torch::nn::Module> teacher_;
  int64_t total_iters_ = 0;
  double start_ = 0;
  at::Tensor updates_state_;
  std::vector<at::Tensor> masters_;  // float32, one per parameter of the teacher, empty unless that has 16 bits
  // Training forwards since the last update, below 0 before the first one; views may run in threads of their own.
  std::atomic<int64_t> forwards_{-1};
  bool has_warned_ = false;
};

/// A teacher whose parameters follow a student's by an exponential moving average and whose Momentum BatchNorms keep
/// statistics of their own (arXiv 2101.07525).
///
///     MomentumTeacher<Encoder> teacher(student, Encoder(with_momentum_batch_norm), total_iters, 0.99);
///     teacher.update();                     // before the teacher's forwards
///     auto k1 = teacher.forward(view1);     // under no_grad
///
/// @tparam Model  a torch module holder (what TORCH_MODULE makes, `torch::nn::Sequential`, ...) or a shared_ptr to a
/// module
///
/// Parameters are paired by name, in whatever order; the student may have more (a predictor), never fewer. The student
/// is referenced, not registered: it is in neither `parameters()` nor the archive. The model stands under the name
/// "module"; `updates` and the float32 master copies of 16-bit parameters ("master/<name>", with / for each dot) are
/// buffers. A parameter that was loaded or assigned, and so is not its master's rounding any more, gives its master a
/// new value at the next update or cast. One warning comes where the number of training forwards between two updates is
/// not the layers' `views_per_update`; it says what that does to their schedule.
template <typename Model>
class MomentumTeacher {
 public:
  MomentumTeacher(Model student, Model teacher, int64_t total_iters, double param_momentum = 0.99)
      : impl_(std::make_shared<Impl>(std::move(student), std::move(teacher), total_iters, param_momentum)) {}

  /// Moves the teacher's parameters towards those of the student that it was built with, or of another one of the same
  /// names and shapes.
  void update() const { impl_->update(impl_->student); }
  void update(const Model& student) const { impl_->update(student); }

  /// The model's forward under no_grad.
  template <typename... Args>
  auto forward(Args&&... args) const {
    torch::NoGradGuard no_grad;
    impl_->count_forward();
    return impl_->model->forward(std::forward<Args>(args)...);
  }

  const Model& model() const { return impl_->model; }
  const Model& student() const { return impl_->student; }

  struct Impl : MomentumTeacherBase {
    Impl(Model student_model, Model teacher_model, int64_t total_iters, double param_momentum)
        : student(std::move(student_model)), model(std::move(teacher_model)) {
      attach(*student, pointer(model), total_iters, param_momentum);
    }
    void update(const Model& other) { update_from(*other); }
    using MomentumTeacherBase::count_forward;

    template <typename Holder>
    static auto pointer(const Holder& holder) -> decltype(holder.ptr()) {
      return holder.ptr();
    }
    template <typename Module>
    static std::shared_ptr<torch::nn::Module> pointer(const std::shared_ptr<Module>& module) {
      return module;
    }

    Model student;
    Model model;
  };

  /// The module: `teacher->train()`, `teacher->parameters()`, `teacher->to(device)`, `torch::save(teacher.ptr(), ...)`.
  Impl* operator->() const { return impl_.get(); }
  Impl& operator*() const { return *impl_; }
  const std::shared_ptr<Impl>& ptr() const { return impl_; }

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace momentum_bn

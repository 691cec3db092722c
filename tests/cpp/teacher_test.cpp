#include "oracle.h"
#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/teacher.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize.h>

#include <limits>
#include <set>
#include <sstream>

namespace momentum_bn {
namespace {

using testing::expect_close;
using testing::randn;
using testing::same_bits;

/// A linear layer and a normalisation; a student has a predictor too.
struct EncoderImpl : torch::nn::Cloneable<EncoderImpl> {
  EncoderImpl(bool teacher, int64_t width = 3, bool predictor = false)
      : teacher_(teacher), width_(width), has_predictor_(predictor) {
    reset();
  }
  void reset() override {
    linear = register_module("linear", torch::nn::Linear(4, width_));
    if (teacher_) {
      momentum_norm = register_module("norm", MomentumBatchNorm1d(width_));
    } else {
      norm = register_module("norm", torch::nn::BatchNorm1d(width_));
    }
    if (has_predictor_) predictor = register_module("predictor", torch::nn::Linear(width_, width_));
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor hidden = linear->forward(x);
    const at::Tensor y = teacher_ ? momentum_norm->forward(hidden) : norm->forward(hidden);
    return predictor.is_empty() ? y : predictor->forward(y);
  }

  bool teacher_;
  int64_t width_;
  bool has_predictor_;
  torch::nn::Linear linear{nullptr};
  torch::nn::BatchNorm1d norm{nullptr};
  MomentumBatchNorm1d momentum_norm{nullptr};
  torch::nn::Linear predictor{nullptr};
};
TORCH_MODULE(Encoder);

Encoder student_of(at::ScalarType dtype = at::kDouble, bool predictor = false) {
  at::manual_seed(3);
  Encoder student(false, 3, predictor);
  student->to(dtype);
  return student;
}

Encoder teacher_of(at::ScalarType dtype = at::kDouble) {
  at::manual_seed(4);
  Encoder teacher(true);
  teacher->to(dtype);
  return teacher;
}

void move(Encoder student, uint64_t step) {
  const at::NoGradGuard no_grad;
  uint64_t seed = 100 * step;
  for (at::Tensor& p : student->parameters()) p.add_((randn(p.sizes(), seed++) * 0.1).to(p.scalar_type()));
}

TEST(MomentumTeacher, StartsAsACopyThatTakesNoGradient) {
  Encoder student = student_of(at::kDouble, /*predictor=*/true);
  Encoder model = teacher_of();
  const MomentumTeacher<Encoder> teacher(student, model, 40);
  const auto students = student->named_parameters();
  for (const auto& item : model->named_parameters()) {
    EXPECT_TRUE(same_bits(item.value(), students[item.key()])) << item.key();
    EXPECT_NE(item.value().data_ptr(), students[item.key()].data_ptr());
    EXPECT_FALSE(item.value().requires_grad());
  }
  EXPECT_EQ(model->momentum_norm->total_iters(), 40);
  EXPECT_TRUE(student->parameters()[0].requires_grad());
}

TEST(MomentumTeacher, AveragesFollowTheFormula) {
  Encoder student = student_of();
  Encoder model = teacher_of();
  const MomentumTeacher<Encoder> teacher(student, model, 10, 0.9);
  std::vector<at::Tensor> expected;
  for (const at::Tensor& p : student->parameters()) expected.push_back(p.detach().clone());
  for (int64_t t = 0; t < 14; ++t) {
    EXPECT_EQ(teacher->updates(), t);
    EXPECT_NEAR(teacher->param_momentum(), oracle::teacher_momentum(t, 10, 0.9), 1e-15);
    move(student, t);
    teacher.update();
    const double m = oracle::teacher_momentum(t, 10, 0.9);
    const auto students = student->parameters();
    const auto teachers = model->parameters();
    for (size_t i = 0; i < expected.size(); ++i) {
      expected[i] = m * expected[i] + (1 - m) * students[i].detach();
      expect_close(teachers[i], expected[i], 1e-12);
    }
  }
}

TEST(MomentumTeacher, UpdatesFromAnotherStudent) {
  Encoder student = student_of();
  Encoder other = student_of();
  move(other, 1);
  Encoder model = teacher_of();
  const MomentumTeacher<Encoder> teacher(student, model, 10, 0.5);
  teacher.update(other);
  expect_close(model->linear->weight, 0.5 * student->linear->weight + 0.5 * other->linear->weight, 1e-12);
}

TEST(MomentumTeacher, ParametersArePairedByName) {
  /// The student's modules in another order.
  struct Reordered : torch::nn::Module {
    Reordered() {
      norm = register_module("norm", torch::nn::BatchNorm1d(3));
      linear = register_module("linear", torch::nn::Linear(4, 3));
    }
    torch::nn::BatchNorm1d norm{nullptr};
    torch::nn::Linear linear{nullptr};
  };
  struct Straight : torch::nn::Module {
    Straight() {
      linear = register_module("linear", torch::nn::Linear(4, 3));
      norm = register_module("norm", MomentumBatchNorm1d(3));
    }
    torch::nn::Linear linear{nullptr};
    MomentumBatchNorm1d norm{nullptr};
  };
  const auto student = std::make_shared<Reordered>();
  const auto model = std::make_shared<Straight>();
  const MomentumTeacher<std::shared_ptr<torch::nn::Module>> teacher(student, model, 10);
  EXPECT_TRUE(same_bits(model->linear->weight, student->linear->weight));
  EXPECT_TRUE(same_bits(model->norm->bias, student->norm->bias));
}

TEST(MomentumTeacher, SixteenBitStudentHasAFloat32Master) {
  Encoder student = student_of(at::kBFloat16);
  Encoder model = teacher_of(at::kBFloat16);
  const MomentumTeacher<Encoder> teacher(student, model, 10000, 0.999);
  at::Tensor expected = student->linear->weight.detach().to(at::kFloat);
  const at::Tensor start = expected.clone();
  {
    const at::NoGradGuard no_grad;
    student->linear->weight.add_(0.5);
  }
  for (int64_t t = 0; t < 200; ++t) {
    teacher.update();
    const double m = oracle::teacher_momentum(t, 10000, 0.999);
    expected = m * expected + (1 - m) * student->linear->weight.detach().to(at::kFloat);
  }
  EXPECT_EQ(model->linear->weight.scalar_type(), at::kBFloat16);
  EXPECT_GT((model->linear->weight.to(at::kFloat) - start).abs().max().item<double>(), 0.05) << "it moved";
  const at::Tensor master = teacher->named_buffers()["master/linear/weight"];
  EXPECT_EQ(master.scalar_type(), at::kFloat);
  expect_close(master, expected, 1e-5);
  EXPECT_TRUE(same_bits(model->linear->weight, master.to(at::kBFloat16)));
}

TEST(MomentumTeacher, TheStudentIsReferencedAndNotRegistered) {
  Encoder student = student_of();
  const MomentumTeacher<Encoder> teacher(student, teacher_of(), 10);
  EXPECT_EQ(teacher->parameters().size(), student->parameters().size());
  std::set<const void*> theirs;
  for (const at::Tensor& p : student->parameters()) theirs.insert(p.data_ptr());
  for (const at::Tensor& p : teacher->parameters()) EXPECT_FALSE(theirs.count(p.data_ptr()));
  for (const auto& item : teacher->named_parameters()) EXPECT_EQ(item.key().rfind("module.", 0), 0U) << item.key();
}

TEST(MomentumTeacher, ForwardRunsUnderNoGrad) {
  const MomentumTeacher<Encoder> teacher(student_of(), teacher_of(), 10);
  const at::Tensor x = randn({6, 4}, 0).requires_grad_();
  EXPECT_FALSE(teacher.forward(x).requires_grad());
  EXPECT_TRUE(at::GradMode::is_enabled());
}

TEST(MomentumTeacher, CutRunGoesOnBitForBit) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    Encoder student = student_of(dtype);
    const MomentumTeacher<Encoder> uncut(student, teacher_of(dtype), 6, 0.6);
    for (int64_t step = 0; step < 3; ++step) {
      move(student, step);
      uncut.update();
      uncut.forward(randn({6, 4}, step, dtype));
    }
    std::stringstream stream;
    torch::save(uncut.ptr(), stream);
    const MomentumTeacher<Encoder> resumed(student_of(dtype), teacher_of(dtype), 6, 0.6);
    auto pointer = resumed.ptr();
    torch::load(pointer, stream);
    EXPECT_EQ(resumed->updates(), 3);
    for (int64_t step = 3; step < 8; ++step) {
      move(student, step);
      uncut.update();
      resumed.update(student);
      EXPECT_TRUE(same_bits(uncut.forward(randn({6, 4}, step, dtype)), resumed.forward(randn({6, 4}, step, dtype))))
          << step;
    }
  }
}

TEST(MomentumTeacher, StudentsThatDoNotMatchAreRefusedAndChangeNothing) {
  Encoder student = student_of();
  EXPECT_THROW(MomentumTeacher<Encoder>(student, Encoder(true, 5), 10), c10::ValueError);
  Encoder with_predictor(true, 3, true);
  with_predictor->to(at::kDouble);
  EXPECT_THROW(MomentumTeacher<Encoder>(student, with_predictor, 10), c10::ValueError) << "the student has fewer";
  Encoder model = teacher_of();
  const MomentumTeacher<Encoder> teacher(student, model, 10);
  teacher.update();
  const at::Tensor before = model->linear->weight.clone();
  EXPECT_THROW(teacher.update(Encoder(false, 5)), c10::ValueError);
  EXPECT_TRUE(same_bits(model->linear->weight, before));
  EXPECT_EQ(teacher->updates(), 1);
}

TEST(MomentumTeacher, BadArguments) {
  Encoder student = student_of();
  EXPECT_THROW(MomentumTeacher<Encoder>(student, teacher_of(), 0), c10::ValueError);
  EXPECT_THROW(MomentumTeacher<Encoder>(student, teacher_of(), 10, -0.1), c10::ValueError);
  EXPECT_THROW(MomentumTeacher<Encoder>(student, teacher_of(), 10, 1.1), c10::ValueError);
  EXPECT_THROW(MomentumTeacher<Encoder>(student, teacher_of(), 10, std::numeric_limits<double>::quiet_NaN()),
               c10::ValueError);
}

TEST(TeacherParamMomentum, FollowsTheFormula) {
  for (const int64_t t : {0, 1, 5, 9, 10, 11, 100}) {
    EXPECT_NEAR(teacher_param_momentum(t, 10, 0.97), oracle::teacher_momentum(t, 10, 0.97), 1e-15);
  }
}

}  // namespace
}  // namespace momentum_bn

#include "oracle.h"
#include "snapshots.h"

#include <gtest/gtest.h>
#include <momentum_bn/teacher.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/serialize.h>

#include <c10/util/Exception.h>

#include <functional>
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
    if (has_predictor_) {
      predictor = register_module("predictor", torch::nn::Linear(width_, width_));
    }
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
  for (at::Tensor& p : student->parameters()) {
    p.add_((randn(p.sizes(), seed++) * 0.1).to(p.scalar_type()));
  }
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
  for (const at::Tensor& p : student->parameters()) {
    expected.push_back(p.detach().clone());
  }
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

/// The values of the masters by name; those of wide parameters, which have none, are left out.
std::vector<at::Tensor> masters_of(const MomentumTeacher<Encoder>& teacher) {
  std::vector<at::Tensor> masters;
  for (const auto& item : teacher->named_buffers()) {
    if (item.key().rfind("master/", 0) == 0 && item->numel() > 0) {
      masters.push_back(item.value());
    }
  }
  return masters;
}

TEST(MomentumTeacher, CastsKeepAndMakeMasters) {
  for (const auto dtype : {at::kBFloat16, at::kHalf}) {
    Encoder student = student_of(at::kFloat);
    Encoder wide_model = teacher_of(at::kFloat);
    Encoder cast_model = teacher_of(at::kFloat);
    const MomentumTeacher<Encoder> wide(student, wide_model, 10000, 0.999);
    const MomentumTeacher<Encoder> cast(student, cast_model, 10000, 0.999);
    cast->to(dtype);
    {
      const at::NoGradGuard no_grad;
      for (at::Tensor& p : student->parameters()) {
        p.add_(0.5);
      }
    }
    for (int64_t t = 0; t < 200; ++t) {
      wide.update();
      cast.update();
      if (t == 50) {
        cast->to(at::kCPU, dtype);
      }
      if (t == 100) {
        cast->to(at::kHalf), cast->to(at::kBFloat16), cast->to(at::kCPU), cast->to(dtype);
      }
      if (t == 150) {
        cast->to(at::kFloat);
        EXPECT_TRUE(masters_of(cast).empty());
        EXPECT_TRUE(same_bits(cast_model->linear->weight, wide_model->linear->weight));
        cast->to(dtype);
      }
    }
    const auto masters = masters_of(cast);
    const auto parameters = cast_model->parameters();
    const auto expected = wide_model->parameters();
    ASSERT_EQ(masters.size(), parameters.size());
    for (size_t i = 0; i < masters.size(); ++i) {
      EXPECT_TRUE(same_bits(masters[i], expected[i]));
      EXPECT_TRUE(same_bits(parameters[i], expected[i].to(dtype)));
    }
    EXPECT_EQ(cast->named_buffers()["updates"].scalar_type(), at::kLong);
    EXPECT_EQ(cast->updates(), 200);
  }
}

TEST(MomentumTeacher, ADoubleTeacherMadeNarrowIsTheRoundingOfItsMasters) {
  Encoder model = teacher_of();
  const MomentumTeacher<Encoder> teacher(student_of(), model, 10);
  teacher->to(at::kBFloat16);
  const auto masters = masters_of(teacher);
  for (size_t i = 0; i < masters.size(); ++i) {
    EXPECT_TRUE(same_bits(model->parameters()[i], masters[i].to(at::kBFloat16)));
  }
}

TEST(MomentumTeacher, AMasterIsNotOlderThanItsParameter) {
  const std::vector<std::function<void(const MomentumTeacher<Encoder>&, const Encoder&)>> then = {
      [](const auto& teacher, const Encoder& other) { teacher.update(other); },  // of the same weights: nothing moves
      [](const auto& teacher, const Encoder&) { teacher->to(at::kBFloat16); },
      [](const auto& teacher, const Encoder&) { teacher->to(at::kFloat), teacher->to(at::kBFloat16); },
  };
  for (const bool replaces_data : {false, true}) {
    for (const auto& act : then) {
      Encoder student = student_of(at::kBFloat16);
      Encoder other = student_of(at::kBFloat16);
      move(other, 7);
      Encoder model = teacher_of(at::kBFloat16);
      const MomentumTeacher<Encoder> teacher(student, model, 1000);
      move(student, 1);
      teacher.update();
      const auto loaded = other->named_parameters();
      for (auto& item : model->named_parameters()) {
        const at::Tensor value = loaded[item.key()].detach().clone();
        replaces_data ? item->set_data(value) : void(item->copy_(value));
      }
      act(teacher, other);
      for (const auto& item : model->named_parameters()) {
        EXPECT_TRUE(same_bits(item.value(), loaded[item.key()]));
      }
      const auto masters = masters_of(teacher);
      ASSERT_EQ(masters.size(), 4U);
      for (size_t i = 0; i < masters.size(); ++i) {
        EXPECT_TRUE(same_bits(masters[i], model->parameters()[i].to(at::kFloat)));
      }
    }
  }
}

TEST(MomentumTeacher, AModelCastByItselfGetsMasters) {
  Encoder student = student_of(at::kFloat);
  Encoder model = teacher_of(at::kFloat);
  const MomentumTeacher<Encoder> teacher(student, model, 10);
  model->to(at::kBFloat16);
  teacher.update();
  EXPECT_EQ(masters_of(teacher).size(), 4U);
  model->to(at::kFloat);
  teacher.update();
  EXPECT_TRUE(masters_of(teacher).empty());
}

TEST(MomentumTeacher, GoesIntoTrainingMode) {
  Encoder student = student_of();
  student->eval();
  Encoder model = teacher_of();
  model->eval();
  const MomentumTeacher<Encoder> teacher(student, model, 10);
  EXPECT_TRUE(model->is_training() && model->momentum_norm->is_training());
  EXPECT_FALSE(student->is_training());
}

TEST(MomentumTeacher, TotalItersAndTheStartMayBeSet) {
  for (const bool by_function : {false, true}) {
    Encoder model = teacher_of();
    const MomentumTeacher<Encoder> teacher(student_of(), model, 10);
    by_function ? set_total_iters(*teacher, 1000) : teacher->set_total_iters(1000);
    EXPECT_EQ(teacher->total_iters(), 1000);
    EXPECT_EQ(model->momentum_norm->total_iters(), 1000);
    for (int64_t t = 0; t < 10; ++t) {
      teacher.update();
    }
    EXPECT_NEAR(teacher->param_momentum(), oracle::teacher_momentum(10, 1000, 0.99), 1e-15);
    teacher->set_param_momentum(0.5);
    EXPECT_NEAR(teacher->param_momentum(), oracle::teacher_momentum(10, 1000, 0.5), 1e-15);
    EXPECT_THROW(teacher->set_total_iters(0), c10::ValueError);
    EXPECT_THROW(set_total_iters(*teacher, 0), c10::ValueError);
    EXPECT_THROW(teacher->set_param_momentum(1.1), c10::ValueError);
    EXPECT_EQ(teacher->total_iters(), 1000);
    EXPECT_EQ(model->momentum_norm->total_iters(), 1000);
    EXPECT_NEAR(teacher->param_momentum(), oracle::teacher_momentum(10, 1000, 0.5), 1e-15);
  }
}

TEST(MomentumTeacher, ResetStartsBothSchedulesAnew) {
  Encoder student = student_of();
  Encoder model = teacher_of();
  const MomentumTeacher<Encoder> teacher(student, model, 10, 0.9);
  for (int64_t step = 0; step < 5; ++step) {
    move(student, step);
    teacher.update();
    for (uint64_t view = 0; view < 2; ++view) {
      teacher.forward(randn({6, 4}, view));
    }
  }
  teacher.forward(randn({6, 4}, 9));
  const at::Tensor weight = model->linear->weight.clone();
  const at::Tensor mean = model->momentum_norm->running_mean.clone();
  teacher->reset();
  EXPECT_EQ(teacher->updates(), 0);
  EXPECT_EQ(teacher->param_momentum(), 0.9);
  EXPECT_EQ(model->momentum_norm->cur_iter(), 0);
  EXPECT_EQ(model->momentum_norm->momentum(), 1.0);
  EXPECT_EQ(model->momentum_norm->view_count.item<int64_t>(), 0);
  EXPECT_FALSE(model->momentum_norm->view_mean_sum.any().item<bool>());
  EXPECT_TRUE(same_bits(model->linear->weight, weight));
  EXPECT_TRUE(same_bits(model->momentum_norm->running_mean, mean));
}

TEST(MomentumTeacher, AScheduleAtAnotherPaceIsToldOnce) {
  /// Keeps what it is told.
  struct Listener : c10::WarningHandler {
    void process(const c10::Warning& warning) override { heard.push_back(warning.msg()); }
    std::vector<std::string> heard;
  };
  const auto warnings_at = [](int64_t forwards) {
    Listener listener;
    const c10::WarningUtils::WarningHandlerGuard guard(&listener);
    const MomentumTeacher<Encoder> teacher(student_of(), teacher_of(), 40);
    for (int64_t step = 0; step < 4; ++step) {
      teacher.update();
      for (int64_t view = 0; view < forwards; ++view) {
        teacher.forward(randn({6, 4}, view));
      }
    }
    return listener.heard;
  };
  EXPECT_TRUE(warnings_at(2).empty());
  EXPECT_TRUE(warnings_at(0).empty());
  const auto heard = warnings_at(8);
  ASSERT_EQ(heard.size(), 1U);
  for (const std::string words : {"8 training forwards", "views_per_update=2", "4 times as fast"}) {
    EXPECT_NE(heard[0].find(words), std::string::npos) << heard[0];
  }
}

TEST(MomentumTeacher, TheStudentIsReferencedAndNotRegistered) {
  Encoder student = student_of();
  const MomentumTeacher<Encoder> teacher(student, teacher_of(), 10);
  EXPECT_EQ(teacher->parameters().size(), student->parameters().size());
  std::set<const void*> theirs;
  for (const at::Tensor& p : student->parameters()) {
    theirs.insert(p.data_ptr());
  }
  for (const at::Tensor& p : teacher->parameters()) {
    EXPECT_FALSE(theirs.count(p.data_ptr()));
  }
  for (const auto& item : teacher->named_parameters()) {
    EXPECT_EQ(item.key().rfind("module.", 0), 0U) << item.key();
  }
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

// Trains a student against a momentum teacher in LibTorch, saves everything to one file after half of the steps, and
// continues from that file in new objects: the losses and the teacher must be the same, bit for bit.
//
//     cpp_consumer [STEPS] [FILE]        20 steps, and run.pt in the current folder

#include <momentum_bn/momentum_bn.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

namespace nn = torch::nn;

/// The same network with either normalisation: student and teacher are paired by their parameters' names.
template <typename Norm2d, typename Norm1d>
nn::Sequential network(Norm2d norm2d, Norm1d norm1d) {
  return nn::Sequential(nn::Conv2d(nn::Conv2dOptions(3, 16, 3).stride(2)), norm2d, nn::ReLU(), nn::AdaptiveAvgPool2d(1),
                        nn::Flatten(), nn::Linear(16, 32), norm1d);
}

/// A student with its predictor, its teacher and its optimizer.
class Run {
 public:
  explicit Run(int64_t steps)
      : student_(network(nn::BatchNorm2d(16), nn::BatchNorm1d(32))),
        predictor_(32, 32),
        // The teacher copies the student's parameters and gives every layer its total_iters.
        teacher_(student_, network(momentum_bn::MomentumBatchNorm2d(16), momentum_bn::MomentumBatchNorm1d(32)), steps),
        optimizer_(parameters(), torch::optim::SGDOptions(0.05).momentum(0.9)) {}

  double train_step(const torch::Tensor& view1, const torch::Tensor& view2) {
    teacher_.update();  // before the forwards: it follows the student of the step before
    const torch::Tensor target1 = teacher_.forward(view1), target2 = teacher_.forward(view2);
    const torch::Tensor foretold1 = predictor_(student_->forward(view1)),
                        foretold2 = predictor_(student_->forward(view2));
    const torch::Tensor loss =
        2 - (torch::cosine_similarity(foretold1, target2) + torch::cosine_similarity(foretold2, target1)).mean();
    optimizer_.zero_grad();
    loss.backward();
    optimizer_.step();
    return loss.item<double>();
  }

  void save(const std::string& path) const {
    torch::serialize::OutputArchive archive, student, predictor, teacher, optimizer;
    student_->save(student);
    predictor_->save(predictor);
    teacher_->save(teacher);
    optimizer_.save(optimizer);
    archive.write("student", student);
    archive.write("predictor", predictor);
    archive.write("teacher", teacher);  // parameters, statistics and both schedules
    archive.write("optimizer", optimizer);
    archive.save_to(path);
  }

  /// Configuration is not saved: load into a run of as many steps.
  void load(const std::string& path) {
    torch::serialize::InputArchive archive, student, predictor, teacher, optimizer;
    archive.load_from(path);
    archive.read("student", student);
    archive.read("predictor", predictor);
    archive.read("teacher", teacher);
    archive.read("optimizer", optimizer);
    student_->load(student);
    predictor_->load(predictor);
    teacher_->load(teacher);
    optimizer_.load(optimizer);
  }

  /// Whether all that the teacher holds is the same, bit for bit.
  bool has_teacher_of(const Run& other) const {
    return equal(teacher_->parameters(), other.teacher_->parameters()) &&
           equal(teacher_->buffers(), other.teacher_->buffers());
  }

 private:
  std::vector<torch::Tensor> parameters() const {
    std::vector<torch::Tensor> all = student_->parameters();
    for (const torch::Tensor& parameter : predictor_->parameters()) all.push_back(parameter);
    return all;
  }

  static bool equal(const std::vector<torch::Tensor>& some, const std::vector<torch::Tensor>& others) {
    return std::equal(some.begin(), some.end(), others.begin(), others.end(),
                      [](const torch::Tensor& a, const torch::Tensor& b) { return torch::equal(a, b); });
  }

  nn::Sequential student_;
  nn::Linear predictor_;
  momentum_bn::MomentumTeacher<nn::Sequential> teacher_;
  torch::optim::SGD optimizer_;
};

int main(int argc, char** argv) {
  const int64_t steps = argc > 1 ? std::stoll(argv[1]) : 20;
  const std::string path = argc > 2 ? argv[2] : "run.pt";
  torch::manual_seed(0);
  const torch::Tensor views = torch::rand({steps, 2, 16, 3, 15, 15});

  Run whole(steps);
  for (int64_t step = 0; step < steps / 2; ++step) whole.train_step(views[step][0], views[step][1]);
  whole.save(path);

  Run resumed(steps);  // of other random weights, until it loads
  resumed.load(path);
  bool same = true;
  for (int64_t step = steps / 2; step < steps; ++step) {
    const double loss = whole.train_step(views[step][0], views[step][1]);
    const double resumed_loss = resumed.train_step(views[step][0], views[step][1]);
    std::cout << "step " << step << "  loss " << loss << "  resumed " << resumed_loss << '\n';
    same = same && loss == resumed_loss;
  }
  same = same && resumed.has_teacher_of(whole);
  std::cout << (same ? "the resumed run is the same, bit for bit\n" : "error: the runs differ\n");
  return same ? 0 : 1;
}

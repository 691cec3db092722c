// The C++ side of tests/python/test_cpp_interop.py:
//
// - python_peer run STATE FIRST LAST END OUTPUTS: reads a layer's archive, runs forwards FIRST to LAST - 1, writes both
// - python_peer train STATE FIRST LAST END OUTPUTS: the same with a BatchNorm, outputs and gradients of the input
// - python_peer defaults, batch_norm_defaults: the options' defaults as JSON
// - python_peer errors: the type and words of the error of every case as JSON

#include <ATen/ATen.h>
#include <momentum_bn/batch_norm.h>
#include <momentum_bn/functional.h>
#include <momentum_bn/modules.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/serialize.h>

#include <algorithm>
#include <functional>
#include <iomanip>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

using momentum_bn::BatchNorm2d;
using momentum_bn::BatchNormOptions;
using momentum_bn::MomentumBatchNorm1d;
using momentum_bn::MomentumBatchNorm2d;
using momentum_bn::MomentumBatchNorm3d;
using momentum_bn::MomentumBatchNormOptions;
using momentum_bn::functional::momentum_batch_norm;

std::string quoted(const std::string& text) {
  std::ostringstream out;
  out << '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out << '\\' << c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out << "\\u" << std::hex << std::setw(4) << std::setfill('0') << static_cast<int>(c) << std::dec;
    } else {
      out << c;
    }
  }
  out << '"';
  return out.str();
}

void run(const std::vector<std::string>& arguments) {
  MomentumBatchNorm2d layer(MomentumBatchNormOptions(3).total_iters(6));
  torch::load(layer, arguments.at(0));
  std::vector<at::Tensor> outputs;
  for (int64_t step = std::stoll(arguments.at(1)); step < std::stoll(arguments.at(2)); ++step) {
    at::manual_seed(1000 + step);
    outputs.push_back(layer->forward(at::randn({4, 3, 5, 2}) * (1 + step % 3) + step % 4).detach());
  }
  torch::save(layer, arguments.at(3));
  torch::save(outputs.empty() ? at::empty({0}) : at::stack(outputs), arguments.at(4));
}

void train(const std::vector<std::string>& arguments) {
  BatchNorm2d layer(BatchNormOptions(3).activation(momentum_bn::Activation::ReLU));
  torch::load(layer, arguments.at(0));
  std::vector<at::Tensor> outputs;
  for (int64_t step = std::stoll(arguments.at(1)); step < std::stoll(arguments.at(2)); ++step) {
    at::manual_seed(1000 + step);
    at::Tensor x = (at::randn({4, 3, 5, 2}) * (1 + step % 3) + step % 4).requires_grad_();
    const at::Tensor y = layer->forward(x);
    y.square().sum().backward();
    outputs.push_back(at::stack({y.detach(), x.grad()}));
  }
  torch::save(layer, arguments.at(3));
  torch::save(at::stack(outputs), arguments.at(4));
}

const char* flag(bool value) { return value ? "true" : "false"; }

void print_batch_norm_defaults() {
  const BatchNormOptions o(3);
  const auto activation = to_word(o.activation());
  std::cout << std::setprecision(17) << "{\"eps\": " << o.eps() << ", \"momentum\": " << o.momentum().value()
            << ", \"affine\": " << flag(o.affine()) << ", \"track_running_stats\": " << flag(o.track_running_stats())
            << ", \"activation\": " << (activation ? quoted(*activation) : "null")
            << ", \"inplace\": " << flag(o.inplace()) << "}\n";
}

void print_defaults() {
  const MomentumBatchNormOptions o(3);
  const auto activation = to_word(o.activation());
  std::cout << std::setprecision(17) << "{\"eps\": " << o.eps() << ", \"momentum\": " << o.momentum().value()
            << ", \"affine\": " << flag(o.affine()) << ", \"track_running_stats\": " << flag(o.track_running_stats())
            << ", \"total_iters\": " << o.total_iters() << ", \"views_per_update\": " << o.views_per_update()
            << ", \"schedule\": " << quoted(to_word(o.schedule()))
            << ", \"variance\": " << quoted(to_word(o.variance()))
            << ", \"activation\": " << (activation ? quoted(*activation) : "null")
            << ", \"inplace\": " << flag(o.inplace()) << ", \"detach_statistics\": " << flag(o.detach_statistics())
            << "}\n";
}

std::map<std::string, std::function<void()>> error_cases() {
  const MomentumBatchNormOptions o(3);
  const auto layer = [](const MomentumBatchNormOptions& options) { return MomentumBatchNorm2d(options); };
  return {
      {"rank_1d", [=] { MomentumBatchNorm1d(o)->forward(at::ones({4, 3, 2, 2})); }},
      {"rank_2d", [=] { layer(o)->forward(at::ones({4, 3, 2})); }},
      {"rank_3d", [=] { MomentumBatchNorm3d(o)->forward(at::ones({4, 3, 2, 2})); }},
      {"one_value", [=] { MomentumBatchNorm1d(o)->forward(at::ones({1, 3})); }},
      {"one_value_2d", [=] { layer(o)->forward(at::ones({1, 3, 1, 1})); }},
      {"one_value_untracked",
       [=] {
         auto untracked = layer(MomentumBatchNormOptions(o).track_running_stats(false));
         untracked->eval();
         untracked->forward(at::ones({1, 3, 1, 1}));
       }},
      {"channels", [=] { layer(o)->forward(at::ones({4, 5, 2, 2})); }},
      {"channels_eval",
       [=] {
         auto evaluating = layer(o);
         evaluating->eval();
         evaluating->forward(at::ones({4, 5, 2, 2}));
       }},
      {"integer", [=] { layer(o)->forward(at::ones({4, 3, 2, 2}, at::kLong)); }},
      {"complex", [=] { layer(o)->forward(at::ones({4, 3, 2, 2}, at::kComplexFloat)); }},
      {"residual_shape", [=] { layer(o)->forward(at::ones({4, 3, 2, 2}), at::ones({4, 3, 2, 1})); }},
      {"residual_dtype", [=] { layer(o)->forward(at::ones({4, 3, 2, 2}), at::ones({4, 3, 2, 2}, at::kDouble)); }},
      {"eps", [=] { layer(MomentumBatchNormOptions(o).eps(-1)); }},
      {"momentum", [=] { layer(MomentumBatchNormOptions(o).momentum(1.5)); }},
      {"total_iters", [=] { layer(MomentumBatchNormOptions(o).total_iters(0)); }},
      {"views_per_update", [=] { layer(MomentumBatchNormOptions(o).views_per_update(0)); }},
      {"process_group", [=] { layer(MomentumBatchNormOptions(o).process_group("world")); }},
      {"set_momentum", [=] { layer(o)->set_momentum(-0.5); }},
      {"set_cur_iter", [=] { layer(o)->set_cur_iter(-1); }},
      {"set_total_iters", [=] { layer(o)->set_total_iters(-2); }},
      {"set_total_iters_of_a_network",
       [=] {
         torch::nn::ModuleList network(layer(o));
         momentum_bn::set_total_iters(*network, 0);
       }},
      {"batch_norm_momentum", [] { BatchNorm2d(BatchNormOptions(3).momentum(-0.5)); }},
      {"batch_norm_eps", [] { BatchNorm2d(BatchNormOptions(3).eps(0)); }},
      {"batch_norm_one_value", [] { BatchNorm2d(3)->forward(at::ones({1, 3, 1, 1})); }},
      {"batch_norm_channels", [] { BatchNorm2d(3)->forward(at::ones({4, 5, 2, 2})); }},
      {"function_channels", [] { momentum_batch_norm(at::ones({4, 3}), at::ones({4}), at::ones({3}), {}, {}, true); }},
      {"function_weight",
       [] { momentum_batch_norm(at::ones({4, 3}), at::ones({3}), at::ones({3}), at::ones({2}), {}, true); }},
      {"function_one_of_two", [] { momentum_batch_norm(at::ones({4, 3}), at::ones({3}), {}, {}, {}, true); }},
      {"function_one_value", [] { momentum_batch_norm(at::ones({1, 3}), {}, {}, {}, {}, true); }},
      {"function_integer", [] { momentum_batch_norm(at::ones({4, 3}, at::kLong), {}, {}, {}, {}, true); }},
      {"function_momentum", [] { momentum_batch_norm(at::ones({4, 3}), {}, {}, {}, {}, true, 1.5); }},
      {"function_eps", [] { momentum_batch_norm(at::ones({4, 3}), {}, {}, {}, {}, true, 1.0, 0.0); }},
      {"function_rank", [] { momentum_batch_norm(at::ones({3}), {}, {}, {}, {}, true); }},
  };
}

/// What Python calls the type of the error that `action` throws, and the error's words.
std::pair<std::string, std::string> error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const c10::ValueError& error) {
    return {"ValueError", error.what_without_backtrace()};
  } catch (const c10::TypeError& error) {
    return {"TypeError", error.what_without_backtrace()};
  } catch (const c10::NotImplementedError& error) {
    return {"NotImplementedError", error.what_without_backtrace()};
  } catch (const c10::Error& error) {
    return {"RuntimeError", error.what_without_backtrace()};
  }
  return {"no error", ""};
}

void print_errors() {
  const char* separator = "{";
  for (const auto& [name, action] : error_cases()) {
    const auto [type, words] = error_of(action);
    std::cout << separator << quoted(name) << ": {\"type\": " << quoted(type) << ", \"words\": " << quoted(words)
              << "}";
    separator = ",\n";
  }
  std::cout << "}\n";
}

}  // namespace

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv + std::min(argc, 2), argv + argc);
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "run" && arguments.size() == 5) {
    run(arguments);
  } else if (command == "train" && arguments.size() == 5) {
    train(arguments);
  } else if (command == "batch_norm_defaults") {
    print_batch_norm_defaults();
  } else if (command == "defaults") {
    print_defaults();
  } else if (command == "errors") {
    print_errors();
  } else {
    std::cerr
        << "usage: python_peer run|train STATE FIRST LAST END OUTPUTS | defaults | batch_norm_defaults | errors\n";
    return 2;
  }
  return 0;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 1;
}

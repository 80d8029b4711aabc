// The functions behind the ops, for library.cu.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>
#include <vector>

namespace bert_fast {

using torch::stable::Tensor;

// Why encoder_small does not run here; empty: it does. device: index of a CUDA device.
std::string encoder_small_reason(int64_t device, int64_t layers, int64_t hidden, int64_t intermediate, int64_t heads,
                                 int64_t batch, int64_t length);

// See kernels/encoder_small.py. activation: of enum Activation.
std::tuple<Tensor, Tensor, Tensor> encoder_small(Tensor x, Tensor token, Tensor cu_seqlens, Tensor kv_len,
                                                 std::vector<Tensor> parameters, std::vector<double> eps, int64_t heads,
                                                 double scale, int64_t activation, bool uniform_empty, bool want_hidden,
                                                 bool want_probs);

}  // namespace bert_fast

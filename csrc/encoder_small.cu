// The host's side of encoder_small: checks, the plan for the device at hand, one cooperative launch.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "check.h"
#include "encoder_small.cuh"
#include "encoder_small_op.h"

namespace bert_fast {
namespace {

using Kernel = void (*)(Params);

void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "encoder_small: ", what, ": ", cudaGetErrorString(status));
}

// torch's function for the current stream. It is in libtorch_cuda, which a CPU build of torch, under which this file
// loads as well, lacks: so it is looked up and not linked.
using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return found;
}

template <class E>
Kernel kernel_of(int head_dim) {
  return head_dim == 32   ? encoder_small_kernel<E, 32>
         : head_dim == 64 ? encoder_small_kernel<E, 64>
                          : encoder_small_kernel<E, 128>;
}

// Blocks of one kernel that a device runs at the same time, each with all shared memory that a block may have.
struct Device {
  int blocks, shared_limit;
  bool clusters;
};

// A launch of whole groups, as clusters where the device has them; `attributes` has room for one more.
cudaLaunchConfig_t launch_config(const Device& device, int blocks, int shared_bytes, cudaStream_t stream,
                                 std::array<cudaLaunchAttribute, 2>& attributes) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = GROUP;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = device.clusters ? 1 : 0;
  return config;
}

Device query(Kernel kernel, int index) {
  int cooperative = 0, multiprocessors = 0, per_multiprocessor = 0, found = 0;
  Device device = {};
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    check_cuda(cudaDeviceGetAttribute(&value, attribute, index), "device attribute");
  };
  read(cooperative, cudaDevAttrCooperativeLaunch);
  read(multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, function), "no code for this GPU");
  device.clusters = attributes.ptxVersion >= 90 && attributes.ptxVersion < 120;  // as BERT_FAST_CLUSTERS in device.cuh
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_limit),
             "shared memory");
  if (!cooperative || multiprocessors < GROUP) return device;
  if (device.clusters) {
    std::array<cudaLaunchAttribute, 2> room;
    const cudaLaunchConfig_t config =
        launch_config(device, multiprocessors / GROUP * GROUP, device.shared_limit, nullptr, room);
    check_cuda(cudaOccupancyMaxActiveClusters(&found, function, &config), "occupancy");
    device.blocks = found * GROUP;
  } else {
    check_cuda(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, function, THREADS, device.shared_limit),
        "occupancy");
    device.blocks = per_multiprocessor * multiprocessors;
  }
  return device;
}

// Asked once for each kernel and device; the device must be current.
Device device_of(Kernel kernel, int index) {
  static std::mutex mutex;
  static std::map<std::pair<Kernel, int>, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find({kernel, index});
  return at != known.end() ? at->second : known[{kernel, index}] = query(kernel, index);
}

// Why a shape cannot be run on any device; empty: it can.
std::string shape_reason(const Shape& s) {
  constexpr int MAX_INTERMEDIATE = 4 * MAX_HIDDEN;
  const int rows = s.batch * s.length;
  const auto wrong = [](const char* name, int value, const std::string& expected) {
    return name + (" is " + std::to_string(value)) + ", expected " + expected;
  };
  const auto up_to = [](int most) { return " to " + std::to_string(most); };
  if (s.layers < 1 || s.layers > MAX_LAYERS) return wrong("number of layers", s.layers, "1" + up_to(MAX_LAYERS));
  if (s.hidden < TILE || s.hidden > MAX_HIDDEN || s.hidden % TILE)
    return wrong("hidden", s.hidden, "a multiple of 16 up" + up_to(MAX_HIDDEN));
  if (s.intermediate < TILE || s.intermediate > MAX_INTERMEDIATE || s.intermediate % TILE)
    return wrong("intermediate", s.intermediate, "a multiple of 16 up" + up_to(MAX_INTERMEDIATE));
  if (s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 128) return wrong("head_dim", s.head_dim, "32, 64 or 128");
  if (s.heads * s.head_dim != s.hidden) return wrong("heads * head_dim", s.heads * s.head_dim, "hidden");
  if (rows < 1 || rows > MAX_ROWS) return wrong("batch * length", rows, "1" + up_to(MAX_ROWS));
  return "";
}

int whole(int64_t n) { return int(std::clamp<int64_t>(n, -1, 1 << 15)); }  // past all limits, two of them in an int

Shape shape_from(int64_t layers, int64_t hidden, int64_t intermediate, int64_t heads, int64_t batch, int64_t length) {
  const int64_t head_dim = heads > 0 ? hidden / heads : 0;
  return {whole(layers),   whole(hidden), whole(intermediate), whole(heads),
          whole(head_dim), whole(batch),  whole(length)};
}

}  // namespace

std::string encoder_small_reason(int64_t device, int64_t layers, int64_t hidden, int64_t intermediate, int64_t heads,
                                 int64_t batch, int64_t length) {
  const Shape shape = shape_from(layers, hidden, intermediate, heads, batch, length);
  std::string why = shape_reason(shape);
  if (!why.empty()) return why;
  if (!current_stream()) return "this torch has no CUDA";
  try {
    const torch::stable::accelerator::DeviceGuard guard(device);
    device_of(kernel_of<Fp16>(shape.head_dim), device);  // loads that kernel too, which a capture may not allow
    const Device found = device_of(kernel_of<Bf16>(shape.head_dim), device);
    Plan plan;
    const char* problem = make_plan(shape, found.blocks, found.shared_limit, plan);
    return problem ? problem : "";
  } catch (const std::exception& error) {  // a chip or a driver for which there is no code here
    const std::string all = error.what();
    return all.substr(0, all.find('\n'));
  }
}

std::tuple<Tensor, Tensor, Tensor> encoder_small(Tensor x, Tensor token, Tensor cu_seqlens, Tensor kv_len,
                                                 std::vector<Tensor> parameters, std::vector<double> eps, int64_t heads,
                                                 double scale, int64_t activation, bool uniform_empty, bool want_hidden,
                                                 bool want_probs) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && (type == ScalarType::BFloat16 || type == ScalarType::Half), "encoder_small: x is ",
                  text(shape_of(x)), " ", name_of(type), ", expected (rows, hidden) bfloat16 or float16");
  const int64_t rows = x.size(0), hidden = x.size(1), batch = kv_len.numel();
  STD_TORCH_CHECK(batch > 0 && rows > 0 && rows % batch == 0, "encoder_small: x has ", rows, " rows for ", batch,
                  " sequences, expected batch * length");
  constexpr int64_t PARAMETERS = WEIGHTS + VECTORS;
  const int64_t layers = parameters.size() / PARAMETERS;
  STD_TORCH_CHECK(layers > 0 && parameters.size() % PARAMETERS == 0, "encoder_small: ", parameters.size(),
                  " parameters, expected 16 for each layer");
  STD_TORCH_CHECK(int64_t(eps.size()) == 2 * layers, "encoder_small: ", eps.size(), " eps, expected 2 for each of ",
                  layers, " layers");
  STD_TORCH_CHECK(std::isfinite(scale), "encoder_small: scale is ", scale, ", expected a finite number");
  STD_TORCH_CHECK(activation >= GELU && activation <= SILU, "encoder_small: activation is ", activation,
                  ", expected 0 (gelu), 1 (gelu_tanh), 2 (relu) or 3 (silu)");
  const Tensor& up = parameters[UP_WEIGHT];
  const int64_t intermediate = up.dim() ? up.size(0) : 0;
  Params p = {};
  p.shape = shape_from(layers, hidden, intermediate, heads, batch, rows / batch);
  const std::string why = shape_reason(p.shape);
  STD_TORCH_CHECK(why.empty(), "encoder_small: ", why);

  check("encoder_small", "x", x, {rows, hidden}, type, x, 16);
  check("encoder_small", "token", token, {rows}, ScalarType::Int, x, 4);
  check("encoder_small", "cu_seqlens", cu_seqlens, {batch + 1}, ScalarType::Int, x, 4);
  check("encoder_small", "kv_len", kv_len, {batch}, ScalarType::Int, x, 4);
  const char* names[] = {"query.weight", "key.weight",
                         "value.weight", "attention output.weight",
                         "up.weight",    "down.weight",
                         "query.bias",   "key.bias",
                         "value.bias",   "attention output.bias",
                         "gamma 1",      "beta 1",
                         "up.bias",      "down.bias",
                         "gamma 2",      "beta 2"};
  for (int64_t i = 0; i < int64_t(parameters.size()); ++i) {
    const int64_t layer = i / PARAMETERS, which = i % PARAMETERS, vector = which - WEIGHTS;
    const bool wide = which == UP_WEIGHT || vector == UP_BIAS;
    std::vector<int64_t> shape = {wide ? intermediate : hidden};
    if (vector < 0) shape.push_back(which == DOWN_WEIGHT ? intermediate : hidden);
    const std::string name = "layer " + std::to_string(layer) + " " + names[which];
    check("encoder_small", name.c_str(), parameters[i], shape, type, x, 16);
    const void* at = parameters[i].const_data_ptr();
    (vector < 0 ? p.layers[layer].weight[which] : p.layers[layer].vector[vector]) = at;
  }
  for (int64_t i = 0; i < layers; ++i) {
    p.layers[i].eps1 = eps[2 * i];
    p.layers[i].eps2 = eps[2 * i + 1];
  }
  STD_TORCH_CHECK(x.is_cuda() && current_stream(),
                  "encoder_small: x is not on a CUDA device, where its only body runs");

  const int32_t index = x.get_device();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const Kernel kernel =
      type == ScalarType::Half ? kernel_of<Fp16>(p.shape.head_dim) : kernel_of<Bf16>(p.shape.head_dim);
  const Device device = device_of(kernel, index);
  const char* problem = make_plan(p.shape, device.blocks, device.shared_limit, p.plan);
  STD_TORCH_CHECK(!problem, "encoder_small: ", problem);

  const Shape& s = p.shape;
  using torch::stable::new_empty;
  Tensor last = new_empty(x, {rows, hidden});
  Tensor states = want_hidden ? new_empty(x, {layers - 1, rows, hidden}) : new_empty(x, {0});
  Tensor probs = want_probs ? new_empty(x, {layers, batch, heads, s.length, s.length}) : new_empty(x, {0});
  const size_t size = lay_out(p, nullptr, device.clusters);
  Tensor workspace = new_empty(x, {int64_t(size)}, ScalarType::Byte);
  lay_out(p, static_cast<char*>(workspace.mutable_data_ptr()), device.clusters);
  p.activation = activation;
  p.uniform_empty = uniform_empty;
  p.scale = scale;
  p.x = x.const_data_ptr();
  p.token = static_cast<const int*>(token.const_data_ptr());
  p.cu_seqlens = static_cast<const int*>(cu_seqlens.const_data_ptr());
  p.kv_len = static_cast<const int*>(kv_len.const_data_ptr());
  p.last = last.mutable_data_ptr();
  p.hidden = want_hidden && layers > 1 ? states.mutable_data_ptr() : nullptr;
  p.probs = want_probs ? probs.mutable_data_ptr() : nullptr;

  void* stream = nullptr;
  STD_TORCH_CHECK(!current_stream()(index, &stream), "encoder_small: no current stream");
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemsetAsync(p.counters, 0, size_t(p.plan.groups + 1) * COUNTER_STRIDE * 4, on), "memset");
  std::array<cudaLaunchAttribute, 2> attributes;
  cudaLaunchConfig_t config = launch_config(device, p.plan.blocks, p.plan.shared_bytes, on, attributes);
  // All blocks at once or none: they wait for each other.
  attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
  attributes[config.numAttrs++].val.cooperative = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, p), "launch");
  return {last, states, probs};
}

}  // namespace bert_fast

/* The network's operations for MLX's CPU backend, one graph primitive each.

   On a CPU `mx.fast` falls apart into primitives, and dispatching one costs more than most of them
   compute in a small model. These do in one what takes MLX four to twelve, in vector arithmetic.
   `native.py` builds the network's step of them. All arrays are float32 and row-contiguous.

   An MLX extension as MLX documents them, without CMake: nanobind's own half is compiled at the
   end of this file. It fits the MLX and the nanobind that it is compiled with; `kernels.py` looks
   whether they are there when it is loaded. */

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <mlx/allocator.h>
#include <mlx/array.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/primitives.h>
#include <mlx/utils.h>
#include <mlx/version.h>

#include "kernels.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using mx::array;

namespace {

using Arrays = std::vector<array>;
using Task = std::function<void()>;

/* What a primitive computes: given its inputs, and its outputs with memory, a task for the stream's
   thread. The arrays may be gone when it runs; their memory is not. */
using Plan = std::function<Task(const Arrays&, Arrays&)>;

class Kernel : public mx::Primitive {
 public:
  Kernel(mx::Stream stream, const char* name, Plan plan)
      : mx::Primitive(stream), name_(name), plan_(std::move(plan)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    for (const array& x : inputs)
      if (!x.flags().row_contiguous)
        throw std::invalid_argument(std::string(name_) + ": an input is not row-contiguous");
    for (array& y : outputs) y.set_data(mx::allocator::malloc(y.nbytes()));
    mx::cpu::get_command_encoder(stream()).dispatch(plan_(inputs, outputs));
  }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name_) + " is for CPUs");
  }
  const char* name() const override { return name_; }

 private:
  const char* name_;
  Plan plan_;
};

void expect(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

bool is_float(const array& x) { return x.dtype() == mx::float32; }

Arrays kernel(const char* name, std::vector<mx::Shape> shapes, Arrays inputs, Plan plan) {
  const mx::Stream stream = mx::to_stream({});
  expect(stream.device == mx::Device::cpu, "the kernels are for CPUs");
  const std::vector<mx::Dtype> dtypes(shapes.size(), mx::float32);
  return array::make_arrays(
      std::move(shapes), dtypes,
      std::make_shared<Kernel>(stream, name, std::move(plan)), std::move(inputs));
}

Packed packed(const array& words, const array& scales, const array& biases, int bits, int group) {
  return {words.data<std::uint32_t>(), scales.data<float>(), biases.data<float>(), bits, group};
}

array quantized_matmul(const array& x, const array& weight, const array& scales,
                       const array& biases, int bits, const std::optional<array>& add) {
  expect(bits == 4 || bits == 8, "quantized_matmul: bits must be 4 or 8");
  expect(x.ndim() == 2 && is_float(x) && weight.ndim() == 2 && weight.dtype() == mx::uint32 &&
             weight.shape(1) * (32 / bits) == x.shape(1) && x.shape(1) % (256 / bits) == 0,
         "quantized_matmul: x [R, columns] must be float32, weight [rows, columns · bits / 32] "
         "uint32, and columns a multiple of 256 / bits");
  const int rows = weight.shape(0), columns = x.shape(1);
  expect(scales.ndim() == 2 && scales.shape(0) == rows && scales.shape(1) > 0 &&
             columns % scales.shape(1) == 0 && scales.shape() == biases.shape() &&
             is_float(scales) && is_float(biases),
         "quantized_matmul: scales and biases must be float32 [rows, columns / group]");
  const int group = columns / scales.shape(1);
  expect(group == 128 / bits || group % (256 / bits) == 0,
         "quantized_matmul: group must be 128 / bits or a multiple of 256 / bits");
  const mx::Shape shape = {x.shape(0), rows};
  Arrays inputs = {x, weight, scales, biases};
  if (add) {
    expect(add->shape() == shape && is_float(*add), "quantized_matmul: add must be float32 [R, rows]");
    inputs.push_back(*add);
  }
  return kernel("QuantizedMatmul", {shape}, std::move(inputs), [=](const Arrays& in, Arrays& out) {
    const Packed w = packed(in[1], in[2], in[3], bits, group);
    return [=, x = in[0].data<float>(), count = in[0].shape(0), y = out[0].data<float>(),
            size = out[0].size(), add = in.size() > 4 ? in[4].data<float>() : nullptr] {
      if (add != nullptr)
        std::copy_n(add, size, y);
      else
        std::fill_n(y, size, 0.0f);
      add_product(x, count, w, rows, columns, y);
    };
  })[0];
}

array rms_norm(const array& x, const array& weight, float eps) {
  const int n = x.ndim() ? x.shape(-1) : 0;
  expect(n > 0 && weight.shape() == mx::Shape{n} && is_float(x) && is_float(weight),
         "rms_norm: x [..., n] and weight [n] must be float32");
  return kernel("RMSNorm", {x.shape()}, {x, weight}, [n, eps](const Arrays& in, Arrays& out) {
    return [=, x = in[0].data<float>(), weight = in[1].data<float>(), y = out[0].data<float>(),
            rows = static_cast<std::ptrdiff_t>(in[0].size() / n)] { norm_rows(x, weight, y, rows, n, eps); };
  })[0];
}

array swiglu(const array& x) {
  expect(x.ndim() && x.shape(-1) > 0 && x.shape(-1) % 2 == 0 && is_float(x),
         "swiglu: x [..., 2n] must be float32");
  mx::Shape shape = x.shape();
  const int n = shape.back() /= 2;
  return kernel("SwiGLU", {shape}, {x}, [n](const Arrays& in, Arrays& out) {
    return [=, x = in[0].data<float>(), y = out[0].data<float>(),
            rows = static_cast<std::ptrdiff_t>(out[0].size() / n)] { gate_rows(x, y, rows, n); };
  })[0];
}

array rope_turns(const array& positions, int dim, double base) {
  expect(positions.ndim() == 2 && positions.dtype() == mx::int32 && dim > 0 && dim % 2 == 0,
         "rope_turns: positions [B, L] must be int32, and dim even");
  const mx::Shape shape = {positions.shape(0), positions.shape(1), dim};
  return kernel("RoPETurns", {shape}, {positions}, [=](const Arrays& in, Arrays& out) {
    return [=, positions = in[0].data<std::int32_t>(), y = out[0].data<float>(), n = in[0].size()] {
      turn_table(positions, y, n, dim, base);
    };
  })[0];
}

std::pair<array, array> heads(const array& x, const std::optional<array>& q_norm,
                              const std::optional<array>& k_norm, const array& turns, int batch,
                              int query_heads, int kv_heads, float eps) {
  const bool normed = q_norm && k_norm;
  expect(turns.ndim() == 3 && (turns.shape(0) == 1 || turns.shape(0) == batch) && is_float(turns),
         "heads: turns must be float32 [B or 1, L, dim]");
  const Shape s = {batch, turns.shape(1), query_heads, kv_heads, turns.shape(2)};
  expect(x.shape() == mx::Shape{batch * s.length, (query_heads + 2 * kv_heads) * s.dim} &&
             is_float(x),
         "heads: x must be float32 [B · L, (query_heads + 2 · kv_heads) · dim]");
  Arrays inputs = {x, turns};
  if (normed) {
    expect(q_norm->shape() == mx::Shape{s.dim} && k_norm->shape() == mx::Shape{s.dim} &&
               is_float(*q_norm) && is_float(*k_norm),
           "heads: q_norm and k_norm must be float32 [dim]");
    inputs.insert(inputs.end(), {*q_norm, *k_norm});
  }
  Arrays out = kernel(
      "Heads",
      {{batch, query_heads, s.length, s.dim}, {batch, 2 * kv_heads, s.length, s.dim}},
      std::move(inputs), [=](const Arrays& in, Arrays& out) {
        return [=, x = in[0].data<float>(), turns = in[1].data<float>(),
                stride = in[1].shape(0) == 1 ? 0 : static_cast<std::ptrdiff_t>(s.length) * s.dim,
                q_norm = normed ? in[2].data<float>() : nullptr,
                k_norm = normed ? in[3].data<float>() : nullptr, queries = out[0].data<float>(),
                keys_values = out[1].data<float>()] {
          split_heads(x, q_norm, k_norm, turns, stride, queries, keys_values, s, eps);
        };
      });
  return {out[0], out[1]};
}

array attention(const array& queries, const Arrays& buffer, const array& mask, int bits) {
  expect(queries.ndim() == 4 && is_float(queries) && (buffer.size() == 1 || buffer.size() == 3),
         "attention: queries must be float32 [B, query_heads, L, dim]");
  const array& kept = buffer[0];
  const Shape s = {queries.shape(0), queries.shape(2), queries.shape(1),
                   kept.ndim() == 4 ? kept.shape(1) / 2 : 0, queries.shape(3)};
  const bool plain = buffer.size() == 1;
  const int slots = s.kv_heads ? kept.shape(2) : 0;
  const int width = plain ? s.dim : s.dim * bits / 32;
  expect(s.kv_heads && s.query_heads % s.kv_heads == 0 &&
             kept.shape() == mx::Shape{s.batch, 2 * s.kv_heads, slots, width} &&
             (plain ? is_float(kept) : kept.dtype() == mx::uint32 && (bits == 4 || bits == 8)),
         "attention: the buffer must be [B, 2 · kv_heads, slots, dim], float32 or of 4 or 8 bits");
  for (std::size_t i = 1; i < buffer.size(); i++)
    expect(buffer[i].ndim() == 4 && is_float(buffer[i]) && buffer[i].shape(3) > 0 &&
               s.dim % buffer[i].shape(3) == 0 && s.dim / buffer[i].shape(3) % 8 == 0 &&
               buffer[i].shape() ==
                   mx::Shape{s.batch, 2 * s.kv_heads, slots, buffer[1].shape(3)},
           "attention: the buffer's scales and biases must be float32 [B, 2 · kv_heads, slots, "
           "dim / group], and group a multiple of 8");
  expect(mask.ndim() == 3 && (mask.shape(0) == 1 || mask.shape(0) == s.batch) &&
             mask.shape(1) == s.length && mask.shape(2) == slots && mask.dtype() == mx::bool_,
         "attention: mask must be bool [B or 1, L, slots]");
  Arrays inputs = {queries, mask};
  inputs.insert(inputs.end(), buffer.begin(), buffer.end());
  return kernel(
      "Attention", {{s.batch * s.length, s.query_heads * s.dim}}, std::move(inputs),
      [=](const Arrays& in, Arrays& out) {
        Cache cache = {nullptr, {}, slots};
        if (plain)
          cache.plain = in[2].data<float>();
        else
          cache.packed = packed(in[2], in[3], in[4], bits, s.dim / in[3].shape(3));
        return [=, queries = in[0].data<float>(), mask = in[1].data<bool>(),
                stride = in[1].shape(0) == 1 ? 0 : static_cast<std::ptrdiff_t>(s.length) * slots,
                y = out[0].data<float>()] { attend(queries, cache, mask, stride, y, s); };
      })[0];
}

}  // namespace

NB_MODULE(_kernels, m) {
  const std::string version = std::to_string(MLX_VERSION_MAJOR) + "." +
                              std::to_string(MLX_VERSION_MINOR) + "." +
                              std::to_string(MLX_VERSION_PATCH);
  m.attr("MLX_VERSION") = version.c_str();
  m.def("quantized_matmul", &quantized_matmul, nb::arg("x"), nb::arg("weight"), nb::arg("scales"),
        nb::arg("biases"), nb::arg("bits"), nb::arg("add") = nb::none());
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"));
  m.def("swiglu", &swiglu, nb::arg("x"));
  m.def("rope_turns", &rope_turns, nb::arg("positions"), nb::arg("dim"), nb::arg("base"));
  m.def("heads", &heads, nb::arg("x"), nb::arg("q_norm").none(), nb::arg("k_norm").none(),
        nb::arg("turns"), nb::arg("batch"), nb::arg("query_heads"), nb::arg("kv_heads"),
        nb::arg("eps"));
  m.def("attention", &attention, nb::arg("queries"), nb::arg("buffer"), nb::arg("mask"),
        nb::arg("bits") = 32);
}

#include <nb_combined.cpp>

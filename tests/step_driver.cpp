/* Runs a step of the C library on another processor: `driver FILE`, a file by test_cpu_arm.py.

   Integers, then all arrays end to end; prints the logits as raw float32. */

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "openelm.h"

namespace {

std::vector<char> content;
std::size_t at = 0;

template <class T>
T* take(std::size_t count) {
  T* found = reinterpret_cast<T*>(content.data() + at);
  at += (count * sizeof(T) + 7) / 8 * 8;
  if (at > content.size()) std::abort();
  return found;
}

int next() { return *take<std::int32_t>(1); }

openelm_matrix matrix() {
  openelm_matrix m = {};
  m.kind = next(), m.group = next(), m.rows = next(), m.columns = next();
  const std::size_t size = static_cast<std::size_t>(m.rows) * m.columns;
  if (m.kind == F32) m.weight = take<float>(size);
  if (m.kind == F16 || m.kind == BF16) m.weight = take<std::uint16_t>(size);
  if (m.kind == AFFINE4 || m.kind == AFFINE8) {
    m.weight = take<std::uint32_t>(size / (m.kind == AFFINE4 ? 8 : 4));
    m.scales = take<float>(size / m.group);
    m.biases = take<float>(size / m.group);
  }
  return m;
}

}  // namespace

int main(int, char** arguments) {
  std::FILE* file = std::fopen(arguments[1], "rb");
  std::fseek(file, 0, SEEK_END);
  content.resize(std::ftell(file));
  std::rewind(file);
  if (std::fread(content.data(), 1, content.size(), file) != content.size()) return 2;

  openelm_network net = {};
  openelm_step step = {};
  net.num_layers = next(), net.model_dim = next(), net.head_dim = next(), net.glu = next();
  step.batch = next(), step.length = next(), step.capacity = next();
  step.bits = next(), step.group = next();
  step.last = -1;
  net.eps = *take<float>(1);
  net.rope_base = *take<double>(1);
  net.token_embeddings = net.lm_head = matrix();
  net.norm = take<float>(net.model_dim);
  std::vector<openelm_layer> layers(net.num_layers);
  std::vector<openelm_cache> caches;
  for (openelm_layer& layer : layers) {
    layer.query_heads = next(), layer.kv_heads = next();
    layer.attn_norm = take<float>(net.model_dim), layer.ffn_norm = take<float>(net.model_dim);
    layer.q_norm = take<float>(net.head_dim), layer.k_norm = take<float>(net.head_dim);
    layer.qkv_proj = matrix(), layer.out_proj = matrix();
    layer.proj_1 = matrix(), layer.proj_2 = matrix();
    const std::size_t size = static_cast<std::size_t>(step.batch) * 2 * layer.kv_heads * step.capacity * net.head_dim;
    const std::size_t groups = step.bits == 32 ? 0 : size / step.group;
    caches.push_back({std::calloc(size, 4), static_cast<float*>(std::calloc(groups + 1, 4)),
                      static_cast<float*>(std::calloc(groups + 1, 4))});
  }
  net.layers = layers.data();
  step.caches = caches.data();
  step.tokens = take<std::int32_t>(static_cast<std::size_t>(step.batch) * step.length);

  /* The whole prompt but its last token at once, then that one by itself. */
  const std::size_t vocab = net.token_embeddings.rows;
  std::vector<float> logits(step.batch * step.length * vocab);
  step.logits = logits.data();
  openelm_set_threads(3);
  if (openelm_abi() != OPENELM_ABI || openelm_compute(&net, &step)) return 3;
  std::fwrite(logits.data(), 4, logits.size(), stdout);
  std::vector<std::int32_t> first;
  for (int b = 0; b < step.batch; b++) first.push_back(step.tokens[b * step.length]);
  step.tokens = first.data();
  step.offset = step.slot = step.length;
  step.length = 1;
  if (openelm_compute(&net, &step)) return 3;
  std::fwrite(logits.data(), 4, step.batch * vocab, stdout);
}

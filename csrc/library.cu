// What loading this library registers. The schema of encoder_small, its CPU body and its fake stand in
// kernels/encoder_small.py, beside those of all other ops.
#include <torch/csrc/stable/library.h>

#include "encoder_small_op.h"

#ifndef BERT_FAST_SOURCES
#define BERT_FAST_SOURCES ""
#endif

// What the library was made of (build_library.py), so that an old one is not taken for that of newer Python files.
static std::string library_sources() { return BERT_FAST_SOURCES; }

STABLE_TORCH_LIBRARY_FRAGMENT(bert_fast, m) {
  m.def("library_sources() -> str");
  m.def(
      "encoder_small_reason(int device, int layers, int hidden, int intermediate, int heads, int batch, int length)"
      " -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CompositeExplicitAutograd, m) {
  m.impl("library_sources", TORCH_BOX(&library_sources));
  m.impl("encoder_small_reason", TORCH_BOX(&bert_fast::encoder_small_reason));
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CUDA, m) { m.impl("encoder_small", TORCH_BOX(&bert_fast::encoder_small)); }

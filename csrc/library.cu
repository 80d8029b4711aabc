// What loading this library registers. The schema of encoder_small, its CPU body and its fake stand in
// kernels/encoder_small.py, beside those of all other ops.
#include <torch/csrc/stable/library.h>

#include "encoder_small_op.h"

#ifdef BERT_FAST_SOURCES
// What the library was made of (build_library.py), for whoever reads the file: kernels/extension.py does not open one
// of other sources than those beside it.
__attribute__((used)) static const char made_of[] = BERT_FAST_SOURCES;
#endif

// What Python asks the library; bert_fast:: has ops alone.
STABLE_TORCH_LIBRARY(bert_fast_csrc, m) {
  m.def(
      "encoder_small_reason(int device, int layers, int hidden, int intermediate, int heads, int batch, int length)"
      " -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast_csrc, CompositeExplicitAutograd, m) {
  m.impl("encoder_small_reason", TORCH_BOX(&bert_fast::encoder_small_reason));
}

STABLE_TORCH_LIBRARY_IMPL(bert_fast, CUDA, m) { m.impl("encoder_small", TORCH_BOX(&bert_fast::encoder_small)); }

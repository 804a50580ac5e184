// Memory formats: what torch-npu notes about the layout of a storage, and FRACTAL_NZ.
//
// In FRACTAL_NZ a matrix is cut into blocks of 16 rows and 32 bytes of columns (for elements of 4 bytes: 16 columns),
// padded with zeros. The blocks of a column of blocks follow each other. The dimensions of the storage are
// [..., columns of blocks, rows of blocks, 16, columns of a block]; those of the tensor stay what they were.
#pragma once

#include <ATen/core/Tensor.h>

#include "cann_sim.h"

namespace cann_sim
{

// Notes that `storage` has the plain layout of `tensor`.
void describe(const at::Tensor &tensor, const c10::Storage &storage);

bool is_fractal(const at::Tensor &device);

// A host tensor with the values of a device tensor in FRACTAL_NZ.
at::Tensor unpacked(const at::Tensor &device);

// Both are host tensors: `fractal` has the dimensions of the storage, `plain` those of the tensor.
void pack(const at::Tensor &plain, const at::Tensor &fractal);
void unpack(const at::Tensor &fractal, const at::Tensor &plain);

} // namespace cann_sim

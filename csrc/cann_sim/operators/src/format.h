// Memory formats: what torch-npu notes about the layout of a storage, and FRACTAL_NZ.
//
// In FRACTAL_NZ a matrix is cut into blocks of 16 rows and 32 bytes of columns (for elements of 4 bytes: 16 columns),
// padded with zeros. The blocks of a column of blocks follow each other. The dimensions of the storage are
// [..., columns of blocks, rows of blocks, 16, columns of a block]; those of the tensor stay what they were.
//
// An operator that reads such a tensor is given a plain copy of its values, which exists only while the operator runs.
// An operator that takes another way for this layout, or refuses it, asks for its `block_width`.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/operator_name.h>

#include "cann_sim.h"

namespace cann_sim
{

// Notes that `storage` has the plain layout of `tensor`.
void describe(const at::Tensor &tensor, const c10::Storage &storage);

bool is_fractal(const at::Tensor &device);

// Whether a device tensor is its whole storage in FRACTAL_NZ, and not a view of it.
bool is_whole_fractal(const at::Tensor &device);

// Whether torch-npu refuses tensors in FRACTAL_NZ for the operator on A2 and A3.
bool refuses_fractal(const c10::OperatorName &op);

// Says that an operator of torch-npu takes them.
void accept_fractal(const c10::OperatorName &op);

// The values of a device's storage in FRACTAL_NZ, for the CPU's operators. Like a kernel that was launched it has an
// address, not a reference.
class PlainCopy
{
  public:
    explicit PlainCopy(const at::Tensor &device);

    // A host tensor that sees the copy as `device` sees its storage. Without memory until the copy is filled.
    at::Tensor seen_as(const at::Tensor &device) const;

    bool is_seen_by(const at::Tensor &host) const
    {
        return host.defined() && host.has_storage() && host.storage().is_alias_of(values_);
    }

    int64_t block_width() const
    {
        return blocks_.size(-1) * blocks_.itemsize();
    }

    void fill(); // when it is the stream's turn
    void drop();

  private:
    at::Tensor blocks_; // the device's memory
    std::vector<int64_t> sizes_;
    c10::Storage values_;
};

class Filled
{
  public:
    explicit Filled(std::vector<PlainCopy> &copies);
    ~Filled();
    Filled(const Filled &) = delete;
    Filled &operator=(const Filled &) = delete;

  private:
    std::vector<PlainCopy> &copies_;
};

// Of a host tensor that the operator running in this thread was given: the bytes in a row of the blocks that its values
// came from, or 0 if they were plain.
int64_t block_width(const at::Tensor &host);

// Both are host tensors: `fractal` has the dimensions of the storage, `plain` those of the tensor.
void pack(const at::Tensor &plain, const at::Tensor &fractal);
void unpack(const at::Tensor &fractal, const at::Tensor &plain);

} // namespace cann_sim

#include "format.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "torch_npu/csrc/core/NPUStorageImpl.h"

namespace cann_sim
{
namespace
{

torch_npu::NPUStorageDesc &description(const c10::Storage &storage)
{
    return static_cast<torch_npu::NPUStorageImpl *>(storage.unsafeGetStorageImpl())->npu_desc_;
}

// What torch-npu calls the plain layout of so many dimensions.
aclFormat plain_format(int64_t dimensions)
{
    return dimensions == 4 ? ACL_FORMAT_NCHW : dimensions == 5 ? ACL_FORMAT_NCDHW : ACL_FORMAT_ND;
}

// [..., columns of blocks, rows of blocks, rows, columns] seen as the padded matrix.
at::Tensor as_padded_matrix(const at::Tensor &fractal, const at::Tensor &plain)
{
    TORCH_CHECK(fractal.dim() == plain.dim() + 2, "FRACTAL_NZ: a tensor of ", plain.dim(),
                " dimensions in a storage of ", fractal.dim());
    return fractal.transpose(-4, -3).transpose(-3, -2);
}

} // namespace

void describe(const at::Tensor &tensor, const c10::Storage &storage)
{
    auto &noted = description(storage);

    noted.base_sizes_.assign(tensor.sizes().begin(), tensor.sizes().end());
    noted.base_strides_.assign(tensor.strides().begin(), tensor.strides().end());
    noted.storage_sizes_ = noted.base_sizes_;
    noted.origin_format_ = noted.npu_format_ = plain_format(tensor.dim());
    noted.data_type_ = tensor.dtype();
}

bool is_fractal(const at::Tensor &device)
{
    return description(device.storage()).npu_format_ == ACL_FORMAT_FRACTAL_NZ;
}

at::Tensor unpacked(const at::Tensor &device)
{
    const auto &noted = description(device.storage());
    const auto options = device.options().device(c10::kCPU);
    const auto fractal =
        at::from_blob(const_cast<void *>(device.storage().data()), c10::IntArrayRef(noted.storage_sizes_), options);
    auto plain = at::empty(c10::IntArrayRef(noted.base_sizes_), options);

    unpack(fractal, plain);
    return plain.as_strided(device.sizes(), device.strides(), device.storage_offset());
}

void pack(const at::Tensor &plain, const at::Tensor &fractal)
{
    const auto blocks = as_padded_matrix(fractal, plain);
    auto padded = at::empty(blocks.sizes(), plain.options()).zero_();
    auto matrix = padded.flatten(-4, -3).flatten(-2, -1);

    matrix.narrow(-2, 0, plain.size(-2)).narrow(-1, 0, plain.size(-1)).copy_(plain);
    blocks.copy_(padded);
}

void unpack(const at::Tensor &fractal, const at::Tensor &plain)
{
    const auto matrix = as_padded_matrix(fractal, plain).flatten(-4, -3).flatten(-2, -1);

    plain.copy_(matrix.narrow(-2, 0, plain.size(-2)).narrow(-1, 0, plain.size(-1)));
}

} // namespace cann_sim

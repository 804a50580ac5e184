#include "format.h"

#include <algorithm>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include "torch_npu/csrc/core/NPUStorageImpl.h"

namespace cann_sim
{
namespace
{

thread_local std::vector<const PlainCopy *> filled_copies; // for the operator that runs

std::vector<c10::OperatorName> accepting; // of torch-npu's own

// Operators of ATen that torch-npu 2.13 only knows as aclnn's, and which its messages say "do not support internal
// format". For others it compiles an operator that knows the layout, or passes it on.
constexpr const char *REFUSING[] = {
    "_masked_softmax", "_scaled_grouped_mm", "_scaled_mm", "aminmax", "angle", "argsort", "bitwise_left_shift",
    "bitwise_right_shift", "bucketize", "exponential", "isin", "logit", "nanmean", "nansum", "repeat_interleave",
    "scaled_dot_product_attention", "scatter_reduce", "signbit", "sort",
};

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

bool is_whole_fractal(const at::Tensor &device)
{
    return is_fractal(device) && device.is_contiguous() && !device.storage_offset() &&
           device.sizes() == c10::IntArrayRef(description(device.storage()).base_sizes_) &&
           device.dtype() == description(device.storage()).data_type_;
}

bool refuses_fractal(const c10::OperatorName &op)
{
    if (op.name.compare(0, 6, "aten::") != 0)
        return std::find(accepting.begin(), accepting.end(), op) == accepting.end();
    auto name = op.name.substr(6);
    if (name.compare(0, 9, "_foreach_") == 0)
        return true;
    if (!name.empty() && name.back() == '_')
        name.pop_back();
    return std::find(std::begin(REFUSING), std::end(REFUSING), name) != std::end(REFUSING);
}

void accept_fractal(const c10::OperatorName &op)
{
    accepting.push_back(op);
}

PlainCopy::PlainCopy(const at::Tensor &device)
    : sizes_(description(device.storage()).base_sizes_.begin(), description(device.storage()).base_sizes_.end())
{
    const auto &noted = description(device.storage());
    const auto options = at::TensorOptions().device(c10::kCPU).dtype(noted.data_type_); // a view may have another

    blocks_ =
        at::from_blob(const_cast<void *>(device.storage().data()), c10::IntArrayRef(noted.storage_sizes_), options);
    values_ = c10::Storage(c10::Storage::use_byte_size_t(), c10::multiply_integers(sizes_) * blocks_.itemsize(),
                           c10::DataPtr(nullptr, c10::kCPU), c10::GetCPUAllocator(), true);
}

at::Tensor PlainCopy::seen_as(const at::Tensor &device) const
{
    auto host = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(values_), c10::DispatchKeySet(c10::DispatchKey::CPU), device.dtype());
    auto *target = host.unsafeGetTensorImpl();

    target->set_storage_offset(device.storage_offset());
    target->set_sizes_and_strides(device.sizes(), device.strides());
    return host;
}

void PlainCopy::fill()
{
    values_.set_data_ptr(c10::GetCPUAllocator()->allocate(values_.nbytes()));
    unpack(blocks_, at::from_blob(values_.mutable_data(), sizes_, blocks_.options()));
    filled_copies.push_back(this);
}

void PlainCopy::drop()
{
    filled_copies.erase(std::find(filled_copies.begin(), filled_copies.end(), this));
    values_.set_data_ptr(c10::DataPtr(nullptr, c10::kCPU));
}

Filled::Filled(std::vector<PlainCopy> &copies) : copies_(copies)
{
    for (auto &copy : copies_)
        copy.fill();
}

Filled::~Filled()
{
    for (auto &copy : copies_)
        copy.drop();
}

int64_t block_width(const at::Tensor &host)
{
    const auto copy = std::find_if(filled_copies.begin(), filled_copies.end(),
                                   [&](const PlainCopy *each) { return each->is_seen_by(host); });

    return copy == filled_copies.end() ? 0 : (*copy)->block_width();
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

#include "compiled.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

#include "cann_sim.h"
#include "format.h"

namespace cann_sim
{
namespace
{

at::ScalarType scalar_type(aclDataType type)
{
    switch (type) {
    case ACL_FLOAT:
        return at::kFloat;
    case ACL_FLOAT16:
        return at::kHalf;
    case ACL_BF16:
        return at::kBFloat16;
    case ACL_DOUBLE:
        return at::kDouble;
    case ACL_INT8:
        return at::kChar;
    case ACL_UINT8:
        return at::kByte;
    case ACL_INT16:
        return at::kShort;
    case ACL_INT32:
        return at::kInt;
    case ACL_INT64:
        return at::kLong;
    case ACL_BOOL:
        return at::kBool;
    default:
        TORCH_CHECK(false, "data type ", static_cast<int>(type), " is not simulated");
    }
}

at::Tensor tensor_of(const cann_sim_tensor &described)
{
    const c10::IntArrayRef sizes(described.dimensions, described.dimension_count);
    const auto type = scalar_type(described.type);
    const auto needed = c10::multiply_integers(sizes) * c10::elementSize(type);

    TORCH_CHECK(needed <= described.size, sizes, " of ", type, " in ", described.size, " bytes");
    return at::from_blob(described.data, sizes, type);
}

bool holds_fractal(const cann_sim_tensor &described)
{
    return described.format == ACL_FORMAT_FRACTAL_NZ;
}

// Its two tensors may differ in format, which is how npu_format_cast converts.
void identity(const cann_sim_operator &operation)
{
    const auto &from = operation.inputs[0], &to = operation.outputs[0];
    const auto source = tensor_of(from), target = tensor_of(to);

    TORCH_CHECK(source.scalar_type() == target.scalar_type(), "from ", source.scalar_type(), " to ",
                target.scalar_type());
    if (holds_fractal(from) && !holds_fractal(to))
        unpack(source, target);
    else if (holds_fractal(to) && !holds_fractal(from))
        pack(source, target);
    else
        target.copy_(source);
}

void cast(const cann_sim_operator &operation)
{
    tensor_of(operation.outputs[0]).copy_(tensor_of(operation.inputs[0]));
}

// Inputs: the sizes, and the value.
void fill(const cann_sim_operator &operation)
{
    tensor_of(operation.outputs[0]).copy_(tensor_of(operation.inputs[1]).reshape({}));
}

// Inputs: the tensor, for each of its dimensions the elements before and after, and the value.
void pad(const cann_sim_operator &operation)
{
    const auto source = tensor_of(operation.inputs[0]), paddings = tensor_of(operation.inputs[1]).to(at::kLong);
    auto target = tensor_of(operation.outputs[0]);

    target.copy_(tensor_of(operation.inputs[2]).reshape({}));
    for (int64_t i = 0; i < source.dim(); i++)
        target = target.narrow(i, paddings[2 * i].item<int64_t>(), source.size(i));
    target.copy_(source);
}

constexpr struct {
    const char *type;
    size_t inputs;
    void (*run)(const cann_sim_operator &);
} operators[] = {{"Identity", 1, identity}, {"Cast", 1, cast}, {"Fill", 2, fill}, {"PadV3", 3, pad}};

aclError run(const cann_sim_operator *operation)
{
    const auto *known = std::find_if(std::begin(operators), std::end(operators),
                                     [&](const auto &each) { return !std::strcmp(each.type, operation->type); });

    if (known == std::end(operators))
        return ACL_ERROR_OP_NOT_FOUND;
    if (operation->input_count < known->inputs || operation->output_count != 1)
        return ACL_ERROR_INVALID_PARAM;
    try {
        at::AutoDispatchBelowADInplaceOrView guard;
        known->run(*operation);
        return ACL_SUCCESS;
    } catch (const std::exception &error) {
        std::fprintf(stderr, "cann_sim: operator %s: %s\n", operation->type, error.what());
        return ACL_ERROR_INVALID_PARAM;
    }
}

} // namespace

void carry_compiled_operators()
{
    cann_sim_carry_operators(run);
}

} // namespace cann_sim

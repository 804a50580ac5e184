#include "aicpu.h"

#include <map>
#include <mutex>

#include <ATen/core/Tensor.h>

namespace cann_sim
{
namespace
{

bool always(at::ScalarType)
{
    return true;
}

bool for_integers(at::ScalarType type)
{
    return at::isIntegralType(type, /*includeBool=*/false);
}

bool for_long(at::ScalarType type)
{
    return type == at::kLong;
}

struct Entry {
    const char *name;
    bool (*applies)(at::ScalarType first); // the dtype of the first argument
};

// What was read of CANN 8.5 and its public sources (ops-math: math/search_sorted and math/sort), and of profiles that
// others published: "SortAiCpu" for int32 and int64 and "SortAiCore" for float32, "CumsumAiCpu" for int64 and
// "CumsumAiCore" for int32. search_sorted has a kernel for AICPU only. The list is not complete.
constexpr Entry ENTRIES[] = {
    {"aten::searchsorted", always}, {"aten::sort", for_integers},    {"aten::argsort", for_integers},
    {"aten::cumsum", for_long},     {"aten::cumsum_", for_long},
};

std::mutex mutex; // for the counts
std::map<std::string, int64_t> counts;

bool runs_on_aicpu(const std::string &name, const at::Tensor &first)
{
    for (const auto &entry : ENTRIES)
        if (name == entry.name)
            return entry.applies(first.scalar_type());
    return false;
}

} // namespace

void note_aicpu(const c10::OperatorHandle &op, c10::ArrayRef<c10::IValue> arguments, bool is_captured)
{
    const auto &name = op.schema().name();

    if (arguments.empty() || !arguments[0].isTensor() || !runs_on_aicpu(name, arguments[0].toTensor()))
        return;
    {
        std::lock_guard lock(mutex);
        counts[name]++;
    }
    if (is_captured) {
        TORCH_WARN_ONCE(name, " of ", arguments[0].toTensor().scalar_type(),
                        " is being captured: a device runs it on AICPU, which is slow in every replay");
    }
}

c10::Dict<std::string, int64_t> aicpu_operators()
{
    c10::Dict<std::string, int64_t> told;
    std::lock_guard lock(mutex);

    for (const auto &[name, count] : counts)
        told.insert(name, count);
    return told;
}

} // namespace cann_sim

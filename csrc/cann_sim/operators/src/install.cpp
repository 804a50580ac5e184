// Which operators are carried: loaded by Python, after torch-npu.
#include <algorithm>
#include <set>
#include <string>
#include <unordered_set>

#include <torch/library.h>

#include "aicpu.h"
#include "carry.h"
#include "compiled.h"
#include "copy.h"
#include "format.h"
#include "memory.h"

namespace cann_sim
{
namespace
{

using c10::DispatchKey;

std::unordered_set<c10::OperatorName> registered(DispatchKey key, const std::string &name_space)
{
    std::unordered_set<c10::OperatorName> names;
    for (auto &name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(key))
        if (name.name.compare(0, name_space.size() + 2, name_space + "::") == 0)
            names.insert(std::move(name));
    return names;
}

// What torch-npu does without computing (memory, metadata, and what it knows about its own storages), and the copies,
// which carry_copies has replaced.
bool is_kept(const c10::OperatorHandle &op)
{
    static const std::set<std::string> kept = {
        "aten::empty",       "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided",
        "aten::_lazy_clone", "aten::is_pinned",  "aten::_pin_memory",   "aten::record_stream",
        "aten::is_set_to",   "aten::copy_",      "aten::_to_copy",      "aten::_local_scalar_dense",
        "aten::clone",
        "aten::_copy_from",  "aten::_copy_from_and_resize",
    };
    const auto &returns = op.schema().returns();

    return kept.contains(op.schema().name()) || op.hasTag(at::Tag::inplace_view) ||
           std::any_of(returns.begin(), returns.end(), [](const c10::Argument &returned) {
               return returned.alias_info() && !returned.alias_info()->isWrite();
           });
}

// torch warns of each kernel that is replaced, which is the purpose here.
class Silence final : public c10::WarningHandler
{
    void process(const c10::Warning &) override {}
};

void implement(const c10::OperatorName &name, DispatchKey key, torch::CppFunction function)
{
    Silence silence;
    c10::WarningUtils::WarningHandlerGuard guard(&silence);
    const auto name_space = name.name.substr(0, name.name.find("::"));

    // Never destroyed: that would take the kernel away from who ends later.
    auto &library = *new torch::Library(torch::Library::IMPL, name_space, key, __FILE__, __LINE__);
    library.impl(c10::toString(name).c_str(), std::move(function));
}

void carry_aten()
{
    auto &dispatcher = c10::Dispatcher::singleton();
    const auto of_npu = registered(DispatchKey::PrivateUse1, "aten");
    auto names = registered(DispatchKey::CPU, "aten");
    auto differentiated = registered(DispatchKey::AutogradPrivateUse1, "aten");

    names.insert(of_npu.begin(), of_npu.end());
    for (const auto &name : names) {
        const auto op = dispatcher.findSchema(name);

        if (!op || (of_npu.contains(name) && is_kept(*op)))
            continue;
        implement(name, DispatchKey::PrivateUse1, torch::CppFunction::makeFromBoxedFunction<&carry>());
        if (op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd))
            differentiated.insert(name);
    }
    for (const auto &name : differentiated)
        if (dispatcher.findSchema(name))
            implement(name, DispatchKey::AutogradPrivateUse1,
                      torch::CppFunction::makeFromBoxedFunction<&differentiate>());
}

void install()
{
    wrap_cpu_allocator();
    carry_copies();
    carry_aten();
    carry_compiled_operators();
}

// An operator that has got a CPU kernel.
void carry_named(const std::string &name, bool takes_fractal)
{
    const auto dot = name.find('.');
    const c10::OperatorName op{name.substr(0, dot), dot == std::string::npos ? "" : name.substr(dot + 1)};

    if (takes_fractal)
        accept_fractal(op);
    implement(op, DispatchKey::PrivateUse1, torch::CppFunction::makeFromBoxedFunction<&carry>());
}

TORCH_LIBRARY(cann_sim, library)
{
    library.def("install() -> ()", install);
    library.def("carry(str name, bool takes_fractal) -> ()", carry_named);
    library.def("block_width(Tensor argument) -> int", block_width);
    library.def("aicpu_operators() -> Dict(str, int)", aicpu_operators);
}

} // namespace
} // namespace cann_sim

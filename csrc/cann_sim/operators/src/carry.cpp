#include "carry.h"

#include <algorithm>

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>

#include "aicpu.h"
#include "alias.h"
#include "cann_sim.h"
#include "format.h"
#include "memory.h"
#include "stream.h"

namespace cann_sim
{
namespace
{

// Arguments that stay on the host beside device tensors. (So may lists of indices, which have a type of their own.)
bool belongs_on_host(const c10::Argument &argument)
{
    return argument.name() == "lengths" || argument.name() == "batch_sizes";
}

bool is_generator(const c10::Argument &argument)
{
    const auto optional = argument.type()->cast<c10::OptionalType>();
    const auto &type = optional ? optional->getElementType() : argument.type();

    return type->kind() == c10::TypeKind::GeneratorType;
}

class Call
{
  public:
    Call(const c10::OperatorHandle &op, torch::jit::Stack &stack)
        : op_(op), schema_(op.schema()), stack_(stack), count_(schema_.arguments().size()),
          first_(stack.size() - count_)
    {
    }

    void run()
    {
        for (size_t i = 0; i < count_; i++)
            take(schema_.arguments()[i], stack_[first_ + i]);
        if (!device_)
            device_ = c10::impl::getDeviceGuardImpl(NPU)->getDevice();
        TORCH_CHECK(!host_tensor_ || aliases_.empty(), name(),
                    ": Expected all tensors to be on the same device, but found at least two devices, ", *device_,
                    " and cpu! (argument ", host_tensor_, ")");

        c10::DeviceGuard device_guard(result_device_.value_or(*device_));
        at::AutoDispatchBelowADInplaceOrView below_autograd;
        c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);

        if (to_host_) {
            if (!copies_.empty())
                wait_for_turn(*device_);
            Filled filled(copies_);
            op_.callBoxed(stack_);
            return;
        }
        if (result_device_)
            device_ = result_device_;
        take_generator();
        const bool captured = is_captured(*device_);
        note_aicpu(op_, c10::ArrayRef<c10::IValue>(stack_).slice(first_), captured);
        if (has_queue() && !captured && can_wait() && run_later())
            return;
        wait_for_turn(*device_);
        Filled filled(copies_);
        if (captured)
            run_and_record();
        else
            run_on_device();
    }

  private:
    std::string name() const
    {
        return schema_.name();
    }

    void take(const c10::Argument &argument, c10::IValue &value)
    {
        if (value.isTensor()) {
            value = take_tensor(argument, value.toTensor());
        } else if (value.isTensorList()) {
            c10::List<at::Tensor> taken;
            for (const auto &each : value.toTensorVector())
                taken.push_back(take_tensor(argument, each));
            value = std::move(taken);
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> taken;
            for (const std::optional<at::Tensor> &each : value.toOptionalTensorList()) {
                has_mask_ |= each && (each->scalar_type() == at::kBool || each->scalar_type() == at::kByte);
                taken.push_back(each && is_on_device(*each) ? take_tensor(argument, *each) : each);
            }
            has_indices_ = true;
            value = std::move(taken);
        } else if (value.isDevice()) {
            take_device(value);
        }
    }

    at::Tensor take_tensor(const c10::Argument &argument, const at::Tensor &tensor)
    {
        if (!is_on_device(tensor)) {
            if (tensor.defined() && tensor.device().is_cpu() && tensor.dim() > 0 && !belongs_on_host(argument))
                host_tensor_ = argument.name().c_str();
            return tensor;
        }
        TORCH_CHECK(!device_ || *device_ == tensor.device(), name(),
                    ": Expected all tensors to be on the same device, but found at least two devices, ", *device_,
                    " and ", tensor.device(), "! (argument ", argument.name(), ")");
        const bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
        TORCH_CHECK(!is_written || !is_fractal(tensor), name(), ": argument ", argument.name(),
                    " is in FRACTAL_NZ, into which the simulator writes by npu_format_cast only");
        TORCH_CHECK(!is_fractal(tensor) || !refuses_fractal(op_.operator_name()), name(), ": the format of ",
                    argument.name(), " is FRACTAL_NZ, but must be ND");
        device_ = tensor.device();
        return is_fractal(tensor) ? take_fractal(tensor) : aliases_.to_host(tensor);
    }

    at::Tensor take_fractal(const at::Tensor &tensor)
    {
        copies_.emplace_back(tensor);
        return copies_.back().seen_as(tensor);
    }

    void take_device(c10::IValue &value)
    {
        const auto device = value.toDevice();

        if (device.type() != NPU) {
            to_host_ = true;
            return;
        }
        result_device_ = device.has_index() ? device : c10::impl::getDeviceGuardImpl(NPU)->getDevice();
        value = c10::Device(c10::DeviceType::CPU);
    }

    void take_generator()
    {
        for (size_t i = 0; i < count_; i++) {
            auto &value = stack_[first_ + i];

            if (!is_generator(schema_.arguments()[i]))
                continue;
            draw(value.isNone() ? default_generator() : value.toGenerator());
            value = draw_->host();
            return;
        }
        if (op_.hasTag(at::Tag::nondeterministic_seeded)) {
            draw(default_generator());
            draws_by_default_ = true;
        }
    }

    at::Generator default_generator() const
    {
        return at::globalContext().defaultGenerator(*device_);
    }

    void draw(const at::Generator &generator)
    {
        const auto owner = generator.device();
        TORCH_CHECK(owner.type() == NPU && (!owner.has_index() || owner == *device_), name(),
                    ": Expected a generator of ", *device_, " but found one of ", owner);
        draw_.emplace(generator);
    }

    // Whether the call can return before the operator has run: nobody must know data for it, neither the host nor who
    // makes room for the results. Operators in Python stay in the calling thread, whose lock they need.
    bool can_wait() const
    {
        const auto &returns = schema_.returns();
        const auto &arguments = schema_.arguments();

        return schema_.name().compare(0, 6, "aten::") == 0 && !result_device_ && !draw_ && !host_must_know_data() &&
               returns.size() == 1 && returns[0].type()->kind() == c10::TypeKind::TensorType &&
               std::none_of(arguments.begin(), arguments.end(), [](const c10::Argument &argument) {
                   return argument.alias_info() && argument.kwarg_only(); // it may be resized
               });
    }

    // Makes the result and puts the operator into torch-npu's queue. False if only the operator knows the result.
    bool run_later()
    {
        Node node{op_, {stack_.begin() + static_cast<std::ptrdiff_t>(first_), stack_.end()}, {}, std::nullopt, false,
                  copies_};
        const auto result = schema_.returns()[0].alias_info() ? written_argument() : make_result();

        if (!result.defined())
            return false;
        for (auto &argument : node.arguments)
            keep_numbers(argument);
        node.results.push_back(host_alias(result));
        enqueue(*device_, std::move(node));
        torch::jit::drop(stack_, count_);
        stack_.emplace_back(result);
        return true;
    }

    // The device tensor of the one argument that an operator in place writes.
    at::Tensor written_argument()
    {
        at::Tensor written;

        for (size_t i = 0; i < count_; i++)
            if (schema_.arguments()[i].alias_info() && schema_.arguments()[i].alias_info()->isWrite()) {
                if (written.defined() || !stack_[first_ + i].isTensor())
                    return {};
                written = aliases_.to_device(stack_[first_ + i].toTensor(), *device_);
            }
        return written;
    }

    // A device tensor like the one that the operator would return, according to its kernel for shapes.
    at::Tensor make_result()
    {
        if (!op_.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta))
            return {};
        torch::jit::Stack shapes(stack_.begin() + static_cast<std::ptrdiff_t>(first_), stack_.end()), arguments;
        try {
            for (auto &argument : shapes)
                strip(argument);
            arguments = shapes;
            op_.callBoxed(&shapes);
        } catch (const std::exception &) {
            return {}; // the operator itself knows better what is wrong, if anything is
        }
        const auto shape = shapes.back().toTensor();
        if (!shape.defined() || !shape.is_meta() || is_one_of(shape, arguments))
            return {};
        return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(*device_));
    }

    // Whether an operator has returned an argument, as dropout does outside of training, or a view of one.
    static bool is_one_of(const at::Tensor &result, const torch::jit::Stack &arguments)
    {
        return std::any_of(arguments.begin(), arguments.end(), [&](const c10::IValue &argument) {
            return argument.isTensor() && argument.toTensor().defined() && argument.toTensor().is_alias_of(result);
        });
    }

    // Leaves only the shapes of device tensors.
    void strip(c10::IValue &argument) const
    {
        if (argument.isTensor()) {
            argument = shape_of(argument.toTensor());
        } else if (argument.isTensorList()) {
            c10::List<at::Tensor> shapes;
            for (const auto &each : argument.toTensorVector())
                shapes.push_back(shape_of(each));
            argument = std::move(shapes);
        } else if (argument.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> shapes;
            for (const std::optional<at::Tensor> &each : argument.toOptionalTensorList())
                shapes.push_back(each ? shape_of(*each) : each);
            argument = std::move(shapes);
        }
    }

    at::Tensor shape_of(const at::Tensor &tensor) const
    {
        if (!tensor.defined() || is_of_host(tensor))
            return tensor;
        return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
    }

    // Tensors of the host are taken by value, as a launch takes them.
    void keep_numbers(c10::IValue &argument) const
    {
        if (argument.isTensor() && argument.toTensor().defined() && is_of_host(argument.toTensor())) {
            const bool is_number = argument.toTensor().unsafeGetTensorImpl()->is_wrapped_number();
            auto kept = argument.toTensor().clone();
            if (is_number)
                kept.unsafeGetTensorImpl()->set_wrapped_number(true);
            argument = std::move(kept);
        } else if (argument.isOptionalTensorList()) {
            c10::List<std::optional<at::Tensor>> kept;
            for (const std::optional<at::Tensor> &each : argument.toOptionalTensorList())
                kept.push_back(each && is_of_host(*each) ? std::optional(each->clone()) : each);
            argument = std::move(kept);
        }
    }

    void run_on_device()
    {
        {
            std::optional<DefaultGeneratorDraws> draws;
            DeviceAllocations allocations;

            if (draws_by_default_)
                draws.emplace(*draw_);
            op_.callBoxed(stack_);
        }
        aliases_.write_back();
        for (size_t i = first_; i < stack_.size(); i++)
            give(stack_[i]);
    }

    void run_and_record()
    {
        TORCH_CHECK(!host_must_know_data(), name(),
                    " cannot be captured: what it does depends on data that the host would have to wait for");
        Node node{op_, {stack_.begin() + static_cast<std::ptrdiff_t>(first_), stack_.end()}, {}, draw_,
                  draws_by_default_, copies_};

        for (auto &argument : node.arguments)
            keep(argument);
        run_on_device();
        for (size_t i = first_; i < stack_.size(); i++)
            node.results.push_back(alias_all(stack_[i]));
        record(*device_, std::move(node));
    }

    // torch tags indexing as such, but it is only so for masks.
    bool host_must_know_data() const
    {
        return has_indices_ ? has_mask_
                            : op_.hasTag(at::Tag::dynamic_output_shape) || op_.hasTag(at::Tag::data_dependent_output);
    }

    // Numbers in tensors of the host are captured by value.
    void keep(c10::IValue &argument) const
    {
        if (argument.isTensor() && argument.toTensor().defined() && is_of_host(argument.toTensor()))
            argument = argument.toTensor().clone();
        if (argument.isOptionalTensorList())
            for (const std::optional<at::Tensor> &each : argument.toOptionalTensorList())
                TORCH_CHECK(!each || !is_of_host(*each), name(), " cannot be captured with indices on the host");
    }

    bool is_of_host(const at::Tensor &tensor) const
    {
        return !is_copied(tensor) && cann_sim_device_of(tensor.const_data_ptr(), 1) < 0 && tensor.numel();
    }

    bool is_copied(const at::Tensor &tensor) const
    {
        return std::any_of(copies_.begin(), copies_.end(),
                           [&](const PlainCopy &copy) { return copy.is_seen_by(tensor); });
    }

    void give(c10::IValue &value)
    {
        if (value.isTensor()) {
            value = aliases_.to_device(value.toTensor(), *device_);
        } else if (value.isTensorList()) {
            c10::List<at::Tensor> given;
            for (const auto &each : value.toTensorVector())
                given.push_back(aliases_.to_device(each, *device_));
            value = std::move(given);
        }
    }

    const c10::OperatorHandle &op_;
    const c10::FunctionSchema &schema_;
    torch::jit::Stack &stack_;
    const size_t count_, first_; // of the arguments, later of the results
    Aliases aliases_;
    std::vector<PlainCopy> copies_;
    std::optional<c10::Device> device_, result_device_;
    bool to_host_ = false; // the device argument says so
    bool has_indices_ = false, has_mask_ = false;
    const char *host_tensor_ = nullptr;
    std::optional<Draw> draw_;
    bool draws_by_default_ = false;
};

} // namespace

void carry(const c10::OperatorHandle &op, torch::jit::Stack *stack)
{
    Call(op, *stack).run();
}

void differentiate(const c10::OperatorHandle &op, torch::jit::Stack *stack)
{
    using c10::DispatchKey;

    if (!c10::GradMode::is_enabled()) {
        at::AutoDispatchBelowAutograd below_autograd;
        op.callBoxed(stack);
    } else if (op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
        op.callBoxedForDispatchKey(DispatchKey::CompositeImplicitAutograd, *stack);
    } else {
        op.callBoxedForDispatchKey(DispatchKey::Autograd, *stack);
    }
}

} // namespace cann_sim

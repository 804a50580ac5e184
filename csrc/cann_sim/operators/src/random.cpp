#include "random.h"

#include <mutex>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>

namespace cann_sim
{
namespace
{

constexpr uint64_t offset_step = 4; // a multiple of it is what torch-npu's generators demand

// CPU generators are seeded by the low half, so both numbers must reach it. (The finaliser of SplitMix64.)
uint64_t mix(uint64_t seed, uint64_t offset)
{
    if (!offset)
        return seed;
    uint64_t bits = seed + offset * 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return bits ^ bits >> 31;
}

uint64_t read(const at::Tensor &number)
{
    return static_cast<uint64_t>(*static_cast<const int64_t *>(number.const_data_ptr()));
}

} // namespace

Draw::Draw(const at::Generator &device) : host_(at::detail::createCPUGenerator())
{
    auto *generator = device.get<at_npu::NPUGeneratorImpl>();
    {
        std::lock_guard lock(generator->mutex_);
        state_ = generator->philox_npu_state(offset_step);
    }
    repeat();
}

void Draw::repeat()
{
    const auto seed = state_.captured_ ? read(*state_.seed_.ptr) : state_.seed_.val;
    const auto offset = state_.captured_ ? read(*state_.offset_.ptr) + state_.offset_intragraph_ : state_.offset_.val;

    std::lock_guard lock(host_.mutex());
    host_.set_current_seed(mix(seed, offset));
}

DefaultGeneratorDraws::DefaultGeneratorDraws(const Draw &draw)
{
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard lock(generator.mutex());

    saved_ = generator.get_state();
    generator.set_state(draw.host().get_state());
}

DefaultGeneratorDraws::~DefaultGeneratorDraws()
{
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard lock(generator.mutex());

    generator.set_state(saved_);
}

} // namespace cann_sim

// Random numbers of a device.
//
// torch-npu's generators hold a seed and an offset, and know how both are kept for replays of a graph. The numbers
// come from a CPU generator that is seeded anew by the two before each operator. At offset 0 the seed is taken as it
// is, so that the first operator after a seed draws what it draws on the CPU.
#pragma once

#include <ATen/core/Generator.h>

#include "torch_npu/csrc/aten/NPUGeneratorImpl.h"

namespace cann_sim
{

// The numbers of one operator, taken from a device's generator.
class Draw
{
  public:
    explicit Draw(const at::Generator &device);

    const at::Generator &host() const
    {
        return host_;
    }

    // The generator as it was before the operator; in a graph, as torch-npu set it for this replay.
    void repeat();

  private:
    at::Generator host_;
    at_npu::PhiloxNpuState state_;
};

// Lets operators that take no generator, and so use the CPU's default one, draw from `draw`.
class DefaultGeneratorDraws
{
  public:
    explicit DefaultGeneratorDraws(const Draw &draw);
    ~DefaultGeneratorDraws();
    DefaultGeneratorDraws(const DefaultGeneratorDraws &) = delete;
    DefaultGeneratorDraws &operator=(const DefaultGeneratorDraws &) = delete;

  private:
    at::Tensor saved_;
};

} // namespace cann_sim

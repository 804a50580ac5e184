// Operators that torch-npu gives to CANN's operator compiler, past torch's dispatcher.
#pragma once

namespace cann_sim
{

void carry_compiled_operators();

} // namespace cann_sim
